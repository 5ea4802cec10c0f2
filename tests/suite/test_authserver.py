"""What the example relies on in an authorization server, the stand-in or a real authserver."""

import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from conftest import REAL_IMAGE, need_image
from machine import ADMIN_KEY, Machine, status_of, wait_until

METADATA = "/.well-known/oauth-authorization-server"
KEYS = "/.well-known/jwks.json"
URI = "http://localhost:8080/contract"

type Credentials = tuple[str, str]


@dataclass(frozen=True)
class Authserver:
    """An authorization server: its issuer, and an HTTP client of each listener."""

    issuer: str
    public: httpx.Client
    admin: httpx.Client


@pytest.fixture(scope="session", params=["stand-in", REAL_IMAGE])
def authserver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Authserver]:
    """The stand-in, and the authserver if the engine of this machine has its image."""
    image = "" if request.param == "stand-in" else need_image(request)
    machine = Machine(tmp_path_factory.mktemp("authserver"), *["docker"] * bool(image))
    headers = {"Authorization": f"Bearer {ADMIN_KEY}"}
    try:
        if image:
            run_container(machine, image)
        else:
            machine.serve("authserver")
        wait_until(lambda: status_of("GET", machine.issuer + METADATA) == 200, request.param)
        with (
            httpx.Client(base_url=machine.issuer, trust_env=False) as public,
            httpx.Client(
                base_url=f"{machine.admin_url}/admin", headers=headers, trust_env=False
            ) as admin,
        ):
            yield Authserver(machine.issuer, public, admin)
    finally:
        machine.close()


def run_container(machine: Machine, image: str) -> None:
    """Run an authserver as its image starts by itself, at the machine's ports."""
    settings = {
        "AUTHPLANE_SERVER_ISSUER": machine.issuer,
        "AUTHPLANE_SERVER_ADDRESS": "0.0.0.0:9000",
        "AUTHPLANE_ADMIN_ADDRESS": "0.0.0.0:9001",
        "AUTHPLANE_ADMIN_API_KEY": ADMIN_KEY,
        "AUTHPLANE_CLIENT_CREDENTIALS_ENABLED": "true",
    }
    options = [f"--env={name}={value}" for name, value in settings.items()]
    options += [
        f"--publish=127.0.0.1:{port}:{9000 + n}" for n, port in enumerate(machine.ports[:2])
    ]
    machine.docker("run", "--detach", "--rm", "--name", machine.name, *options, image)


def unique() -> str:
    return f"test-{uuid.uuid4()}"


def create_resource(authserver: Authserver, slug: str, uri: str) -> httpx.Response:
    scopes = [{"name": "mcp:echo", "description": "echo tool"}]
    kind = {"backend_kind": "mint", "display_name": "Test"}
    return authserver.admin.post(
        "resources", json={"slug": slug, "uri": uri, "scopes": scopes} | kind
    )


def create_client(authserver: Authserver, name: str) -> Credentials:
    """Register a client of the scope `mcp:echo`; return its id and secret."""
    method = {"token_endpoint_auth_method": "client_secret_basic"}
    client = {"client_name": name, "grant_types": ["client_credentials"], "scope": "mcp:echo"}
    response = authserver.admin.post("clients", json=client | method)
    assert response.status_code == 201
    return response.json()["client_id"], response.json()["client_secret"]


def delete_client(authserver: Authserver, client_id: str, query: str = "") -> int:
    """Return the status of the response."""
    return authserver.admin.delete(f"clients/{client_id}{query}").status_code


def request_token(authserver: Authserver, client: Credentials, **form: str) -> httpx.Response:
    data = {"grant_type": "client_credentials"} | form
    return authserver.public.post("/oauth/token", auth=client, data=data)


def verified_claims(authserver: Authserver, response: httpx.Response) -> dict[str, Any]:
    """Return the claims of the access token, whose signature and header are as they should be."""
    assert response.status_code == 200
    keys = KeySet.import_key_set(authserver.public.get(KEYS).json())
    token = jwt.decode(response.json()["access_token"], keys, algorithms=["ES256"])
    assert token.header["kid"] in {key.kid for key in keys}
    return token.claims


def assert_rejected(response: httpx.Response, status: int, *errors: str) -> None:
    assert response.status_code == status
    assert response.json()["error"] in errors
    assert response.json()["error_description"]


@pytest.fixture(scope="session")
def client(authserver: Authserver) -> Credentials:
    """A client that may request `mcp:echo`, and a resource, URI, that it may request it for."""
    assert create_resource(authserver, unique(), URI).status_code == 201
    return create_client(authserver, unique())


def test_metadata(authserver: Authserver) -> None:
    response = authserver.public.get(METADATA)
    assert response.status_code == 200
    metadata, issuer = response.json(), authserver.issuer
    urls = {"token_endpoint": f"{issuer}/oauth/token", "jwks_uri": f"{issuer}{KEYS}"}
    assert metadata == metadata | urls | {"issuer": issuer}


def test_key_set_has_public_keys_only(authserver: Authserver) -> None:
    response = authserver.public.get(KEYS)
    assert response.status_code == 200
    assert not any("d" in key for key in response.json()["keys"])


def test_access_token(authserver: Authserver, client: Credentials) -> None:
    response = request_token(authserver, client, resource=URI, scope="mcp:echo")
    claims, body = verified_claims(authserver, response), response.json()
    expected = {"iss": authserver.issuer, "aud": [URI], "scope": "mcp:echo"}
    assert claims == claims | expected | {"sub": client[0], "client_id": client[0]}
    assert claims["exp"] - claims["iat"] == body["expires_in"] > 0
    assert body["token_type"] == "Bearer"
    assert response.headers["Cache-Control"] == "no-store"


def test_audience_without_resource(authserver: Authserver, client: Credentials) -> None:
    claims = verified_claims(authserver, request_token(authserver, client))
    assert claims["aud"] == [authserver.issuer]


@pytest.mark.parametrize("wrong", [("A", ""), ("", "A")], ids=["client id", "secret"])
def test_wrong_credentials_are_rejected(
    authserver: Authserver, client: Credentials, wrong: tuple[str, str]
) -> None:
    sent = client[0] + wrong[0], client[1] + wrong[1]
    assert_rejected(request_token(authserver, sent, resource=URI), 401, "invalid_client")


@pytest.mark.parametrize("scope", ["mcp:other", "mcp:echo mcp:other"])
def test_other_scope_is_rejected(authserver: Authserver, client: Credentials, scope: str) -> None:
    response = request_token(authserver, client, resource=URI, scope=scope)
    assert_rejected(response, 400, "invalid_scope")


@pytest.mark.parametrize(
    "uri", [f"{URI}/", URI.replace("8080", "8081"), URI.replace("localhost", "127.0.0.1")]
)
def test_other_resource_is_rejected(authserver: Authserver, client: Credentials, uri: str) -> None:
    response = request_token(authserver, client, resource=uri)
    assert_rejected(response, 400, "invalid_target", "invalid_scope")  # the latter before 0.2.2


def test_other_grant_type_is_rejected(authserver: Authserver, client: Credentials) -> None:
    response = request_token(authserver, client, resource=URI, grant_type="password")
    assert_rejected(response, 400, "unsupported_grant_type")


@pytest.mark.parametrize("key", ["", "Bearer wrong-admin-key-0123456789"])
@pytest.mark.parametrize(
    "call",
    [
        "POST resources",
        "GET resources?slug=test",
        "PATCH resources/test",
        "POST clients",
        "GET clients",
        "DELETE clients/test?force=true",
    ],
)
def test_admin_key_is_required(authserver: Authserver, call: str, key: str) -> None:
    request = authserver.admin.build_request(*call.split(), json={})
    del request.headers["Authorization"]
    request.headers.update({"Authorization": key} if key else {})
    assert authserver.admin.send(request).status_code == 401


def test_resource(authserver: Authserver) -> None:
    slug, uris = unique(), ["http://localhost:8080/mcp", "http://localhost:8081/mcp"]

    def members(response: httpx.Response, status: int = 200) -> list[Any]:
        assert response.status_code == status
        view = response.json()
        return [view["slug"], view["uri"], *(scope["name"] for scope in view["scopes"])]

    assert authserver.admin.get(f"resources?slug={slug}").status_code == 404
    created = create_resource(authserver, slug, uris[0])
    assert members(created, 201) == [slug, uris[0], "mcp:echo"]
    assert create_resource(authserver, slug, uris[1]).status_code == 409
    path, scopes = f"resources/{created.json()['id']}", [{"name": "mcp:new", "description": ""}]
    changed = authserver.admin.patch(path, json={"uri": uris[1]})
    assert members(changed) == [slug, uris[1], "mcp:echo"]
    changed = authserver.admin.patch(path, json={"scopes": scopes})
    assert members(changed) == [slug, uris[1], "mcp:new"]
    assert members(authserver.admin.get(f"resources?slug={slug}")) == [slug, uris[1], "mcp:new"]


def test_clients_of_one_name(authserver: Authserver) -> None:
    name = unique()
    older, newer = create_client(authserver, name), create_client(authserver, name)
    assert all(re.fullmatch("[A-Za-z0-9_-]+", value) for value in older + newer)
    listed = authserver.admin.get("clients").json()
    assert [each["id"] for each in listed if each["name"] == name] == [newer[0], older[0]]


def test_deleting_a_client_with_a_live_token(authserver: Authserver) -> None:
    deleted = create_client(authserver, unique())
    assert request_token(authserver, deleted).status_code == 200
    assert delete_client(authserver, deleted[0]) == 409
    assert request_token(authserver, deleted).status_code == 200
    assert delete_client(authserver, deleted[0], "?force=true") == 204
    assert_rejected(request_token(authserver, deleted), 401, "invalid_client")
