"""An MCP server whose tool calls another protected MCP server, as itself.

It is protected too: without that, its tool would lend its own access to anybody.
"""

import asyncio
import os
import warnings

from fastmcp import Client, FastMCP

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import ASCredentials
    from authplane_fastmcp import authplane_auth


async def main() -> None:
    """Serve `/mcp` until SIGINT or SIGTERM."""
    auth = await authplane_auth(
        issuer=os.environ["AUTHPLANE_ISSUER"],
        base_url=os.environ["AUTHPLANE_BASE_URL"],
        scopes=["mcp:relay"],
        as_credentials=ASCredentials(os.environ["CLIENT_ID"], os.environ["CLIENT_SECRET"]),
    )
    server = FastMCP("relay-server", auth=auth.auth)
    minting = (
        asyncio.Lock()
    )  # the cache of auth.client would let all that find it empty mint at once

    @server.tool
    async def relay(text: str) -> str:  # pyright: ignore[reportUnusedFunction]
        """Return what the other server's echo tool makes of the text."""
        async with minting:
            token = await auth.client.client_credentials(
                scopes=["mcp:echo"], resources=[os.environ["RESOURCE_URI"]]
            )
        async with Client(os.environ["MCP_URL"], auth=token.access_token) as other:
            return (await other.call_tool("echo", {"text": text})).data

    await server.run_http_async(port=int(os.environ["PORT"]), show_banner=False)
    await auth.aclose()


if __name__ == "__main__":
    asyncio.run(main())
