"""A protected MCP server like tier 01's: one tool behind `authplane-fastmcp`."""

import os
import sys
from urllib.parse import urlsplit

os.environ["FASTMCP_ENV_FILE"] = os.devnull  # else FastMCP reads ./.env, which is not its own

from authplane import AuthplaneError
from authplane_fastmcp import authplane_auth
from fastmcp import FastMCP
from fastmcp.server.auth import require_scopes
from starlette.applications import Starlette

NAME = os.environ.get("MCP_SERVER_NAME") or "demo-server"
RESOURCE_URI = os.environ["RESOURCE_URI"]
ISSUER = os.environ["AUTHPLANE_ISSUER"]


def echo(text: str) -> str:
    """Return the text unchanged."""
    return text


async def mcp_app() -> Starlette:
    """Return the app, whose audience is RESOURCE_URI; exit if there is no authorization server."""
    path = urlsplit(RESOURCE_URI).path
    base_url = RESOURCE_URI.removesuffix(path)
    try:
        auth = await authplane_auth(ISSUER, base_url, ["mcp:echo"], mcp_path=path)
    except AuthplaneError as error:
        sys.exit(f"mcp_server.py: the authorization server {ISSUER}: {error}")
    server = FastMCP(NAME, auth=auth.auth)
    server.tool(echo, auth=require_scopes("mcp:echo"))
    return server.http_app(path)
