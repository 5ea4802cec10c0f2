"""The server in README.md, run as a program: what its caller sees, and what its log says."""

import asyncio
import os
import re
import signal

import pytest
from fastmcp import Client

from authserver_client import status_of
from conftest import NewSandbox, StartFake
from sandbox import PYTHON, ROOT, Sandbox, wait_until
from test_mcp_server import serve_all

PROGRAM = (ROOT / "tests/examples/relay_server.py").read_text()
SHORT = "fetch_settings=FetchSettings(allow_http=True, allow_localhost=True, timeout=2)"
IMPORT = PROGRAM.replace("import AS", "import FetchSettings, AS").replace("=15)", "=5)")
HASTY = IMPORT.replace("auth=CREDENTIALS", f"auth=CREDENTIALS, {SHORT}")
FAILED, TIMED_OUT = "Error calling tool 'relay'", "Upstream request timed out, please retry"
pytestmark = pytest.mark.anyio


def start(relay: Sandbox, tier01: Sandbox, program: str) -> bool:
    """Start the program with a new client; return True when it listens, False if it ends."""
    client_id, secret = tier01.authserver.register_client("mcp:echo mcp:other")
    settings = tier01.settings | {"CLIENT_ID": client_id, "CLIENT_SECRET": secret}
    settings |= {"OTHER_MCP_URL": tier01.mcp_url, "OTHER_RESOURCE_URI": tier01.mcp_url}
    settings |= {"PORT": str(relay.ports[2]), "FASTMCP_CHECK_FOR_UPDATES": "off"}
    server = relay.start_logged(os.environ.get("RELAY_PYTHON", PYTHON), "-c", program, **settings)
    wait_until(lambda: server.poll() or status_of("GET", relay.mcp_url), f"relay: {relay.log}")
    return server.poll() is None


async def call(relay: Sandbox) -> str:
    """Call the tool; return the first line of what the caller sees."""
    async with Client(relay.mcp_url, timeout=60) as client:
        result = await client.call_tool("relay", {"text": "hello"}, raise_on_error=False)
    return getattr(result.content[0], "text", "").splitlines()[0]


async def test_a_new_token_after_expiry(new_sandbox: NewSandbox) -> None:
    relay, tier01 = new_sandbox(), new_sandbox()
    serve_all(tier01, token_seconds=31)  # the SDK doesn't use a token in its last 30 seconds
    start(relay, tier01, PROGRAM)
    for _ in range(2):
        assert await call(relay) == "hello"
        await asyncio.sleep(1.1)
    assert tier01.log.read_text().count('"POST /oauth/token') == 2
    tier01.authserver.delete_client(tier01.authserver.clients()[0])
    assert await call(relay) == FAILED
    assert "InvalidClientError" in relay.log.read_text()


async def test_the_authorization_server_becomes_silent(new_sandbox: NewSandbox) -> None:
    tier01, cached, uncached = new_sandbox(), new_sandbox(), new_sandbox()
    authserver = serve_all(tier01, token_seconds=3600)
    start(cached, tier01, PROGRAM)
    start(uncached, tier01, HASTY)
    assert {await call(cached) for _ in range(21)} == {"hello"}
    assert tier01.log.read_text().count('"POST /oauth/token') == 1
    authserver.send_signal(signal.SIGSTOP)
    assert await call(cached) == "hello"
    assert await asyncio.gather(*[call(uncached) for _ in range(4)]) == [TIMED_OUT] * 4
    assert [await call(uncached), await call(uncached)] == [TIMED_OUT, FAILED]
    assert "CircuitOpenError" in uncached.log.read_text()


CASES = {  # what is replaced in the program; what the caller sees if it starts; what the log has
    "no server": ("(ISSUER", '("http://localhost:1"', "", "MetadataFetchError: .* attempts failed"),
    "no response": ("(ISSUER", '("SILENT"', "", "MetadataFetchError: Failed to fetch metadata: \n"),
    "other issuer": ('ISSUER"]', 'ISSUER"] + "/"', "", "MetadataFetchError: .* issuer mismatch"),
    "http": (SHORT, "dev_mode=False", "", "MetadataFetchError: .* must use HTTPS, got: http"),
    "resource": ("[OTHER_RESOURCE]", '["http://a"]', FAILED, "InvalidTargetError"),
    "scope": ("mcp:echo", "mcp:a", FAILED, "InvalidScopeError"),
    "audience": ("[OTHER_RESOURCE]", "[]", FAILED, "401 Unauthorized|Server returned an error"),
    "tool's scope": ("mcp:echo", "mcp:other", "Unknown tool: 'echo'", FAILED),
    "tool's error": ('{"text": text}', "{}", "1 validation error for call[echo]", FAILED),
    "silence": ("(OTHER_URL", '("SILENT"', FAILED, "execution timed out after 5"),
}


@pytest.mark.parametrize(("old", "new", "seen", "log"), CASES.values(), ids=CASES)
async def test_failures(
    sandbox: Sandbox, servers: Sandbox, fake: StartFake, old: str, new: str, seen: str, log: str
) -> None:
    servers.authserver.register_resource("other", servers.mcp_url, "mcp:other")
    program = HASTY.replace(old, new).replace("SILENT", fake(lambda _: None).url)
    assert (await call(sandbox) if start(sandbox, servers, program) else "") == seen
    assert re.search(log, sandbox.log.read_text())
