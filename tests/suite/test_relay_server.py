"""The servers of the pages, run as programs: what callers see, and what the log says.

RELAY_PYTHON names a Python with another FastMCP than that of the tests.
"""

import asyncio
import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path
from textwrap import indent
from typing import NamedTuple

import psutil
import pytest
from fastmcp import Client

from authserver_client import ADMIN_KEY, Credentials, status_of
from fakes import Forward, Request, StartFake, http_response, proxy_to, respond_to
from pages import (
    EXAMPLES,
    README,
    RELAY_SERVER,
    WITHOUT_SDK,
    blocks,
    make_environment,
    section,
    table,
)
from sandbox import PYTHON, NewSandbox, Sandbox, free_ports, replace_once, wait_until

pytestmark = pytest.mark.anyio
RELAY_PYTHON = Path(os.environ.get("RELAY_PYTHON", PYTHON))
VERSION = "from importlib.metadata import version; print(version('fastmcp'))"
FASTMCP = subprocess.check_output([RELAY_PYTHON, "-c", VERSION], text=True).split(".")[0]
on_fastmcp_4 = pytest.mark.skipif(FASTMCP != "4", reason="this is for FastMCP 4: see .ci/sdk")

TWO_SECONDS = "FetchSettings(allow_http=True, allow_localhost=True, timeout=2)"


def with_short_timeouts(program: str) -> str:
    """Return the program with a time limit of 2 seconds for requests, and of 3 for calls."""
    program = replace_once(program, "authplane import ", "authplane import FetchSettings, ")
    program = replace_once(
        program, "auth=CREDENTIALS", f"auth=CREDENTIALS, fetch_settings={TWO_SECONDS}"
    )
    return replace_once(program, "timeout=10", "timeout=3")


ISSUER = 'environ["AUTHPLANE_ISSUER"]'
OTHER_URL = 'environ["OTHER_MCP_URL"]'
SHORT_TIMEOUTS = with_short_timeouts(RELAY_SERVER)
MASKED = "Error calling tool 'relay'"
ROWS = table(section(EXAMPLES, "When a call fails"))


def row(beginning: str) -> list[str]:
    """Return the cells of the row of the page's table whose first cell begins with this."""
    [cells] = [cells for cells in ROWS if cells[0].startswith(beginning)]
    return cells


def quoted(cell: str) -> list[str]:
    return re.findall("`([^`]*)`", cell)


def caller_sees(cells: list[str]) -> str:
    """Return the first line of what the caller sees, as the page has it."""
    return quoted(cells[2])[0] if quoted(cells[2]) else MASKED


def last_error(relay: Sandbox) -> str:
    """Return the text after the last traceback box of the log, in one line."""
    return " ".join(relay.log.read_text().split("╯")[-1].split())


def relay_settings(tier01: Sandbox, client: Credentials, port: int) -> dict[str, str]:
    """Return the settings of a server on this port that calls the MCP server of tier 01."""
    return tier01.settings | {
        "CLIENT_ID": client[0],
        "CLIENT_SECRET": client[1],
        "OTHER_MCP_URL": tier01.mcp_url,
        "OTHER_RESOURCE_URI": tier01.mcp_url,
        "PORT": str(port),
        "FASTMCP_CHECK_FOR_UPDATES": "off",
    }


def start(
    relay: Sandbox, tier01: Sandbox, program: str = RELAY_SERVER, client: Credentials | None = None
) -> subprocess.Popen[str]:
    """Start the program; return when it listens, or has ended."""
    client = client or tier01.authserver.register_client("mcp:echo mcp:other")
    settings = relay_settings(tier01, client, relay.ports[2])
    server = relay.start_logged(RELAY_PYTHON, "-c", program, **settings)
    wait_until(lambda: server.poll() is not None or status_of(relay.mcp_url), f"relay: {relay.log}")
    return server


async def call_tool(relay: Sandbox) -> str:
    """Call the tool; return the first line of what the caller sees."""
    async with Client(relay.mcp_url, timeout=60) as client:
        result = await client.call_tool("relay", {"text": "hello"}, raise_on_error=False)
    return getattr(result.content[0], "text", "").splitlines()[0]


def connections(server: subprocess.Popen[str], url: str) -> int:
    """Return how many connections to the URL the server has open."""
    port = int(re.findall(r":(\d+)", url)[0])
    found = psutil.Process(server.pid).net_connections()
    return sum(each.status == "ESTABLISHED" and each.raddr.port == port for each in found)


async def test_the_authorization_server_fails(new_sandbox: NewSandbox) -> None:
    """A cached token works, with the lines of Many calls, too. Without one, the circuit opens."""
    tier01, cached, uncached, uncached_when_down = (new_sandbox() for _ in range(4))
    authserver = tier01.serve("authserver")
    new_sandbox(ports=tier01.ports).serve("mcp-server")
    tier01.authserver.register_resource("demo-mcp", tier01.mcp_url, "mcp:echo")
    imported, created, argument = quoted(section(EXAMPLES, "Many calls"))
    many_calls = replace_once(SHORT_TIMEOUTS, "\nISSUER", f"\n{imported}\n{created}\nISSUER")
    argument = argument.removeprefix("Client(…, ").removesuffix(")")
    start(cached, tier01, replace_once(many_calls, "timeout=3", f"timeout=3, {argument}"))
    for relay in (uncached, uncached_when_down):
        start(relay, tier01, SHORT_TIMEOUTS)
    assert {await call_tool(cached) for _ in range(3)} == {"hello"}
    assert tier01.log.read_text().count('"POST /oauth/token') == 1

    authserver.send_signal(signal.SIGSTOP)
    assert await call_tool(cached) == "hello"
    silent = caller_sees(row("`ReadTimeout`"))
    assert await asyncio.gather(*[call_tool(uncached) for _ in range(5)]) == [silent] * 5
    assert last_error(uncached).startswith("ReadTimeout")
    assert await call_tool(uncached) == caller_sees(row("`CircuitOpenError`"))
    assert last_error(uncached).startswith("CircuitOpenError")

    authserver.kill()
    authserver.wait()
    down_row = row("`ConnectError`")
    assert (
        await asyncio.gather(*[call_tool(uncached_when_down) for _ in range(5)])
        == [caller_sees(down_row)] * 5
    )
    assert all(
        text in " ".join(uncached_when_down.log.read_text().split()) for text in quoted(down_row[0])
    )
    assert await call_tool(uncached_when_down) == MASKED
    assert last_error(uncached_when_down).startswith("CircuitOpenError")


async def test_the_authorization_server_is_overloaded(
    sandbox: Sandbox, servers: Sandbox, start_fake: StartFake
) -> None:
    fake = start_fake(lambda request: responses[request.path])
    metadata = {"issuer": fake.url, "token_endpoint": f"{fake.url}/token", "jwks_uri": fake.url}
    responses = {
        "/.well-known/oauth-authorization-server": http_response("200 OK", json.dumps(metadata)),
        "/": http_response("200 OK", '{"keys": []}'),
        "/token": http_response("503 Service Unavailable"),
    }
    start(sandbox, servers, replace_once(SHORT_TIMEOUTS, "(ISSUER", f'("{fake.url}"'))
    assert await call_tool(sandbox) == caller_sees(row("`ServerError`"))
    assert last_error(sandbox).startswith("ServerError")
    for _ in range(5):
        assert await call_tool(sandbox) == MASKED
    assert last_error(sandbox).startswith("CircuitOpenError")
    assert [request.path for request in fake.requests].count("/token") == 5


class Case(NamedTuple):
    """The beginning of a row of the page's table, and what is replaced to provoke it."""

    beginning: str
    old: str
    new: str


AUDIENCE_ROW = "FastMCP 3" if FASTMCP == "3" else "FastMCP 4"
CASES = {
    "client": Case("`InvalidClientError`", 'environ["CLIENT_SECRET"]', '"wrong"'),
    "resource": Case("`InvalidTargetError`", "[OTHER_RESOURCE]", '["http://a"]'),
    "scope": Case("`InvalidScopeError`", '["mcp:echo"]', '["mcp:a"]'),
    "audience": Case(AUDIENCE_ROW, "[OTHER_RESOURCE]", "[]"),
    "path": Case("`Not Found`", "(OTHER_URL", "(OTHER_URL + '/x'"),
    "other server": Case("`Client failed to connect: All", "(OTHER_URL", '("http://localhost:1"'),
}
NO_TRACEBACK = {
    "tool's scope": Case("The other server's tool needs", '["mcp:echo"]', '["mcp:other"]'),
    "tool's error": Case("The other server's tool failed", '{"text": text}', "{}"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_a_call_fails(sandbox: Sandbox, servers: Sandbox, case: Case) -> None:
    start(sandbox, servers, replace_once(SHORT_TIMEOUTS, case.old, case.new))
    cells = row(case.beginning)
    assert await call_tool(sandbox) == caller_sees(cells)
    assert any(text in last_error(sandbox) for text in quoted(cells[0])), last_error(sandbox)


@pytest.mark.parametrize("case", NO_TRACEBACK.values(), ids=NO_TRACEBACK)
async def test_a_call_fails_without_a_traceback(
    sandbox: Sandbox, servers: Sandbox, case: Case
) -> None:
    servers.authserver.register_resource("tool-scope", servers.mcp_url, "mcp:other")
    start(sandbox, servers, replace_once(SHORT_TIMEOUTS, case.old, case.new))
    [cells] = [cells for cells in ROWS if cells[1].startswith(case.beginning)]
    seen = await call_tool(sandbox)
    assert seen == (quoted(cells[2]) or ["1 validation error for call[echo]"])[0]
    assert "─ Traceback" not in sandbox.log.read_text()


async def test_the_other_server_does_not_respond(
    sandbox: Sandbox, servers: Sandbox, start_fake: StartFake
) -> None:
    """No connection is left."""
    fake = start_fake(proxy_to(servers.ports[2], respond_to(b"tools/call", None)))
    server = start(
        sandbox, servers, replace_once(SHORT_TIMEOUTS, "(OTHER_URL", f'("{fake.url}/mcp"')
    )
    cells = row("`timed out`")
    allowed, errors = {MASKED}, quoted(cells[0])[:1]
    if FASTMCP == "3":  # two time limits of the same length end at the same moment
        allowed, errors = {MASKED, caller_sees(cells)}, quoted(cells[0])
    seen = await asyncio.gather(*[call_tool(sandbox) for _ in range(4)])
    assert {*seen} <= allowed
    assert any(error in last_error(sandbox) for error in errors)
    wait_until(lambda: not connections(server, fake.url), "the end of all connections", 5)


@pytest.mark.parametrize(
    "case",
    [
        Case("`KeyError`", OTHER_URL, 'environ["MISSING"]'),
        Case("`MetadataFetchError`", "(ISSUER", '("http://localhost:1"'),
        Case("`MetadataFetchError`", "(ISSUER", '("SILENT"'),
    ],
)
def test_it_does_not_start(
    sandbox: Sandbox, servers: Sandbox, start_fake: StartFake, case: Case
) -> None:
    silent = start_fake(lambda _: None).url
    program = replace_once(SHORT_TIMEOUTS, case.old, case.new.replace("SILENT", silent))
    assert start(sandbox, servers, program).wait(10) != 0
    assert quoted(row(case.beginning)[0])[0] in sandbox.log.read_text()


def test_private_networks(sandbox: Sandbox, servers: Sandbox) -> None:
    """With the lines of the page, the SDK tries to connect. Nothing listens at this address."""
    [lines] = blocks(section(EXAMPLES, "Private networks and proxies"), "python")
    create = "    authplane = await AuthplaneClient.create(ISSUER, auth=CREDENTIALS)"
    allowed = replace_once(RELAY_SERVER, create, indent(lines.rstrip(), "    "))
    settings = relay_settings(servers, ("client", "secret"), sandbox.ports[2])
    settings |= {"AUTHPLANE_ISSUER": "https://127.0.0.1:1", "AUTHPLANE_DEV_MODE": ""}
    error = sandbox.run(RELAY_PYTHON, "-c", allowed, **settings).stderr
    assert "All connection attempts failed" in error  # and not: URL resolves to blocked IP


@on_fastmcp_4
def test_protect_your_server(servers: Sandbox, new_sandbox: NewSandbox) -> None:
    """The lines of the page, in the server and in one shell after steps 2 and 3 of the README."""
    sandbox = new_sandbox(ports=servers.ports)
    port = free_ports()[0]
    protect = section(EXAMPLES, "Protect your server")
    [lines] = blocks(protect, "python")
    [unprotected] = re.findall("(?m)^# anybody.*\nserver = .*\n", RELAY_SERVER)
    program = replace_once(RELAY_SERVER, unprotected, lines)
    program = program.replace("https://relay.example.com", f"http://localhost:{port}")
    (sandbox.project / "relay_server.py").write_text(program)
    make_environment(sandbox.project / "relay", RELAY_PYTHON)
    call_tool, clean_up = blocks(protect, "sh")
    without_token = blocks(section(README, "In your server"), "sh")[1].strip()
    script = [
        *blocks(section(README, "Step by step"), "sh")[1:3],
        "relay/bin/python relay_server.py >log 2>&1 &\n",
        "until curl -s -o /dev/null http://localhost:8081/mcp; do sleep 0.1; done\n",
        call_tool,
        f"{without_token} && exit 1\n",
        clean_up,
    ]
    settings = relay_settings(servers, ("", ""), port) | {
        "AUTHSERVER_URL": servers.issuer,
        "ADMIN_URL": servers.authserver.admin_url,
        "AUTHPLANE_ADMIN_API_KEY": ADMIN_KEY,
    }
    text = servers.with_ports("".join(script)).replace("8081", str(port))
    result = sandbox.run("bash", "-ec", text, **settings)
    assert "hello" in result.stdout, result
    assert result.returncode == 0, result
    assert "401 Unauthorized" in (sandbox.project / "log").read_text()
    assert not (sandbox.project / "caller.json").exists()


@on_fastmcp_4
async def test_the_provider_caches_the_token(sandbox: Sandbox, servers: Sandbox) -> None:
    tokens = servers.log.read_text().count('"POST /oauth/token')
    start(sandbox, servers, WITHOUT_SDK)
    assert [await call_tool(sandbox) for _ in range(2)] == ["hello"] * 2
    assert servers.log.read_text().count('"POST /oauth/token') == tokens + 1


@on_fastmcp_4
async def test_calls_with_the_provider_do_not_wait_for_each_other(
    sandbox: Sandbox, new_sandbox: NewSandbox, servers: Sandbox, start_fake: StartFake
) -> None:
    """The other server responds after a second, so 4 calls in a row would take too long."""

    def slow(request: Request, forward: Forward) -> bytes:
        if b"tools/call" in request.body:
            time.sleep(1)
        if f"{request.method} {request.path}" == "GET /mcp":  # a stream that doesn't end
            return http_response("405 Method Not Allowed")
        return forward(request)

    other = new_sandbox()
    url = start_fake(proxy_to(other.ports[2], slow)).url + "/mcp"
    servers.authserver.register_resource("slow", url, "mcp:echo")
    other.serve("mcp-server", AUTHPLANE_ISSUER=servers.issuer, RESOURCE_URI=url)
    program = replace_once(WITHOUT_SDK, OTHER_URL, f'"{url}"')
    start(sandbox, servers, replace_once(program, "timeout=10", "timeout=3"))
    assert await asyncio.gather(*[call_tool(sandbox) for _ in range(4)]) == ["hello"] * 4


PROVIDER_CASES = {
    "variable": Case("`KeyError", 'environ["CLIENT_ID"]', 'environ["MISSING"]'),
    "client": Case("`Token exchange failed (401)", 'environ["CLIENT_SECRET"]', '"wrong"'),
    "scope": Case("`Token exchange failed (400)", '["mcp:echo"]', '["mcp:a"]'),
    "issuer": Case("`metadata issuer", ISSUER, f'{ISSUER}.replace("localhost", "127.0.0.1")'),
    "uri": Case("`Protected", OTHER_URL, f'{OTHER_URL}.replace("localhost", "127.0.0.1")'),
    "other server": Case("`All connection", OTHER_URL, '"http://localhost:1/mcp"'),
}


@on_fastmcp_4
@pytest.mark.parametrize("case", PROVIDER_CASES.values(), ids=PROVIDER_CASES)
async def test_a_call_with_the_provider_fails(
    sandbox: Sandbox, servers: Sandbox, case: Case
) -> None:
    start(sandbox, servers, replace_once(WITHOUT_SDK, case.old, case.new))
    assert await call_tool(sandbox) == MASKED
    assert_provider_failed(sandbox, case.beginning)


def assert_provider_failed(relay: Sandbox, beginning: str) -> None:
    """Check that the last error in the log is that of this row of the page."""
    without_sdk = section(EXAMPLES, "Without the SDK")
    [cells] = [cells for cells in table(without_sdk) if cells[0].startswith(beginning)]
    parts = map(re.escape, quoted(cells[0])[0].split("…"))
    assert re.search(".*".join(parts), last_error(relay))
