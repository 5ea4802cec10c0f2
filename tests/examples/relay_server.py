"""A protected MCP server whose tool calls another protected MCP server, as itself.

It reads AUTHPLANE_ISSUER; its own URL without `/mcp`, AUTHPLANE_BASE_URL, and its PORT; its client,
CLIENT_ID and CLIENT_SECRET; the other server's resource and URL, RESOURCE_URI and MCP_URL. With the
packages of `tests/.venv`: python tests/examples/relay_server.py
"""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager, suppress
from os import environ

import uvicorn
from authplane import ASCredentials
from authplane_fastmcp import authplane_auth
from fastmcp import Client, FastMCP
from fastmcp.server.auth import require_scopes

from resource_auth import ResourceAuth


async def main() -> None:
    """Serve `/mcp` until SIGINT or SIGTERM."""
    issuer, base_url = environ["AUTHPLANE_ISSUER"], environ["AUTHPLANE_BASE_URL"]
    credentials = ASCredentials(environ["CLIENT_ID"], environ["CLIENT_SECRET"])
    # created once: its client keeps the authorization server's keys, and access tokens
    protection = await authplane_auth(issuer, base_url, ["mcp:relay"], as_credentials=credentials)
    auth = ResourceAuth(protection.client, ["mcp:echo"], environ["RESOURCE_URI"])

    @asynccontextmanager
    async def lifespan(_: FastMCP) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            await protection.aclose()

    # the details of an error can contain internal addresses: they stay in the log
    server = FastMCP(
        "relay-server", auth=protection.auth, lifespan=lifespan, mask_error_details=True
    )

    async def relay(text: str) -> str:
        """Return the result of the other server's echo tool."""
        async with Client(environ["MCP_URL"], auth=auth) as other:
            return (await other.call_tool("echo", {"text": text})).data

    # the time limit, in seconds, includes the wait for a token
    server.tool(relay, auth=require_scopes("mcp:relay"), timeout=15)
    # on SIGTERM, FastMCP's own run() ends the process before the lifespan can close the client
    config = uvicorn.Config(server.http_app(), port=int(environ["PORT"]))
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        asyncio.run(main())
