"""What the example relies on in an authorization server, the stand-in or a real authserver."""

import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

# The fixture: begin


@dataclass(frozen=True)
class Authserver:
    """An authorization server: its issuer and a client of each listener, admin with the key."""

    issuer: str
    public: httpx.Client
    admin: httpx.Client


@pytest.fixture(scope="session")
def authserver() -> Iterator[Authserver]:
    """The stand-in."""
    program = Path(__file__).parents[1] / "tier01/serve.py"
    settings = {
        "AUTHPLANE_SERVER_ISSUER": "http://issuer.example:9000",
        "AUTHPLANE_SERVER_ADDRESS": ":0",
        "AUTHPLANE_ADMIN_ADDRESS": ":0",
        "AUTHPLANE_ADMIN_API_KEY": "test-admin-key-0123456789",
    }
    with subprocess.Popen(
        [sys.executable, program, "authserver"], env=settings, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout
        ports = re.findall(r":(\d+)\b", process.stdout.readline().partition("ready on")[2])
        public, admin = (f"http://127.0.0.1:{port}" for port in ports)
        key = {"Authorization": f"Bearer {settings['AUTHPLANE_ADMIN_API_KEY']}"}
        with (
            httpx.Client(base_url=public, trust_env=False) as public_client,
            httpx.Client(base_url=f"{admin}/admin", headers=key, trust_env=False) as admin_client,
        ):
            yield Authserver(settings["AUTHPLANE_SERVER_ISSUER"], public_client, admin_client)
        process.terminate()


# The fixture: end

URI = f"http://localhost:8080/{uuid.uuid4()}"
type Credentials = tuple[str, str]


def unique() -> str:
    return f"test-{uuid.uuid4()}"


def create_resource(authserver: Authserver, slug: str, uri: str) -> httpx.Response:
    scopes = [{"name": "mcp:echo", "description": "echo tool"}]
    body = {"slug": slug, "uri": uri, "display_name": "Test", "scopes": scopes}
    return authserver.admin.post("resources", json=body | {"backend_kind": "mint"})


def create_client(authserver: Authserver, name: str) -> Credentials:
    """Register a client of the scope `mcp:echo`; return its id and secret."""
    body = {
        "client_name": name,
        "grant_types": ["client_credentials"],
        "token_endpoint_auth_method": "client_secret_basic",
        "scope": "mcp:echo",
    }
    response = authserver.admin.post("clients", json=body)
    assert response.status_code == 201
    return response.json()["client_id"], response.json()["client_secret"]


def request_token(authserver: Authserver, credentials: Credentials, **form: str) -> httpx.Response:
    data = {"grant_type": "client_credentials"} | form
    return authserver.public.post("/oauth/token", auth=credentials, data=data)


def claims(authserver: Authserver, response: httpx.Response) -> dict[str, Any]:
    """Return the claims of the issued token; its signature, `alg` and `kid` are checked."""
    assert response.status_code == 200
    keys = KeySet.import_key_set(authserver.public.get("/.well-known/jwks.json").json())
    token = jwt.decode(response.json()["access_token"], keys, algorithms=["ES256"])
    assert token.header["kid"] in {key.kid for key in keys}
    return token.claims


def delete_client(authserver: Authserver, client_id: str, **query: str) -> int:
    return authserver.admin.delete(f"clients/{client_id}", params=query).status_code


@pytest.fixture(scope="session")
def credentials(authserver: Authserver) -> Credentials:
    """A client that may request `mcp:echo`; the resource URI is registered."""
    assert create_resource(authserver, unique(), URI).status_code == 201
    return create_client(authserver, unique())


def test_metadata(authserver: Authserver) -> None:
    response = authserver.public.get("/.well-known/oauth-authorization-server")
    assert response.status_code == 200
    expected = {
        "issuer": authserver.issuer,
        "token_endpoint": f"{authserver.issuer}/oauth/token",
        "jwks_uri": f"{authserver.issuer}/.well-known/jwks.json",
    }
    assert response.json() | expected == response.json()


def test_key_set_is_public(authserver: Authserver) -> None:
    response = authserver.public.get("/.well-known/jwks.json")
    assert response.status_code == 200
    assert not any("d" in key for key in response.json()["keys"])


def test_access_token(authserver: Authserver, credentials: Credentials) -> None:
    response = request_token(authserver, credentials, resource=URI, scope="mcp:echo")
    token = claims(authserver, response)
    expected = {
        "iss": authserver.issuer,
        "sub": credentials[0],
        "client_id": credentials[0],
        "aud": [URI],
        "scope": "mcp:echo",
    }
    assert token | expected == token
    assert token["exp"] - token["iat"] == response.json()["expires_in"] > 0
    assert response.json()["token_type"] == "Bearer"
    assert response.headers["Cache-Control"] == "no-store"


def test_without_resource_the_audience_is_the_issuer(
    authserver: Authserver, credentials: Credentials
) -> None:
    response = request_token(authserver, credentials, scope="mcp:echo")
    assert claims(authserver, response)["aud"] == [authserver.issuer]


@pytest.mark.parametrize(
    ("client", "form", "status", "errors"),
    [
        ("wrong secret", {}, 401, {"invalid_client"}),
        ("unknown", {}, 401, {"invalid_client"}),
        ("deleted", {}, 401, {"invalid_client"}),
        ("known", {"scope": "mcp:other"}, 400, {"invalid_scope"}),
        ("known", {"scope": "mcp:echo mcp:other"}, 400, {"invalid_scope"}),
        *(
            ("known", {"resource": uri}, 400, {"invalid_target", "invalid_scope"})
            for uri in (
                f"{URI}/",
                URI.replace("8080", "8081"),
                URI.replace("localhost", "127.0.0.1"),
            )
        ),
        ("known", {"grant_type": "password"}, 400, {"unsupported_grant_type"}),
    ],
)
def test_token_request_is_rejected(
    authserver: Authserver,
    credentials: Credentials,
    client: str,
    form: dict[str, str],
    status: int,
    errors: set[str],
) -> None:
    match client:
        case "wrong secret":
            credentials = credentials[0], f"{credentials[1]}A"
        case "unknown":
            credentials = "A" * 22, credentials[1]
        case "deleted":
            credentials = create_client(authserver, unique())
            assert delete_client(authserver, credentials[0], force="true") == 204
        case _:
            pass
    response = request_token(authserver, credentials, **{"resource": URI} | form)
    assert response.status_code == status
    assert response.json()["error"] in errors
    assert response.json()["error_description"]


@pytest.mark.parametrize("authorization", [None, "Bearer wrong-admin-key-0123456789"])
@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", "resources"),
        ("GET", "resources?slug=test"),
        ("PATCH", "resources/test"),
        ("POST", "clients"),
        ("DELETE", "clients/test?force=true"),
        ("GET", "clients"),
    ],
)
def test_admin_key_is_required(
    authserver: Authserver, method: str, path: str, authorization: str | None
) -> None:
    request = authserver.admin.build_request(method, path)
    del request.headers["Authorization"]
    if authorization:
        request.headers["Authorization"] = authorization
    assert authserver.admin.send(request).status_code == 401


def test_resource(authserver: Authserver) -> None:
    slug = unique()
    query = {"slug": slug}
    assert authserver.admin.get("resources", params=query).status_code == 404
    created = create_resource(authserver, slug, "http://localhost:8080/mcp")
    assert created.status_code == 201
    view = created.json()
    assert (view["slug"], view["uri"]) == (slug, "http://localhost:8080/mcp")
    assert [scope["name"] for scope in view["scopes"]] == ["mcp:echo"]
    assert create_resource(authserver, slug, "http://localhost:8080/other").status_code == 409

    path = f"resources/{view['id']}"
    moved = authserver.admin.patch(path, json={"uri": "http://localhost:8081/mcp"})
    assert (moved.status_code, moved.json()["uri"]) == (200, "http://localhost:8081/mcp")
    scopes = [{"name": "mcp:new", "description": ""}]
    changed = authserver.admin.patch(path, json={"scopes": scopes})
    assert changed.status_code == 200
    found = authserver.admin.get("resources", params=query)
    assert found.status_code == 200
    for view in (changed.json(), found.json()):
        assert (view["slug"], view["uri"]) == (slug, "http://localhost:8081/mcp")
        assert [scope["name"] for scope in view["scopes"]] == ["mcp:new"]


def test_clients_of_one_name(authserver: Authserver) -> None:
    name = unique()
    older, newer = create_client(authserver, name), create_client(authserver, name)
    assert all(re.fullmatch(r"[A-Za-z0-9_-]+", value) for value in older + newer)
    listed = authserver.admin.get("clients").json()
    assert [each["id"] for each in listed if each["name"] == name] == [newer[0], older[0]]


def test_client_with_a_live_token_is_deleted_by_force(
    authserver: Authserver, credentials: Credentials
) -> None:
    client = create_client(authserver, unique())
    assert request_token(authserver, client, resource=URI).status_code == 200
    assert delete_client(authserver, client[0]) == 409
    assert request_token(authserver, client, resource=URI).status_code == 200
    assert delete_client(authserver, client[0], force="true") == 204
    response = request_token(authserver, client, resource=URI)
    assert (response.status_code, response.json()["error"]) == (401, "invalid_client")
