"""A protected MCP server whose tool calls another protected MCP server, as itself."""

import asyncio
import os
import warnings

from fastmcp import Client, FastMCP
from fastmcp.server.auth import require_scopes

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import ASCredentials
    from authplane_fastmcp import authplane_auth

    from resource_auth import ResourceAuth


async def main() -> None:
    """Serve `/mcp` until SIGINT or SIGTERM."""
    protection = await authplane_auth(
        issuer=os.environ["AUTHPLANE_ISSUER"],
        base_url=os.environ["AUTHPLANE_BASE_URL"],
        scopes=["mcp:relay"],
        as_credentials=ASCredentials(os.environ["CLIENT_ID"], os.environ["CLIENT_SECRET"]),
    )
    server = FastMCP("relay-server", auth=protection.auth)
    auth = ResourceAuth(protection.client, ["mcp:echo"], os.environ["RESOURCE_URI"])

    @server.tool(auth=require_scopes("mcp:relay"))
    async def relay(text: str) -> str:  # pyright: ignore[reportUnusedFunction]
        """Return the result of the other server's echo tool."""
        async with Client(os.environ["MCP_URL"], auth=auth) as other:
            return (await other.call_tool("echo", {"text": text})).data

    await server.run_http_async(port=int(os.environ["PORT"]), show_banner=False)
    await protection.aclose()


if __name__ == "__main__":
    asyncio.run(main())
