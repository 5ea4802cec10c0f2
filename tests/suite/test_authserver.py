"""What the example relies on in an authorization server, the stand-in or a real authserver."""

import re
import uuid
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from authserver_client import ADMIN_KEY, PLAIN, Authserver, Credentials, status_of
from conftest import authserver_image
from sandbox import Sandbox, wait_until

METADATA = "/.well-known/oauth-authorization-server"
KEYS = "/.well-known/jwks.json"
URI = "http://localhost:8080/contract"
CALLS = [("POST", "resources"), ("POST", "clients"), ("DELETE", "clients/a")]


@pytest.fixture(scope="module", params=["stand-in", "authserver"])
def authserver(request: pytest.FixtureRequest) -> Authserver:
    """The stand-in, and the authserver if this engine has its image."""
    if request.param == "stand-in":
        sandbox = request.getfixturevalue("servers")
    else:
        sandbox = request.getfixturevalue("engine")
        run_container(sandbox, authserver_image(sandbox))
        wait_until(lambda: status_of("GET", sandbox.issuer + METADATA) == 200, "the authserver")
    sandbox.authserver.register_resource("contract", URI, "mcp:echo")
    return sandbox.authserver


def run_container(sandbox: Sandbox, image: str) -> None:
    """Run an authserver as its image starts by itself, at the sandbox's ports."""
    options = [
        f"--env=AUTHPLANE_SERVER_ISSUER={sandbox.issuer}",
        "--env=AUTHPLANE_SERVER_ADDRESS=0.0.0.0:9000",
        "--env=AUTHPLANE_ADMIN_ADDRESS=0.0.0.0:9001",
        f"--env=AUTHPLANE_ADMIN_API_KEY={ADMIN_KEY}",
        "--env=AUTHPLANE_CLIENT_CREDENTIALS_ENABLED=true",
        f"--publish=127.0.0.1:{sandbox.ports[0]}:9000",
        f"--publish=127.0.0.1:{sandbox.ports[1]}:9001",
    ]
    sandbox.docker("run", "--detach", "--rm", "--name", sandbox.name, *options, image)


@pytest.fixture(scope="module")
def client(authserver: Authserver) -> Credentials:
    """A client with two scopes, of which the resource URI declares the first."""
    return authserver.register_client("mcp:echo mcp:undeclared")


def get(authserver: Authserver, path: str) -> Any:
    return httpx.get(authserver.url + path, **PLAIN).json()


def verified_claims(authserver: Authserver, response: httpx.Response) -> dict[str, Any]:
    """Return the claims of the access token, signed by one of the published keys."""
    keys = KeySet.import_key_set(get(authserver, KEYS))
    token = jwt.decode(response.json()["access_token"], keys, algorithms=["ES256"])
    assert token.header["kid"] in {key.kid for key in keys}
    return token.claims


def test_metadata_and_keys(authserver: Authserver) -> None:
    metadata, issuer = get(authserver, METADATA), authserver.url
    urls = {"token_endpoint": f"{issuer}/oauth/token", "jwks_uri": f"{issuer}{KEYS}"}
    assert metadata.items() >= (urls | {"issuer": issuer}).items()
    for key in get(authserver, KEYS)["keys"]:
        assert "d" not in key  # the private part


def test_access_token(authserver: Authserver, client: Credentials) -> None:
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
    ("form", "expected", "older"),  # older: what an older authserver may do instead
    [
        ({"grant_type": "password"}, (400, "unsupported_grant_type"), None),
        ({"id": "wrong"}, (401, "invalid_client"), None),
        ({"secret": "wrong"}, (401, "invalid_client"), None),
        ({"scope": "mcp:echo mcp:other"}, (400, "invalid_scope"), None),
        ({"scope": "mcp:undeclared"}, (400, "invalid_scope"), (200, None)),  # 0.1.1
        ({"resource": f"{URI}/"}, (400, "invalid_target"), (400, "invalid_scope")),  # 0.2.1
    ],
)
def test_token_request_is_rejected(
    authserver: Authserver,
    servers: Sandbox,
    client: Credentials,
    form: dict[str, str],
    expected: object,
    older: object,
) -> None:
    sent = {"id": client[0], "secret": client[1], "resource": URI} | form
    credentials = sent.pop("id"), sent.pop("secret")
    response = authserver.request_token(credentials, **sent)
    body = response.json()
    result = (response.status_code, body.get("error"))
    is_stand_in = authserver == servers.authserver
    assert result == expected or (result == older and not is_stand_in)
    assert result[0] == 200 or body["error_description"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-admin-key-0123456789"}])
@pytest.mark.parametrize(("method", "path"), CALLS)
def test_admin_key_is_required(
    authserver: Authserver, headers: dict[str, str], method: str, path: str
) -> None:
    assert authserver.admin(method, path, headers=headers).status_code == 401


def test_resource(authserver: Authserver) -> None:
    slug = f"test-{uuid.uuid4()}"
    assert authserver.register_resource(slug, f"{URI}/1", "mcp:echo").status_code == 201
    assert authserver.register_resource(slug, f"{URI}/1", "mcp:echo").status_code == 409


def test_client(authserver: Authserver) -> None:
    client, newer = authserver.register_client(), authserver.register_client()  # of one name
    assert authserver.clients()[:2] == [newer[0], client[0]]
    assert authserver.admin("GET", "clients").json()[0]["name"] == "test"
    assert all(re.fullmatch("[A-Za-z0-9_-]+", value) for value in client)
    assert authserver.request_token(client).status_code == 200
    path = f"clients/{client[0]}"
    assert authserver.admin("DELETE", path).status_code == 409  # it has a live token
    assert authserver.request_token(client).status_code == 200
    assert authserver.admin("DELETE", f"{path}?force=true").status_code == 204
    assert authserver.request_token(client).status_code == 401
    assert client[0] not in authserver.clients()
