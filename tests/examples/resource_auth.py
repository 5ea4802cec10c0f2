import asyncio
from collections.abc import AsyncGenerator
from typing import NoReturn

from authplane import AuthplaneClient
from httpx import Auth, Request  # from httpx2 with FastMCP 4 or MCP SDK 2


class ResourceAuth(Auth):
    """Sends each request of an AsyncClient with an access token for one resource (RFC 8707).

    Use it in a client that calls that one server only: every server that it calls gets the token.
    Use it in one event loop only.
    A request raises authplane.AuthplaneError if no token is issued, httpx.RequestError (also with
    httpx2) if the authorization server doesn't respond, and after five requests without a
    response authplane.CircuitOpenError, for 30 seconds.
    """

    def __init__(self, client: AuthplaneClient, scopes: list[str], resource: str) -> None:
        self.client = client
        self.scopes = scopes
        self.resource = resource
        self.lock = asyncio.Lock()

    async def async_auth_flow(self, request: Request) -> AsyncGenerator[Request, object]:
        async with self.lock:  # one of many concurrent calls requests the token
            token = await self.client.client_credentials(self.scopes, [self.resource])
        request.headers["Authorization"] = f"Bearer {token.access_token}"
        yield request

    def sync_auth_flow(self, request: Request) -> NoReturn:
        raise RuntimeError("ResourceAuth works with an AsyncClient only")
