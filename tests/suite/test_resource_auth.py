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
HEADERS = {"Accept": "application/json, text/event-stream"}


def token_requests(tier01: Machine, status: int = 200) -> int:
    return tier01.log.read_text().count(f'"POST /oauth/token HTTP/1.1" {status}')


@asynccontextmanager
async def calling(
    tier01: Machine, credentials: tuple[str, str], resource: str = ""
) -> AsyncGenerator[Callable[[], Awaitable[int]]]:
    """Yield a function that calls the MCP server with ResourceAuth, and returns the status."""
    client = await AuthplaneClient.create(
        tier01.issuer, auth=ASCredentials(*credentials), dev_mode=True, cache_ttl_buffer_seconds=1
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


async def test_calls_go_on_when_tokens_expire_until_the_client_is_deleted(machine: Machine) -> None:
    machine.serve(TOKEN_SECONDS="2")
    wait_until(lambda: status_of("POST", machine.mcp_url) == 401, f"tier 01: {machine.log}")
    machine.register_resource()
    credentials = machine.register_client()
    async with asyncio.timeout(20), calling(machine, credentials) as call:
        while token_requests(machine) < 3:
            assert await call() == 200
        machine.delete_client(credentials[0])
        assert await call() == 200  # with the token that it still has
        await asyncio.sleep(1.1)
        with pytest.raises(InvalidClientError):
            await call()
    assert token_requests(machine, 401) == 1


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
