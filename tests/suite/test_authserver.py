"""What the example relies on in an authorization server, the stand-in or a real authserver."""

import re
import uuid
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from authserver_client import DIRECT, AuthserverClient, Credentials, status_of
from sandbox import COMPOSE_TIER01, wait_until

METADATA_PATH = "/.well-known/oauth-authorization-server"
KEYS_PATH = "/.well-known/jwks.json"
URI = "http://localhost:8080/contract"


@pytest.fixture(scope="module", params=["stand-in", "authserver"])
def authserver(request: pytest.FixtureRequest) -> AuthserverClient:
    """The stand-in, and the authserver if Docker has its image."""
    if request.param == "stand-in":
        sandbox = request.getfixturevalue("servers")
    else:
        request.getfixturevalue("authserver_image")
        sandbox = request.getfixturevalue("docker_sandbox")
        issuer = f"--env=AUTHPLANE_SERVER_ISSUER={sandbox.issuer}"
        sandbox.docker(*COMPOSE_TIER01, "run", "--detach", "--service-ports", issuer, "authserver")
        wait_until(lambda: status_of(sandbox.issuer + METADATA_PATH) == 200, "the authserver")
    sandbox.authserver.register_resource("contract", URI, "mcp:echo")
    return sandbox.authserver


@pytest.fixture(scope="module")
def client(authserver: AuthserverClient) -> Credentials:
    """A client with two scopes, of which the resource URI declares the first."""
    return authserver.register_client("mcp:echo mcp:undeclared")


def get(authserver: AuthserverClient, path: str) -> Any:
    return httpx.get(authserver.url + path, **DIRECT).json()


def verified_claims(authserver: AuthserverClient, response: httpx.Response) -> dict[str, Any]:
    """Return the claims of the access token, signed by one of the published keys."""
    keys = KeySet.import_key_set(get(authserver, KEYS_PATH))
    token = jwt.decode(response.json()["access_token"], keys, algorithms=["ES256"])
    assert token.header["kid"] in {key.kid for key in keys}
    return token.claims


def test_metadata_and_keys(authserver: AuthserverClient) -> None:
    issuer = authserver.url
    expected = {
        "issuer": issuer,
        "authorization_endpoint": f"{issuer}/oauth/authorize",
        "token_endpoint": f"{issuer}/oauth/token",
        "jwks_uri": issuer + KEYS_PATH,
    }
    assert get(authserver, METADATA_PATH).items() >= expected.items()
    for key in get(authserver, KEYS_PATH)["keys"]:
        assert "d" not in key  # the private part


def test_access_token(authserver: AuthserverClient, client: Credentials) -> None:
    response = authserver.request_token(client, resource=URI, scope="mcp:echo")
    claims, body = verified_claims(authserver, response), response.json()
    expected = {"iss": authserver.url, "aud": [URI], "scope": "mcp:echo"}
    assert claims.items() >= (expected | {"sub": client[0], "client_id": client[0]}).items()
    assert claims["exp"] - claims["iat"] == body["expires_in"] > 0
    assert body["token_type"] == "Bearer"
    assert response.headers["Cache-Control"] == "no-store"
    without_resource = verified_claims(authserver, authserver.request_token(client))
    assert without_resource["aud"] == [authserver.url]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"grant_type": "password"}, ["400 unsupported_grant_type"]),
        ({"id": "wrong"}, ["401 invalid_client"]),
        ({"secret": "wrong"}, ["401 invalid_client"]),
        ({"scope": "mcp:echo mcp:other"}, ["400 invalid_scope"]),
        # authserver 0.1.1 issues it
        ({"scope": "mcp:undeclared"}, ["400 invalid_scope", "200 None"]),
        # authserver 0.2.1 and older have the other code
        ({"resource": f"{URI}/"}, ["400 invalid_target", "400 invalid_scope"]),
    ],
)
def test_token_request_is_rejected(
    authserver: AuthserverClient, client: Credentials, change: dict[str, str], expected: list[str]
) -> None:
    """The stand-in must give the first response. An authserver may give any of them."""
    form = {"id": client[0], "secret": client[1], "resource": URI} | change
    response = authserver.request_token((form.pop("id"), form.pop("secret")), **form)
    body = response.json()
    if "stand_in" in get(authserver, METADATA_PATH):
        expected = expected[:1]
    assert f"{response.status_code} {body.get('error')}" in expected
    assert response.is_success or body["error_description"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-admin-key-0123456789"}])
def test_admin_key_is_required(authserver: AuthserverClient, headers: dict[str, str]) -> None:
    for request in ("POST resources", "GET clients", "POST clients", "DELETE clients/a"):
        assert authserver.admin(*request.split(), headers=headers).status_code == 401


def test_malformed_credentials_are_rejected(authserver: AuthserverClient) -> None:
    form = {"grant_type": "client_credentials"}
    url, basic = f"{authserver.url}/oauth/token", {"Authorization": "Basic a"}
    assert httpx.post(url, headers=basic, data=form, **DIRECT).status_code == 401


def test_resource(authserver: AuthserverClient) -> None:
    slug = f"test-{uuid.uuid4()}"
    assert authserver.register_resource(slug, f"{URI}/1", "mcp:echo").status_code == 201
    assert authserver.register_resource(slug, f"{URI}/1", "mcp:echo").status_code == 409
    invalid = authserver.register_resource(f"{slug}-2", "not-a-uri", "mcp:echo")
    assert invalid.is_error
    assert invalid.json()["detail"]


def test_client(authserver: AuthserverClient) -> None:
    client, newer = authserver.register_client(), authserver.register_client()  # of one name
    assert authserver.clients()[:2] == [newer[0], client[0]]
    assert all(re.fullmatch("[A-Za-z0-9_-]+", value) for value in client)
    assert authserver.request_token(client).status_code == 200
    path = f"clients/{client[0]}"
    assert authserver.admin("DELETE", path).status_code == 409  # it has a live token
    assert authserver.admin("DELETE", f"{path}?force=true").status_code == 204
    assert authserver.request_token(client).status_code == 401
