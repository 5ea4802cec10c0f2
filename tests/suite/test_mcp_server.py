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

from authserver_client import PLAIN, status_of
from conftest import NewSandbox
from sandbox import Sandbox, wait_until


def serve_all(sandbox: Sandbox, token_seconds: int) -> None:
    """Start both servers, whose tokens expire after these seconds; register the resource."""
    sandbox.serve(TOKEN_SECONDS=str(token_seconds))
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, f"tier 01: {sandbox.log}")
    sandbox.authserver.register_resource("demo-mcp", sandbox.mcp_url, "mcp:echo")


def test_without_a_token(servers: Sandbox) -> None:
    metadata = servers.mcp_url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
    response = httpx.post(servers.mcp_url, **PLAIN)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{metadata}"'
    document = httpx.get(metadata, **PLAIN).json()
    assert document["resource"] == servers.mcp_url
    assert document["authorization_servers"] == [servers.issuer]
    assert document["scopes_supported"] == ["mcp:echo"]


@pytest.mark.anyio
async def test_tool_needs_the_scope(servers: Sandbox) -> None:
    """A token for this resource is not enough: FastMCP hides the tool from one without a scope."""
    for scope, tools in {"mcp:echo": ["echo"], "mcp:other": []}.items():
        client = servers.authserver.register_client(scope)
        token = servers.authserver.token(client, resource=servers.mcp_url)
        async with Client(servers.mcp_url, auth=token) as mcp:
            assert [tool.name for tool in await mcp.list_tools()] == tools


def test_expired_token(sandbox: Sandbox) -> None:
    serve_all(sandbox, token_seconds=1)
    token = sandbox.authserver.token(sandbox.authserver.register_client(), resource=sandbox.mcp_url)
    time.sleep(2)
    headers = {"Authorization": f"Bearer {token}"}
    response = httpx.post(sandbox.mcp_url, headers=headers, **PLAIN)
    assert response.status_code == 401
    assert 'error="invalid_token"' in response.headers["WWW-Authenticate"]


def assert_ends(server: subprocess.Popen[str], number: signal.Signals) -> None:
    server.send_signal(number)
    assert server.wait(1.5) == 0  # a handler has ended it: process 1 has no default action


def test_waits_for_the_authorization_server_and_ends_at_a_signal(new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    authserver = new_sandbox(ports=sandbox.ports)
    (sandbox.clone / ".env").write_bytes(b"# caf\xe9\n")  # FastMCP would read it, as UTF-8
    mcp_server = sandbox.serve("mcp-server")
    waiting = f"waiting for the authorization server {sandbox.issuer}: "
    wait_until(lambda: waiting in sandbox.log.read_text(), f"{waiting}{sandbox.log}")
    time.sleep(0.5)  # time for a second attempt
    assert len(sandbox.log.read_text().splitlines()) == 1
    server = authserver.serve("authserver")
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, "the MCP server")
    with socket.create_connection(("127.0.0.1", sandbox.ports[0])) as unfinished:
        unfinished.sendall(b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.2)  # time to begin with the request
        assert_ends(server, signal.SIGTERM)
    assert_ends(mcp_server, signal.SIGINT)


def test_only_loopback_is_served(servers: Sandbox) -> None:
    server = psutil.Process(servers.started[0].pid)
    listening = {tuple(each.laddr) for each in server.net_connections() if each.status == "LISTEN"}
    assert listening == {("127.0.0.1", port) for port in servers.ports}


def test_never_claims_to_be_the_authserver(servers: Sandbox) -> None:
    metadata = httpx.get(f"{servers.issuer}/.well-known/oauth-authorization-server", **PLAIN)
    rejected = servers.authserver.request_token(("wrong", "wrong"))
    assert rejected.headers["WWW-Authenticate"].startswith("Basic ")  # RFC 6749 section 5.2
    shown = [f"{response.headers}{response.text}" for response in (metadata, rejected)]
    started = re.findall("(?m)^.*, ready$", servers.log.read_text())
    assert "stand-in authorization server" in started[0]
    assert not re.search("(?i)authplane|authserver", "".join([*started, *shown]))
