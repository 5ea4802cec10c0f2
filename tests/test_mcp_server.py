"""The protected MCP server of tests/tier01, as the contract has observed tier 01's."""

import time
from pathlib import Path

import httpx
import pytest

from conftest import KEY, Tier01, free_ports, program, status_of, wait_until

BODY = {
    "jsonrpc": "2.0",
    "id": 1,
    "method": "initialize",
    "params": {
        "protocolVersion": "2025-11-25",
        "capabilities": {},
        "clientInfo": {"name": "test", "version": "0"},
    },
}
ACCEPT = {"Accept": "application/json, text/event-stream"}


@pytest.fixture
def bearer(tier01: Tier01, credentials: tuple[str, str]) -> dict[str, str]:
    token = tier01.token(credentials, resource=tier01.mcp_url).json()["access_token"]
    return {"Authorization": f"Bearer {token}"}


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_no_token(tier01: Tier01, method: str) -> None:
    answer = httpx.request(method, tier01.mcp_url, headers=ACCEPT, trust_env=False)
    metadata = tier01.mcp_url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == f'Bearer resource_metadata="{metadata}"'


def test_protected_resource_metadata(tier01: Tier01) -> None:
    url = tier01.mcp_url.replace("/mcp", "/.well-known/oauth-protected-resource/mcp")
    document = httpx.get(url, trust_env=False).json()
    assert document["resource"] == tier01.mcp_url
    assert document["authorization_servers"] == [tier01.issuer]
    assert document["scopes_supported"] == ["mcp:echo"]


def test_good_token(tier01: Tier01, bearer: dict[str, str]) -> None:
    answer = httpx.post(tier01.mcp_url, json=BODY, headers=ACCEPT | bearer, trust_env=False)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == "text/event-stream"
    assert answer.headers["mcp-session-id"]
    assert '"name":"demo-server"' in answer.text


def test_accept_that_names_no_stream(tier01: Tier01, bearer: dict[str, str]) -> None:
    assert httpx.post(tier01.mcp_url, json=BODY, headers=bearer, trust_env=False).status_code == 406


def test_slash_at_the_end(tier01: Tier01, bearer: dict[str, str]) -> None:
    answer = httpx.post(f"{tier01.mcp_url}/", json=BODY, headers=ACCEPT | bearer, trust_env=False)
    assert (answer.status_code, answer.headers["location"]) == (307, tier01.mcp_url)


@pytest.mark.parametrize(("host", "status"), [("mcp-server:8080", 200), ("evil.example", 421)])
def test_names_that_it_is_called_by(
    tier01: Tier01, bearer: dict[str, str], host: str, status: int
) -> None:
    headers = ACCEPT | bearer | {"Host": host}
    answer = httpx.post(tier01.mcp_url, json=BODY, headers=headers, trust_env=False)
    assert answer.status_code == status


def test_waits_for_the_authorization_server_and_ends_at_once(tmp_path: Path) -> None:
    public, admin, mcp = free_ports(3)
    issuer, url = f"http://localhost:{public}", f"http://localhost:{mcp}/mcp"
    settings = {
        "AUTHPLANE_SERVER_ISSUER": issuer,
        "AUTHPLANE_SERVER_ADDRESS": f":{public}",
        "AUTHPLANE_ADMIN_ADDRESS": f":{admin}",
        "AUTHPLANE_ADMIN_API_KEY": KEY,
        "AUTHPLANE_ISSUER": issuer,
        "AUTHPLANE_BASE_URL": url.removesuffix("/mcp"),
        "PORT": str(mcp),
    }
    log = tmp_path / "mcp_server.log"
    with program("mcp_server.py", log, **settings) as server:
        waiting = f"waiting for the authorization server {issuer}"
        wait_until(lambda: waiting in log.read_text(), "a word that it waits")
        assert status_of("POST", url) == 0
        with program("authserver.py", tmp_path / "authserver.log", **settings):
            wait_until(lambda: status_of("POST", url) == 401, "the MCP server")
            ended = time.monotonic()
            server.terminate()
            server.wait(5)
            assert time.monotonic() - ended < 1.5
