"""The program tests/tier01/serve.py and its protected MCP server."""

import re
import signal
import socket
import subprocess
import time

import httpx
import pytest

from conftest import NewMachine
from machine import Machine, status_of, wait_until

CLIENT_INFO = {"name": "test", "version": "0"}
PARAMS = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": CLIENT_INFO}
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": PARAMS}
ACCEPT = {"Accept": "application/json, text/event-stream"}


def request(method: str, url: str, headers: dict[str, str] = ACCEPT) -> httpx.Response:
    return httpx.request(method, url, json=INITIALIZE, headers=headers, trust_env=False)


@pytest.fixture
def token(tier01: Machine, credentials: tuple[str, str]) -> dict[str, str]:
    """The header with an access token for the MCP server of tier 01."""
    return {"Authorization": f"Bearer {tier01.token(credentials, resource=tier01.mcp_url)}"}


@pytest.fixture
def url(tier01: Machine) -> str:
    return tier01.mcp_url


def says(machine: Machine, text: str) -> None:
    wait_until(lambda: text in machine.log.read_text(), f"{text!r} in {machine.log}")


def assert_ends(server: subprocess.Popen[str], number: signal.Signals) -> None:
    server.send_signal(number)
    assert server.wait(1.5) == 0  # not by the default action, which process 1 hasn't


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_token(url: str, method: str) -> None:
    response = request(method, url)
    metadata = url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == f'Bearer resource_metadata="{metadata}"'


def test_protected_resource_metadata(tier01: Machine, url: str) -> None:
    metadata = url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
    document = request("GET", metadata).json()
    assert document["resource"] == url
    assert document["authorization_servers"] == [tier01.issuer]
    assert document["scopes_supported"] == ["mcp:echo"]


def test_token_is_accepted(url: str, token: dict[str, str]) -> None:
    response = request("POST", url, ACCEPT | token)
    assert response.status_code == 200
    assert '"name":"demo-server"' in response.text


def test_accept_without_event_stream(url: str, token: dict[str, str]) -> None:
    assert request("POST", url, token).status_code == 406


def test_trailing_slash(url: str, token: dict[str, str]) -> None:
    response = request("POST", f"{url}/", ACCEPT | token)
    assert (response.status_code, response.headers["Location"]) == (307, url)


@pytest.mark.parametrize(("host", "status"), [("mcp-server:8080", 200), ("evil.example", 421)])
def test_host(url: str, token: dict[str, str], host: str, status: int) -> None:
    assert request("POST", url, ACCEPT | token | {"Host": host}).status_code == status


def test_waits_for_the_authorization_server(new_machine: NewMachine) -> None:
    machine = new_machine()
    log = machine.folder / "mcp-server.log"
    settings = {"AUTHPLANE_DEV_MODE": "true"}
    program = [machine.python, "tests/tier01/serve.py", "mcp-server"]
    servers = [machine.popen(program, settings, log=log) for _ in "1"]
    wait_until(lambda: "waiting for the authorization server" in log.read_text(), "a first line")
    time.sleep(0.5)  # time for a second attempt
    assert len(log.read_text().splitlines()) == 1
    servers.append(machine.serve("authserver"))
    wait_until(lambda: status_of("POST", machine.mcp_url) == 401, "the MCP server")
    with socket.create_connection(("127.0.0.1", machine.ports[0])) as unfinished:
        unfinished.sendall(b"POST /oauth/token HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\n")
        time.sleep(0.2)  # time to begin with the request
        assert_ends(servers[1], signal.SIGTERM)
    assert_ends(servers[0], signal.SIGINT)
    assert "Traceback" not in log.read_text() + machine.log.read_text()


def test_sigterm_ends_it_while_it_waits(machine: Machine) -> None:
    server = machine.serve("mcp-server")
    says(machine, "waiting for the authorization server")
    assert_ends(server, signal.SIGTERM)


def test_without_an_admin_key_all_requests_are_rejected(machine: Machine) -> None:
    machine.serve("authserver", AUTHPLANE_ADMIN_API_KEY="")
    says(machine, "ready on")
    for headers in ({}, {"Authorization": "Bearer"}):
        assert request("GET", f"{machine.admin_url}/admin/clients", headers).status_code == 401


def test_port_in_use(machine: Machine) -> None:
    port = machine.ports[2]
    with socket.create_server(("127.0.0.1", port)):
        assert machine.serve().wait(10) == 1
    [line] = machine.log.read_text().splitlines()
    assert line.endswith(f"can't listen on :{port}: Address already in use")


def test_only_loopback_is_served(tier01: Machine) -> None:
    [server] = [each for each in tier01.processes() if "serve.py" in " ".join(each.cmdline())]
    listening = [each.laddr for each in server.net_connections() if each.status == "LISTEN"]
    assert {(address.ip, address.port) for address in listening} == {
        ("127.0.0.1", port) for port in tier01.ports
    }


def test_never_claims_to_be_the_authserver(tier01: Machine) -> None:
    metadata = request("GET", f"{tier01.issuer}/.well-known/oauth-authorization-server")
    rejected = request("POST", f"{tier01.issuer}/oauth/token")
    shown = [f"{response.headers}{response.text}" for response in (metadata, rejected)]
    ready = re.findall("(?m)^.* ready on .*$", tier01.log.read_text())
    assert "stand-in authorization server" in ready[0]
    assert not re.search("(?i)authplane|authserver", "".join([*ready, *shown]))
