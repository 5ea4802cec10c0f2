"""What a server needs: one token for many calls, a new one in time, and errors that say enough."""

import asyncio
import signal
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import httpx2
import pytest
from authplane import (
    ASCredentials,
    AuthplaneClient,
    CircuitOpenError,
    InvalidClientError,
    InvalidScopeError,
)
from fastmcp import Client

from authserver_client import PLAIN, Credentials, status_of
from conftest import StartFake
from fakes import http_response
from plain_agent import INITIALIZE
from sandbox import PYTHON, ROOT, Sandbox, wait_until
from test_mcp_server import serve_all

pytestmark = pytest.mark.anyio
CALLS = 100
HEADERS = {"Accept": "application/json, text/event-stream"}
LIBRARIES = pytest.mark.parametrize("library", [httpx, httpx2])


def token_requests(servers: Sandbox, status: int = 200) -> int:
    return servers.log.read_text().count(f'"POST /oauth/token HTTP/1.1" {status}')


def resource_auth(client: AuthplaneClient, resource: str, library: Any) -> Any:
    """Return a ResourceAuth; README.md says to change its import for another library."""
    source = (ROOT / "tests/examples/resource_auth.py").read_text()
    source = source.replace("from httpx import", f"from {library.__name__} import")
    names: dict[str, Any] = {}
    exec(source, names)  # noqa: S102
    return names["ResourceAuth"](client, ["mcp:echo"], resource)


@asynccontextmanager
async def calling(
    servers: Sandbox,
    credentials: Credentials,
    resource: str = "",
    library: Any = httpx,
    **options: Any,
) -> AsyncGenerator[Callable[[], Awaitable[int]]]:
    """Yield a function that calls the MCP server with ResourceAuth, and returns the status."""
    auth = ASCredentials(*credentials)
    client = await AuthplaneClient.create(servers.issuer, auth=auth, dev_mode=True, **options)
    token = resource_auth(client, resource or servers.mcp_url, library)
    async with library.AsyncClient(auth=token, headers=HEADERS, **PLAIN) as caller:

        async def call() -> int:
            return (await caller.post(servers.mcp_url, json=INITIALIZE)).status_code

        yield call
    await client.aclose()


@LIBRARIES
async def test_concurrent_calls_cost_one_token_request(
    servers: Sandbox, credentials: Credentials, library: Any
) -> None:
    before = token_requests(servers)
    async with calling(servers, credentials, library=library) as call:
        statuses = await asyncio.gather(*(call() for _ in range(CALLS)))
    assert set(statuses) == {200}
    assert token_requests(servers) - before == 1


@LIBRARIES
def test_a_synchronous_client_sends_nothing(fake: StartFake, library: Any) -> None:
    server = fake(lambda _: http_response("200 OK"))
    auth = resource_auth(AuthplaneClient(), server.url, library)
    with library.Client(auth=auth, **PLAIN) as caller, pytest.raises(RuntimeError):
        caller.get(server.url)
    assert server.requests == []


async def test_tokens_expire_and_then_the_errors(sandbox: Sandbox) -> None:
    """The client is deleted, and then the servers end."""
    serve_all(sandbox, token_seconds=2)
    credentials = sandbox.authserver.register_client()
    calls = calling(sandbox, credentials, cache_ttl_buffer_seconds=1)
    async with asyncio.timeout(20), calls as call:
        while token_requests(sandbox) < 3:
            assert await call() == 200
        sandbox.authserver.delete_client(credentials[0])
        assert await call() == 200  # with the token that it still has
        await asyncio.sleep(1.1)
        with pytest.raises(InvalidClientError):
            await call()
        assert token_requests(sandbox, 401) == 1
        [servers] = sandbox.started
        servers.kill()
        servers.wait()
        for _ in range(5):
            with pytest.raises(httpx.RequestError):
                await call()
        with pytest.raises(CircuitOpenError):
            await call()


async def test_only_the_scopes_that_are_named_are_requested(servers: Sandbox) -> None:
    async with calling(servers, servers.authserver.register_client("mcp:other")) as call:
        with pytest.raises(InvalidScopeError):
            await call()


async def test_401_reaches_the_caller(servers: Sandbox, credentials: Credentials) -> None:
    resource = "http://other.example/mcp"
    servers.authserver.register_resource("other", resource, "mcp:echo")
    before = token_requests(servers)
    async with calling(servers, credentials, resource) as call:
        assert await call() == 401
    assert token_requests(servers) - before == 1


def start_relay(sandbox: Sandbox, servers: Sandbox, settings: dict[str, str]) -> None:
    """Start relay_server.py at the sandbox's port; at the end it says that its client is closed."""
    program = sandbox.clone / "tests/examples/relay_server.py"
    close = "await protection.aclose()"
    program.write_text(program.read_text().replace(close, f'{close}; print("closed", flush=True)'))
    port = sandbox.ports[2]
    own = {"AUTHPLANE_BASE_URL": f"http://localhost:{port}", "PORT": str(port)}
    sandbox.popen([PYTHON, program], settings | own, sandbox.log)
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, f"relay: {sandbox.log}")
    servers.authserver.register_resource(sandbox.name, sandbox.mcp_url, "mcp:relay")


def relay_client(sandbox: Sandbox, servers: Sandbox, scope: str) -> Client[Any]:
    """Return a client of the relay server, with a token of this scope."""
    client = servers.authserver.register_client(scope)
    return Client(sandbox.mcp_url, auth=servers.authserver.token(client, resource=sandbox.mcp_url))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_relay_server(
    sandbox: Sandbox, servers: Sandbox, agent_settings: dict[str, str], number: signal.Signals
) -> None:
    """Its tool calls tier 01 with a token of its own; at the end it closes its client."""
    start_relay(sandbox, servers, agent_settings)
    async with relay_client(sandbox, servers, "mcp:other") as client:
        assert await client.list_tools() == []
    async with relay_client(sandbox, servers, "mcp:relay") as client:
        assert (await client.call_tool("relay", {"text": "hi"})).data == "hi"
        [relay] = sandbox.started
        relay.send_signal(number)
        await asyncio.to_thread(relay.wait, 20)
    log = sandbox.log.read_text()
    assert "closed\n" in log
    assert "KeyboardInterrupt" not in log


async def test_relay_server_shows_no_addresses_and_has_a_time_limit(
    sandbox: Sandbox, servers: Sandbox, agent_settings: dict[str, str], fake: StartFake
) -> None:
    responses = [http_response("401 Unauthorized")]  # and then none
    other = fake(lambda _: responses.pop() if responses else None)
    program = sandbox.clone / "tests/examples/relay_server.py"
    program.write_text(program.read_text().replace("timeout=15", "timeout=1"))
    start_relay(sandbox, servers, agent_settings | {"MCP_URL": other.url})
    async with relay_client(sandbox, servers, "mcp:relay") as client, asyncio.timeout(15):
        for _ in ("rejected", "no response"):
            result = await client.call_tool("relay", {"text": ""}, raise_on_error=False)
            assert result.is_error
            assert "localhost" not in str(result.content)
