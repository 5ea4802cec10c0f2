"""A protected MCP server like tier 01's: one tool behind `authplane-fastmcp`."""

import asyncio
import logging
import os
import warnings
from urllib.parse import urlsplit

os.environ["FASTMCP_ENV_FILE"] = os.devnull  # else FastMCP reads ./.env, which is not its own

from fastmcp import FastMCP
from fastmcp.server.auth import require_scopes
from starlette.applications import Starlette

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import JWKSFetchError, MetadataFetchError
    from authplane_fastmcp import authplane_auth

NAME = os.environ.get("MCP_SERVER_NAME") or "demo-server"
RESOURCE_URI = os.environ.get("RESOURCE_URI") or "http://localhost:8080/mcp"
ISSUER = os.environ.get("AUTHPLANE_ISSUER") or "http://localhost:9000"
SCOPE = os.environ.get("MCP_SCOPE") or "mcp:echo"


def echo(text: str) -> str:
    """Return the text unchanged."""
    return text


async def mcp_app() -> Starlette:
    """Return the app, whose audience is RESOURCE_URI, once the authorization server responds."""
    path = urlsplit(RESOURCE_URI).path
    base_url = RESOURCE_URI.removesuffix(path)
    logging.getLogger("authplane.internal.document_fetcher").disabled = True  # one line is enough
    waiting = False
    while True:
        try:
            auth = await authplane_auth(ISSUER, base_url, [SCOPE], mcp_path=path)
            break
        except (JWKSFetchError, MetadataFetchError) as error:
            if not waiting:
                print(f"waiting for the authorization server {ISSUER}: {error}", flush=True)
            waiting = True
            await asyncio.sleep(0.2)
    server = FastMCP(NAME, auth=auth.auth)
    server.tool(echo, auth=require_scopes(SCOPE))
    return server.http_app(path)
