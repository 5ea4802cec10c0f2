"""The call in its place: inside the tool of an MCP server, for a hundred callers at once."""

import asyncio
import re
from collections.abc import Iterator

import pytest
from fastmcp import Client

from conftest import (
    CLIENT,
    RESOURCE,
    Tier01,
    free_ports,
    program,
    running_tier01,
    status_of,
    wait_until,
)

pytestmark = pytest.mark.xdist_group("relay")
CALLS = 100
TOKEN_REQUESTS = 1  # the README says so


@pytest.fixture(scope="module")
def quiet_tier01(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tier01]:
    """A tier 01 whose log holds the requests of this module only."""
    with running_tier01(tmp_path_factory.mktemp("quiet")) as running:
        running.admin("POST", "resources", json=RESOURCE | {"uri": running.mcp_url})
        yield running


def token_requests(tier01: Tier01) -> int:
    log = (tier01.logs / "authserver.log").read_text()
    return len(re.findall(r'"POST /oauth/token HTTP/1.1" 200', log))


def register(tier01: Tier01, scope: str) -> tuple[str, str]:
    client = tier01.admin("POST", "clients", json=CLIENT | {"scope": scope}).json()
    return client["client_id"], client["client_secret"]


@pytest.fixture(scope="module")
def relay(quiet_tier01: Tier01) -> Iterator[tuple[str, str]]:
    """The relay server: its URL, and a token that its callers use."""
    [port] = free_ports(1)
    base = f"http://localhost:{port}"
    scopes = [{"name": "mcp:relay", "description": "relay tool"}]
    resource = {"slug": "relay", "uri": f"{base}/mcp", "scopes": scopes}
    quiet_tier01.admin("POST", "resources", json=RESOURCE | resource)
    client_id, secret = register(quiet_tier01, "mcp:echo")
    caller = register(quiet_tier01, "mcp:relay")
    token = quiet_tier01.token(caller, resource=f"{base}/mcp").json()["access_token"]
    settings = {
        "AUTHPLANE_ISSUER": quiet_tier01.issuer,
        "AUTHPLANE_BASE_URL": base,
        "AUTHPLANE_DEV_MODE": "true",
        "CLIENT_ID": client_id,
        "CLIENT_SECRET": secret,
        "RESOURCE_URI": quiet_tier01.mcp_url,
        "MCP_URL": quiet_tier01.mcp_url,
        "PORT": str(port),
    }
    log = quiet_tier01.logs / "relay.log"
    with program("../relay_server.py", log, **settings):
        wait_until(lambda: status_of("POST", f"{base}/mcp") == 401, f"the relay server, see {log}")
        yield f"{base}/mcp", token


def test_a_hundred_calls_cost_one_token(quiet_tier01: Tier01, relay: tuple[str, str]) -> None:
    url, token = relay
    before = token_requests(quiet_tier01)

    async def call_all() -> list[str]:
        async with Client(url, auth=token) as client:
            calls = (client.call_tool("relay", {"text": f"call {n}"}) for n in range(CALLS))
            return [result.data for result in await asyncio.gather(*calls)]

    assert asyncio.run(call_all()) == [f"call {n}" for n in range(CALLS)]
    assert token_requests(quiet_tier01) - before == TOKEN_REQUESTS


def test_lends_its_access_to_nobody(relay: tuple[str, str]) -> None:
    assert status_of("POST", relay[0]) == 401


def test_token_of_the_caller_is_not_for_the_other_server(
    quiet_tier01: Tier01, relay: tuple[str, str]
) -> None:
    async def call() -> None:
        async with Client(quiet_tier01.mcp_url, auth=relay[1]) as client:
            await client.ping()

    with pytest.raises(Exception, match="401"):
        asyncio.run(call())
