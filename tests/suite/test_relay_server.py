"""The server in README.md, run as a program: what its caller sees, and what its log says."""

import asyncio
import os
import re
import signal
from typing import NamedTuple

import pytest
from fastmcp import Client

from authserver_client import status_of
from conftest import NewSandbox, StartFake
from sandbox import PYTHON, ROOT, Sandbox, wait_until

pytestmark = pytest.mark.anyio
PROGRAM = (ROOT / "tests/examples/relay_server.py").read_text()
TWO_SECONDS = "FetchSettings(allow_http=True, allow_localhost=True, timeout=2)"
HASTY = (
    PROGRAM.replace("authplane import ", "authplane import FetchSettings, ")
    .replace("auth=CREDENTIALS", f"auth=CREDENTIALS, fetch_settings={TWO_SECONDS}")
    .replace("timeout=15", "timeout=5")
)
FAILED = "Error calling tool 'relay'"
TIMED_OUT = "Upstream request timed out, please retry"


def start(relay: Sandbox, tier01: Sandbox, program: str) -> bool:
    """Start the program with a new client; return True when it listens, False if it ends."""
    client_id, secret = tier01.authserver.register_client("mcp:echo mcp:other")
    settings = tier01.settings | {
        "CLIENT_ID": client_id,
        "CLIENT_SECRET": secret,
        "OTHER_MCP_URL": tier01.mcp_url,
        "OTHER_RESOURCE_URI": tier01.mcp_url,
        "PORT": str(relay.ports[2]),
        "FASTMCP_CHECK_FOR_UPDATES": "off",
    }
    python = os.environ.get("RELAY_PYTHON", PYTHON)  # that of another FastMCP
    server = relay.start_logged(python, "-c", program, **settings)
    wait_until(lambda: server.poll() or status_of(relay.mcp_url), f"relay: {relay.log}")
    return server.poll() is None


async def call_tool(relay: Sandbox) -> str:
    """Call the tool; return the first line of what the caller sees."""
    async with Client(relay.mcp_url, timeout=60) as client:
        result = await client.call_tool("relay", {"text": "hello"}, raise_on_error=False)
    return getattr(result.content[0], "text", "").splitlines()[0]


async def test_a_new_token_after_expiry(sandbox: Sandbox, new_sandbox: NewSandbox) -> None:
    tier01 = new_sandbox()
    servers = tier01.serve(TOKEN_SECONDS="31")  # the SDK doesn't use a token in its last 30 seconds
    tier01.authserver.register_resource("demo-mcp", tier01.mcp_url, "mcp:echo")
    start(sandbox, tier01, PROGRAM)
    for _ in range(2):
        assert await call_tool(sandbox) == "hello"
        await asyncio.sleep(1.1)
    assert tier01.log.read_text().count('"POST /oauth/token') == 2
    tier01.authserver.delete_client(tier01.authserver.clients()[0])
    assert await call_tool(sandbox) == FAILED
    assert "InvalidClientError" in sandbox.log.read_text()
    servers.kill()
    assert await call_tool(sandbox) == FAILED
    assert "client_credentials: request failed" in sandbox.log.read_text()


async def test_the_authorization_server_becomes_silent(new_sandbox: NewSandbox) -> None:
    tier01, cached, uncached = new_sandbox(), new_sandbox(), new_sandbox()
    authserver = tier01.serve("authserver")
    new_sandbox(ports=tier01.ports).serve("mcp-server")
    tier01.authserver.register_resource("demo-mcp", tier01.mcp_url, "mcp:echo")
    start(cached, tier01, PROGRAM)
    start(uncached, tier01, HASTY)
    assert {await call_tool(cached) for _ in range(21)} == {"hello"}
    assert tier01.log.read_text().count('"POST /oauth/token') == 1
    authserver.send_signal(signal.SIGSTOP)
    assert await call_tool(cached) == "hello"
    assert await asyncio.gather(*[call_tool(uncached) for _ in range(5)]) == [TIMED_OUT] * 5
    assert await call_tool(uncached) == FAILED
    assert "CircuitOpenError" in uncached.log.read_text()


class Case(NamedTuple):
    """What is replaced in the program, what the caller sees if it starts, what the log has."""

    old: str
    new: str
    seen: str
    log: str


CASES = {
    "no server": Case("(ISSUER", '("http://localhost:1"', "", "MetadataFetchError: .* failed"),
    "no response": Case("(ISSUER", '("SILENT"', "", "MetadataFetchError: Failed to fetch .*: \n"),
    "resource": Case("[OTHER_RESOURCE]", '["http://a"]', FAILED, "InvalidTargetError"),
    "scope": Case("mcp:echo", "mcp:a", FAILED, "InvalidScopeError"),
    "audience": Case("[OTHER_RESOURCE]", "[]", FAILED, "401 Unauthorized|an error response"),
    "tool's scope": Case("mcp:echo", "mcp:other", "Unknown tool: 'echo'", FAILED),
    "tool's error": Case('{"text": text}', "{}", "1 validation error for call[echo]", FAILED),
    "other server": Case("(OTHER_URL", '("http://localhost:1"', FAILED, "failed to connect"),
    "silence": Case("(OTHER_URL", '("SILENT"', FAILED, "'relay' execution timed out"),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
async def test_failures(
    sandbox: Sandbox, servers: Sandbox, start_fake: StartFake, case: Case
) -> None:
    servers.authserver.register_resource("other", servers.mcp_url, "mcp:other")
    program = HASTY.replace(case.old, case.new).replace("SILENT", start_fake(lambda _: None).url)
    seen = ""
    if start(sandbox, servers, program):
        seen = await call_tool(sandbox)
    assert seen == case.seen
    assert re.search(case.log, sandbox.log.read_text())
