"""What the example relies on in an authorization server, the stand-in or a real authserver."""

import re
import uuid
from collections.abc import Iterator
from contextlib import closing
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from authserver_client import ADMIN_KEY, Authserver, Credentials, status_of
from conftest import authserver_image
from sandbox import Sandbox, wait_until

METADATA = "/.well-known/oauth-authorization-server"
KEYS = "/.well-known/jwks.json"
URI = "http://localhost:8080/contract"


@pytest.fixture(scope="module", params=["stand-in", "authserver"])
def sandbox(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Sandbox]:
    """A sandbox with the stand-in, and one with the authserver if this engine has its image."""
    folder = tmp_path_factory.mktemp("authserver")
    image = ""
    if request.param == "authserver":
        image = authserver_image(request.getfixturevalue("engine"))
    with closing(Sandbox(folder, *["docker"] if image else [])) as sandbox:
        if image:
            run_container(sandbox, image)
        else:
            sandbox.serve("authserver")
        wait_until(lambda: status_of("GET", sandbox.issuer + METADATA) == 200, request.param)
        sandbox.authserver.register_resource(f"contract-{uuid.uuid4()}", URI, "mcp:echo")
        yield sandbox


@pytest.fixture(scope="module")
def authserver(sandbox: Sandbox) -> Authserver:
    return sandbox.authserver


@pytest.fixture(scope="module")
def is_stand_in(sandbox: Sandbox) -> bool:
    return "docker" not in sandbox.tools


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
    response = httpx.get(authserver.url + path, trust_env=False)
    assert response.status_code == 200
    return response.json()


def verified_claims(authserver: Authserver, response: httpx.Response) -> dict[str, Any]:
    """Return the claims of the access token, signed by one of the published keys."""
    assert response.status_code == 200
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


def test_undeclared_scope(authserver: Authserver, client: Credentials, is_stand_in: bool) -> None:
    """The client has it, but the resource doesn't declare it; 0.1.1 issues it."""
    response = authserver.request_token(client, resource=URI, scope="mcp:undeclared")
    if is_stand_in or response.status_code != 200:
        assert (response.status_code, response.json()["error"]) == (400, "invalid_scope")
    if is_stand_in:  # without a scope: all, or those that the resource declares
        everything = authserver.request_token(client)
        assert everything.json()["scope"] == "mcp:echo mcp:undeclared"
        declared = authserver.request_token(client, resource=URI)
        assert declared.json()["scope"] == "mcp:echo"


@pytest.mark.parametrize(
    ("error", "form"),
    [
        ("unsupported_grant_type", {"grant_type": "password"}),
        ("invalid_client", {"id": "wrong"}),
        ("invalid_client", {"secret": "wrong"}),
        ("invalid_scope", {"scope": "mcp:other"}),
        ("invalid_scope", {"scope": "mcp:echo mcp:other"}),
        ("invalid_target", {"resource": f"{URI}/"}),
        ("invalid_target", {"resource": URI.replace("localhost", "127.0.0.1")}),
    ],
)
def test_token_request_is_rejected(
    authserver: Authserver,
    client: Credentials,
    is_stand_in: bool,
    error: str,
    form: dict[str, str],
) -> None:
    sent = {"id": client[0], "secret": client[1], "resource": URI} | form
    response = authserver.request_token((sent.pop("id"), sent.pop("secret")), **sent)
    assert response.status_code == (401 if error == "invalid_client" else 400)
    body = response.json()
    assert body["error_description"]
    if error == "invalid_target" and body["error"] == "invalid_scope":
        assert not is_stand_in  # but 0.2.1 and older
    else:
        assert body["error"] == error


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong-admin-key-0123456789"}])
def test_admin_key_is_required(authserver: Authserver, headers: dict[str, str]) -> None:
    for method, path in [
        ("GET", "resources?slug=test"),
        ("POST", "resources"),
        ("GET", "clients"),
        ("POST", "clients"),
        ("DELETE", "clients/test?force=true"),
    ]:
        url = f"{authserver.admin_url}/admin/{path}"
        response = httpx.request(method, url, json={}, headers=headers, trust_env=False)
        assert response.status_code == 401, path


def test_resource(authserver: Authserver) -> None:
    slug, uri = f"test-{uuid.uuid4()}", f"{URI}/1"
    resource = {"slug": slug, "uri": uri, "backend_kind": "mint", "display_name": "Test"}
    resource |= {"scopes": [{"name": "mcp:echo", "description": "echo tool"}]}
    assert authserver.admin("GET", f"resources?slug={slug}").status_code == 404
    created = authserver.admin("POST", "resources", json=resource)
    assert created.status_code == 201
    assert authserver.admin("POST", "resources", json=resource).status_code == 409
    read = authserver.admin("GET", f"resources?slug={slug}")
    for view in (created.json(), read.json()):
        assert (view["slug"], view["uri"], view["id"]) == (slug, uri, created.json()["id"])
        assert [scope["name"] for scope in view["scopes"]] == ["mcp:echo"]


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
