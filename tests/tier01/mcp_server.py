"""A protected MCP server like tier 01's: one tool behind `authplane-fastmcp`."""

import asyncio
import os
from urllib.parse import urlsplit

from authplane_fastmcp import authplane_auth
from fastmcp import FastMCP

from listeners import serve


def echo(text: str) -> str:
    """Return the text as it came."""
    return text


async def main() -> None:
    """Serve `/mcp` until SIGINT or SIGTERM; the authorization server must be up already."""
    base_url = os.environ.get("AUTHPLANE_BASE_URL") or "http://localhost:8080"
    auth = await authplane_auth(
        issuer=os.environ.get("AUTHPLANE_ISSUER") or "http://localhost:9000",
        base_url=base_url,
        scopes=["mcp:echo"],
        dev_mode=True,
    )
    server = FastMCP("demo-server", tools=[echo], **auth)
    hosts = ["localhost", "127.0.0.1", "mcp-server", urlsplit(base_url).hostname or "localhost"]
    app = server.http_app(path="/mcp", host_origin_protection=True, allowed_hosts=hosts)
    address = f"{os.environ.get('HOST', '')}:{os.environ.get('PORT') or 8080}"
    await serve(f"MCP server demo-server, audience {base_url}/mcp", {address: app})


if __name__ == "__main__":
    asyncio.run(main())
