"""The part for production: one token for many calls, a new one in time, and one clear error."""

import asyncio
import warnings
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import httpx
import pytest
from fastmcp import Client

from machine import Machine, status_of, wait_until
from plain_agent import INITIALIZE

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import ASCredentials, AuthplaneClient, InvalidClientError

    from resource_auth import ResourceAuth

pytestmark = pytest.mark.anyio
CALLS = 100
EXPIRES_IN = 3600  # of the stand-in's tokens
HEADERS = {"Accept": "application/json, text/event-stream"}


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def token_requests(tier01: Machine, status: int = 200) -> int:
    return tier01.log.read_text().count(f'"POST /oauth/token HTTP/1.1" {status}')


@asynccontextmanager
async def calling(
    tier01: Machine, credentials: tuple[str, str], resource: str = "", kept: float = 60
) -> AsyncGenerator[Callable[[], Awaitable[int]]]:
    """Yield a function that calls the MCP server with ResourceAuth, and returns the status.

    The SDK keeps each token for as many seconds as `kept`.
    """
    auth, buffer = ASCredentials(*credentials), EXPIRES_IN - kept
    client = await AuthplaneClient.create(
        tier01.issuer, auth=auth, dev_mode=True, cache_ttl_buffer_seconds=buffer
    )
    resource_auth = ResourceAuth(client, ["mcp:echo"], resource or tier01.mcp_url)
    async with httpx.AsyncClient(auth=resource_auth, headers=HEADERS, trust_env=False) as http:

        async def call() -> int:
            return (await http.post(tier01.mcp_url, json=INITIALIZE)).status_code

        yield call
    await client.aclose()


async def test_concurrent_calls_cost_one_token_request(
    tier01: Machine, credentials: tuple[str, str]
) -> None:
    before = token_requests(tier01)
    async with calling(tier01, credentials) as call:
        statuses = await asyncio.gather(*(call() for _ in range(CALLS)))
    assert set(statuses) == {200}
    assert token_requests(tier01) - before == 1


async def test_new_token_before_the_old_one_expires(
    tier01: Machine, credentials: tuple[str, str]
) -> None:
    before = token_requests(tier01)
    async with asyncio.timeout(20), calling(tier01, credentials, kept=0.5) as call:
        while token_requests(tier01) - before < 3:
            assert await call() == 200


async def test_deleted_client_is_one_error_when_a_token_is_requested(
    tier01: Machine, credentials: tuple[str, str]
) -> None:
    async with calling(tier01, credentials, kept=1) as call:
        assert await call() == 200
        tier01.delete_client(credentials[0])
        assert await call() == 200  # with the token that it still has
        await asyncio.sleep(1)
        before = token_requests(tier01, 401)
        with pytest.raises(InvalidClientError):
            await call()
        assert token_requests(tier01, 401) - before == 1


async def test_401_reaches_the_caller(tier01: Machine, credentials: tuple[str, str]) -> None:
    other, before = "http://other.example/mcp", token_requests(tier01)
    tier01.register_resource("other", other)
    async with calling(tier01, credentials, other) as call:
        assert await call() == 401
    assert token_requests(tier01) - before == 1


async def test_relay_server(
    machine: Machine, tier01: Machine, agent_settings: dict[str, str]
) -> None:
    """Its tool calls tier 01 with a token of its own, not with that of its caller."""
    base_url, port = machine.mcp_url.removesuffix("/mcp"), str(machine.ports[2])
    settings = agent_settings | {"AUTHPLANE_BASE_URL": base_url, "PORT": port}
    program = [machine.python, "tests/examples/relay_server.py"]
    machine.popen(program, settings, log=machine.log)
    wait_until(lambda: status_of("POST", machine.mcp_url) == 401, f"relay: {machine.log}")
    tier01.register_resource("relay", machine.mcp_url, "mcp:relay")
    token = tier01.token(tier01.register_client("mcp:relay"), resource=machine.mcp_url)
    before = token_requests(tier01)
    async with Client(machine.mcp_url, auth=token) as client:
        calls = (client.call_tool("relay", {"text": f"call {n}"}) for n in range(20))
        results = [result.data for result in await asyncio.gather(*calls)]
    assert results == [f"call {n}" for n in range(20)]
    assert token_requests(tier01) - before == 1
