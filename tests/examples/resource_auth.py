import asyncio
from collections.abc import AsyncGenerator

from authplane import AuthplaneClient
from httpx import Auth, Request


class ResourceAuth(Auth):
    """Sends each request of an httpx.AsyncClient with a valid token for one resource (RFC 8707).

    Raises authplane.AuthplaneError if the authorization server issues none.
    """

    def __init__(self, client: AuthplaneClient, scopes: list[str], resource: str) -> None:
        self.client, self.scopes, self.resources = client, scopes, [resource]
        self.lock = asyncio.Lock()

    async def async_auth_flow(self, request: Request) -> AsyncGenerator[Request, object]:
        async with self.lock:  # one of many concurrent calls fills the client's cache
            token = await self.client.client_credentials(self.scopes, self.resources)
        request.headers["Authorization"] = f"Bearer {token.access_token}"
        yield request
