"""The part for production: one token for many calls, a new one in time, and one clear error."""

import asyncio
import re
import time
import warnings
from collections.abc import Iterator
from contextlib import asynccontextmanager

import httpx
import pytest
from fastmcp import Client

from machine import Machine, status_of, wait_until

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import ASCredentials, AuthplaneClient, InvalidClientError

    from resource_auth import ResourceAuth

CALLS = 100
HEADERS = {"Accept": "application/json, text/event-stream"}
PARAMS = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "a", "version": "0"},
}
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": PARAMS}


@pytest.fixture(scope="module")
def short_lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A tier 01 whose access tokens expire after two seconds."""
    running = Machine(tmp_path_factory.mktemp("short-lived"))
    try:
        running.serve(TOKEN_SECONDS="2")
        wait_until(lambda: status_of("POST", running.mcp_url) == 401, f"tier 01: {running.log}")
        running.register_resource()
        yield running
    finally:
        running.close()


def token_requests(tier01: Machine, status: int = 200) -> int:
    pattern = f'"POST /oauth/token HTTP/1.1" {status}'
    return len(re.findall(pattern, tier01.log.read_text()))


@asynccontextmanager
async def calling(tier01: Machine, credentials: tuple[str, str], resource: str = ""):
    """Yield a function that calls the MCP server with ResourceAuth, and returns the status."""
    client = await AuthplaneClient.create(
        tier01.issuer, auth=ASCredentials(*credentials), dev_mode=True, cache_ttl_buffer_seconds=1
    )
    auth = ResourceAuth(client, ["mcp:echo"], resource or tier01.mcp_url)
    async with httpx.AsyncClient(auth=auth, headers=HEADERS, trust_env=False) as http:

        async def call() -> int:
            return (await http.post(tier01.mcp_url, json=INITIALIZE)).status_code

        yield call
    await client.aclose()


def test_concurrent_calls_cost_one_token_request(tier01: Machine) -> None:
    credentials, before = tier01.register_client(), token_requests(tier01)

    async def run() -> list[int]:
        async with calling(tier01, credentials) as call:
            return await asyncio.gather(*(call() for _ in range(CALLS)))

    assert set(asyncio.run(run())) == {200}
    assert token_requests(tier01) - before == 1


def test_calls_go_on_when_tokens_expire(short_lived: Machine) -> None:
    credentials, before = short_lived.register_client(), token_requests(short_lived)

    async def run() -> set[int]:
        statuses: set[int] = set()
        async with calling(short_lived, credentials) as call:
            end = time.monotonic() + 3
            while time.monotonic() < end:
                statuses.add(await call())
        return statuses

    assert asyncio.run(run()) == {200}
    assert 3 <= token_requests(short_lived) - before <= 5


def test_deleted_client_is_one_error_after_its_token_expired(short_lived: Machine) -> None:
    credentials = short_lived.register_client()

    async def run() -> None:
        async with calling(short_lived, credentials) as call:
            assert await call() == 200
            short_lived.delete_client(credentials[0])
            assert await call() == 200  # its token is valid until it expires
            await asyncio.sleep(1.1)
            before = token_requests(short_lived, 401)
            with pytest.raises(InvalidClientError):
                await call()
            assert token_requests(short_lived, 401) - before == 1

    asyncio.run(run())


def test_401_reaches_the_caller(short_lived: Machine) -> None:
    credentials = short_lived.register_client()
    short_lived.register_resource("other", "http://other.example/mcp")
    before = token_requests(short_lived)

    async def run() -> int:
        async with calling(short_lived, credentials, "http://other.example/mcp") as call:
            return await call()

    assert asyncio.run(run()) == 401
    assert token_requests(short_lived) - before == 1


@pytest.fixture(scope="module")
def relay(
    tier01: Machine, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Machine, str, str]]:
    """A tier 01, the URL of a relay server in front of it, and an access token for that."""
    machine = Machine(tmp_path_factory.mktemp("relay"))
    client_id, secret = tier01.register_client()
    settings = {
        "AUTHPLANE_ISSUER": tier01.issuer,
        "AUTHPLANE_BASE_URL": machine.mcp_url.removesuffix("/mcp"),
        "AUTHPLANE_DEV_MODE": "true",
        "CLIENT_ID": client_id,
        "CLIENT_SECRET": secret,
        "RESOURCE_URI": tier01.mcp_url,
        "MCP_URL": tier01.mcp_url,
        "PORT": str(machine.ports[2]),
    }
    try:
        program = [machine.python, "tests/examples/relay_server.py"]
        machine.popen(program, settings, log=machine.log)
        wait_until(lambda: status_of("POST", machine.mcp_url) == 401, f"relay: {machine.log}")
        tier01.register_resource("relay", machine.mcp_url, "mcp:relay")
        caller = tier01.register_client("mcp:relay")
        yield tier01, machine.mcp_url, tier01.token(caller, resource=machine.mcp_url)
    finally:
        machine.close()
        tier01.delete_client(client_id)


def test_calls_of_a_tool_cost_one_token_request(relay: tuple[Machine, str, str]) -> None:
    tier01, url, token = relay
    before = token_requests(tier01)

    async def run() -> list[str]:
        async with Client(url, auth=token) as client:
            calls = (client.call_tool("relay", {"text": f"call {n}"}) for n in range(20))
            return [result.data for result in await asyncio.gather(*calls)]

    assert asyncio.run(run()) == [f"call {n}" for n in range(20)]
    assert token_requests(tier01) - before == 1


def test_token_of_the_caller_is_rejected_by_the_other_server(
    relay: tuple[Machine, str, str],
) -> None:
    """So a server can't pass on the token of its caller; it needs its own."""
    tier01, url, token = relay
    headers = HEADERS | {"Authorization": f"Bearer {token}"}
    assert httpx.post(tier01.mcp_url, json=INITIALIZE, headers=headers).status_code == 401
    assert httpx.post(url, json=INITIALIZE, headers=HEADERS).status_code == 401
