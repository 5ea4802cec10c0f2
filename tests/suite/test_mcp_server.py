"""The program tests/tier01/serve.py and its protected MCP server."""

import re
import signal
import socket
import subprocess
import time

import httpx
import pytest
from fastmcp import Client
from fastmcp.exceptions import ToolError

from conftest import NewMachine
from machine import Machine, status_of, wait_until
from plain_agent import INITIALIZE

ACCEPT = {"Accept": "application/json, text/event-stream"}


def request(method: str, url: str, headers: dict[str, str] = ACCEPT) -> httpx.Response:
    return httpx.request(method, url, json=INITIALIZE, headers=headers, trust_env=False)


def test_without_a_token(tier01: Machine) -> None:
    metadata = tier01.mcp_url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
    for method in ("GET", "POST"):
        response = request(method, tier01.mcp_url)
        assert response.status_code == 401
        assert response.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{metadata}"'
    document = request("GET", metadata).json()
    assert document["resource"] == tier01.mcp_url
    assert document["authorization_servers"] == [tier01.issuer]
    assert document["scopes_supported"] == ["mcp:echo"]


@pytest.mark.parametrize(
    ("status", "path", "headers"),
    [
        (200, "/mcp", ACCEPT | {"Host": "mcp-server:8080"}),
        (421, "/mcp", ACCEPT | {"Host": "evil.example"}),
        (406, "/mcp", {}),
        (307, "/mcp/", ACCEPT),
    ],
)
def test_with_a_token(
    tier01: Machine,
    credentials: tuple[str, str],
    status: int,
    path: str,
    headers: dict[str, str],
) -> None:
    token = tier01.token(credentials, resource=tier01.mcp_url)
    url = tier01.mcp_url.replace("/mcp", path)
    response = request("POST", url, headers | {"Authorization": f"Bearer {token}"})
    assert response.status_code == status
    assert response.headers.get("Location", tier01.mcp_url) == tier01.mcp_url


@pytest.mark.anyio
async def test_tool_needs_the_scope(tier01: Machine) -> None:
    """A token for this resource is not enough: FastMCP hides the tool from the other client."""
    for scope, tools in {"mcp:echo": ["echo"], "mcp:other": []}.items():
        token = tier01.token(tier01.register_client(scope), resource=tier01.mcp_url)
        async with Client(tier01.mcp_url, auth=token) as client:
            assert [tool.name for tool in await client.list_tools()] == tools
            if not tools:
                with pytest.raises(ToolError):
                    await client.call_tool("echo", {"text": "hi"})


def says(machine: Machine, text: str) -> None:
    wait_until(lambda: text in machine.log.read_text(), f"{text!r} in {machine.log}")


def assert_ends(server: subprocess.Popen[str], number: signal.Signals) -> None:
    server.send_signal(number)
    assert server.wait(1.5) == 0  # not by the default action, which process 1 hasn't


def test_waits_for_the_authorization_server(new_machine: NewMachine) -> None:
    machine = new_machine()
    authserver = new_machine(ports=machine.ports)
    mcp_server = machine.serve("mcp-server")
    says(machine, "waiting for the authorization server")
    time.sleep(0.5)  # time for a second attempt
    assert len(machine.log.read_text().splitlines()) == 1
    server = authserver.serve("authserver")
    wait_until(lambda: status_of("POST", machine.mcp_url) == 401, "the MCP server")
    with socket.create_connection(("127.0.0.1", machine.ports[0])) as unfinished:
        unfinished.sendall(b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.2)  # time to begin with the request
        assert_ends(server, signal.SIGTERM)
    assert_ends(mcp_server, signal.SIGINT)
    assert "Traceback" not in machine.log.read_text() + authserver.log.read_text()


def test_sigterm_ends_it_while_it_waits(machine: Machine) -> None:
    server = machine.serve("mcp-server")
    says(machine, "waiting for the authorization server")
    assert_ends(server, signal.SIGTERM)


def test_without_an_admin_key_all_requests_are_rejected(machine: Machine) -> None:
    machine.serve("authserver", AUTHPLANE_ADMIN_API_KEY="")
    says(machine, "ready on")
    for headers in ({}, {"Authorization": "Bearer"}):
        assert request("GET", f"{machine.admin_url}/admin/clients", headers).status_code == 401


def test_only_loopback_is_served(tier01: Machine) -> None:
    [server] = [each for each in tier01.processes() if "serve.py" in " ".join(each.cmdline())]
    listening = [each.laddr for each in server.net_connections() if each.status == "LISTEN"]
    assert {tuple(address) for address in listening} == {
        ("127.0.0.1", port) for port in tier01.ports
    }


def test_never_claims_to_be_the_authserver(tier01: Machine) -> None:
    metadata = request("GET", f"{tier01.issuer}/.well-known/oauth-authorization-server")
    form = {"grant_type": "client_credentials"}
    rejected = httpx.post(f"{tier01.issuer}/oauth/token", data=form, trust_env=False)
    shown = [f"{response.headers}{response.text}" for response in (metadata, rejected)]
    ready = re.findall("(?m)^.* ready on .*$", tier01.log.read_text())
    assert "stand-in authorization server" in ready[0]
    assert not re.search("(?i)authplane|authserver", "".join([*ready, *shown]))
