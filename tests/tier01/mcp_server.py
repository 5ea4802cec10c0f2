"""A protected MCP server like tier 01's: one tool behind `authplane-fastmcp`."""

import asyncio
import os
import warnings
from urllib.parse import urlsplit

from fastmcp import FastMCP

from listeners import serve

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import AuthplaneError
    from authplane_fastmcp import AuthplaneAuthResult, authplane_auth


def echo(text: str) -> str:
    """Return the text as it came."""
    return text


async def protection(issuer: str, base_url: str) -> AuthplaneAuthResult:
    """Return what protects the server, as soon as the authorization server answers."""
    while True:
        try:
            return await authplane_auth(issuer, base_url, ["mcp:echo"], dev_mode=True)
        except AuthplaneError as error:
            print(f"waiting for the authorization server {issuer}: {error}", flush=True)
            await asyncio.sleep(0.2)


async def main() -> None:
    """Serve `/mcp` until SIGINT or SIGTERM."""
    base_url = os.environ.get("AUTHPLANE_BASE_URL") or "http://localhost:8080"
    issuer = os.environ.get("AUTHPLANE_ISSUER") or "http://localhost:9000"
    server = FastMCP("demo-server", tools=[echo], auth=(await protection(issuer, base_url)).auth)
    hosts = ["localhost", "127.0.0.1", "mcp-server", urlsplit(base_url).hostname or "localhost"]
    app = server.http_app(path="/mcp", host_origin_protection=True, allowed_hosts=hosts)
    address = f"{os.environ.get('HOST', '')}:{os.environ.get('PORT') or 8080}"
    await serve(f"MCP server demo-server, audience {base_url}/mcp", (address, app))


if __name__ == "__main__":
    asyncio.run(main())
