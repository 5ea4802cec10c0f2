"""The program tests/tier01/serve.py and its protected MCP server."""

import re
import signal
import socket
import subprocess
import time

import httpx
import psutil
import pytest
from fastmcp import Client
from fastmcp.exceptions import ToolError

from authserver_client import Credentials, status_of
from conftest import NewSandbox
from plain_agent import INITIALIZE
from sandbox import Sandbox, wait_until

ACCEPT = {"Accept": "application/json, text/event-stream"}


def initialize(url: str, token: str) -> httpx.Response:
    headers = ACCEPT | {"Authorization": f"Bearer {token}"}
    return httpx.post(url, json=INITIALIZE, headers=headers, trust_env=False)


def test_without_a_token(servers: Sandbox) -> None:
    metadata = servers.mcp_url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
    for method in ("GET", "POST"):
        response = httpx.request(method, servers.mcp_url, trust_env=False)
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{metadata}"'
    document = httpx.get(metadata, trust_env=False).json()
    assert document["resource"] == servers.mcp_url
    assert document["authorization_servers"] == [servers.issuer]
    assert document["scopes_supported"] == ["mcp:echo"]


def test_with_a_token(servers: Sandbox, credentials: Credentials) -> None:
    token = servers.authserver.token(credentials, resource=servers.mcp_url)
    assert initialize(servers.mcp_url, token).status_code == 200
    redirect = initialize(f"{servers.mcp_url}/", token)
    assert (redirect.status_code, redirect.headers["Location"]) == (307, servers.mcp_url)


def test_expired_token(sandbox: Sandbox) -> None:
    sandbox.serve(TOKEN_SECONDS="1")
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, f"tier 01: {sandbox.log}")
    sandbox.authserver.register_resource("demo-mcp", sandbox.mcp_url, "mcp:echo")
    token = sandbox.authserver.token(sandbox.authserver.register_client(), resource=sandbox.mcp_url)
    wait_until(lambda: initialize(sandbox.mcp_url, token).status_code == 401, "its end")
    challenge = initialize(sandbox.mcp_url, token).headers["WWW-Authenticate"]
    assert 'error="invalid_token"' in challenge


@pytest.mark.anyio
async def test_tool_needs_the_scope(servers: Sandbox) -> None:
    """A token for this resource is not enough: FastMCP hides the tool from one without a scope."""
    for scope, tools in {"mcp:echo": ["echo"], "mcp:other": []}.items():
        token = servers.authserver.token(
            servers.authserver.register_client(scope), resource=servers.mcp_url
        )
        async with Client(servers.mcp_url, auth=token) as client:
            assert [tool.name for tool in await client.list_tools()] == tools
            if not tools:
                with pytest.raises(ToolError):
                    await client.call_tool("echo", {"text": "hi"})


def start_waiting(sandbox: Sandbox) -> subprocess.Popen[str]:
    """Start the MCP server without an authorization server."""
    server = sandbox.serve("mcp-server")
    told = "waiting for the authorization server"
    wait_until(lambda: told in sandbox.log.read_text(), f"{told}: {sandbox.log}")
    return server


def assert_ends(server: subprocess.Popen[str], number: signal.Signals) -> None:
    server.send_signal(number)
    assert server.wait(1.5) == 0  # not by the default action, which process 1 hasn't


def test_waits_for_the_authorization_server(new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    authserver = new_sandbox(ports=sandbox.ports)
    mcp_server = start_waiting(sandbox)
    time.sleep(0.5)  # time for a second attempt
    assert len(sandbox.log.read_text().splitlines()) == 1
    server = authserver.serve("authserver")
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, "the MCP server")
    with socket.create_connection(("127.0.0.1", sandbox.ports[0])) as unfinished:
        unfinished.sendall(b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.2)  # time to begin with the request
        assert_ends(server, signal.SIGTERM)
    assert_ends(mcp_server, signal.SIGINT)
    assert "Traceback" not in sandbox.log.read_text() + authserver.log.read_text()


def test_ends_while_it_waits_and_does_not_read_dotenv(sandbox: Sandbox) -> None:
    (sandbox.clone / ".env").write_bytes(b"# caf\xe9\n")  # which can't be read as UTF-8
    assert_ends(start_waiting(sandbox), signal.SIGTERM)


def test_says_that_the_file_of_certificates_is_missing(sandbox: Sandbox) -> None:
    server = sandbox.serve("mcp-server", SSL_CERT_FILE="/nothing")
    assert server.wait(30) == 1
    [line] = sandbox.log.read_text().splitlines()
    assert line.startswith("mcp_server.py: SSL_CERT_FILE=/nothing: ")


def test_only_loopback_is_served(servers: Sandbox) -> None:
    server = psutil.Process(servers.started[0].pid)
    listening = {tuple(each.laddr) for each in server.net_connections() if each.status == "LISTEN"}
    assert listening == {("127.0.0.1", port) for port in servers.ports}


def test_never_claims_to_be_the_authserver(servers: Sandbox) -> None:
    metadata = httpx.get(
        f"{servers.issuer}/.well-known/oauth-authorization-server", trust_env=False
    )
    form = {"grant_type": "client_credentials"}
    rejected = httpx.post(f"{servers.issuer}/oauth/token", data=form, trust_env=False)
    assert rejected.headers["WWW-Authenticate"].startswith("Basic ")  # RFC 6749 section 5.2
    shown = [f"{response.headers}{response.text}" for response in (metadata, rejected)]
    started = re.findall("(?m)^.*, ready$", servers.log.read_text())
    assert "stand-in authorization server" in started[0]
    assert not re.search("(?i)authplane|authserver", "".join([*started, *shown]))
