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

from conftest import REAL_IMAGE, need_image
from machine import ADMIN_KEY, Machine, status_of, wait_until

METADATA = "/.well-known/oauth-authorization-server"
KEYS = "/.well-known/jwks.json"
URI = "http://localhost:8080/contract"

type Credentials = tuple[str, str]


@pytest.fixture(scope="session", params=["stand-in", REAL_IMAGE])
def authserver(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Machine]:
    """The stand-in, and the authserver if the engine of this machine has its image."""
    image = "" if request.param == "stand-in" else need_image(request)
    folder = tmp_path_factory.mktemp("authserver")
    with closing(Machine(folder, *["docker"] * bool(image))) as machine:
        if image:
            run_container(machine, image)
        else:
            machine.serve("authserver")
        wait_until(lambda: status_of("GET", machine.issuer + METADATA) == 200, request.param)
        machine.register_resource("contract", URI)
        yield machine


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
    options += [f"--publish=127.0.0.1:{machine.ports[n]}:{9000 + n}" for n in range(2)]
    machine.docker("run", "--detach", "--rm", "--name", machine.name, *options, image)


@pytest.fixture(scope="session")
def client(authserver: Machine) -> Credentials:
    """A client that may request `mcp:echo` for the resource URI."""
    return authserver.register_client()


def get(authserver: Machine, path: str) -> Any:
    response = httpx.get(authserver.issuer + path, trust_env=False)
    assert response.status_code == 200
    return response.json()


def request_token(authserver: Machine, client: Credentials, **form: str) -> httpx.Response:
    url, data = f"{authserver.issuer}/oauth/token", {"grant_type": "client_credentials"} | form
    return httpx.post(url, auth=client, data=data, trust_env=False)


def verified_claims(authserver: Machine, response: httpx.Response) -> dict[str, Any]:
    """Return the claims of the access token, whose signature and header are as they should be."""
    assert response.status_code == 200
    keys = KeySet.import_key_set(get(authserver, KEYS))
    token = jwt.decode(response.json()["access_token"], keys, algorithms=["ES256"])
    assert token.header["kid"] in {key.kid for key in keys}
    return token.claims


def test_metadata_and_keys(authserver: Machine) -> None:
    metadata, issuer = get(authserver, METADATA), authserver.issuer
    urls = {"token_endpoint": f"{issuer}/oauth/token", "jwks_uri": f"{issuer}{KEYS}"}
    assert metadata == metadata | urls | {"issuer": issuer}
    assert not any("d" in key for key in get(authserver, KEYS)["keys"])  # the private part


def test_access_token(authserver: Machine, client: Credentials) -> None:
    response = request_token(authserver, client, resource=URI, scope="mcp:echo")
    claims, body = verified_claims(authserver, response), response.json()
    expected = {"iss": authserver.issuer, "aud": [URI], "scope": "mcp:echo"}
    assert claims == claims | expected | {"sub": client[0], "client_id": client[0]}
    assert claims["exp"] - claims["iat"] == body["expires_in"] > 0
    assert body["token_type"] == "Bearer"
    assert response.headers["Cache-Control"] == "no-store"
    without_resource = verified_claims(authserver, request_token(authserver, client))
    assert without_resource["aud"] == [authserver.issuer]


@pytest.mark.parametrize(
    ("error", "form"),
    [
        ("unsupported_grant_type", {"grant_type": "password"}),
        ("invalid_client", {"id": "wrong"}),
        ("invalid_client", {"secret": "wrong"}),
        ("invalid_scope", {"scope": "mcp:other"}),
        ("invalid_scope", {"scope": "mcp:echo mcp:other"}),
        ("invalid_target", {"resource": f"{URI}/"}),
        ("invalid_target", {"resource": URI.replace("8080", "8081")}),
        ("invalid_target", {"resource": URI.replace("localhost", "127.0.0.1")}),
    ],
)
def test_token_request_is_rejected(
    authserver: Machine, client: Credentials, error: str, form: dict[str, str]
) -> None:
    sent = {"id": client[0], "secret": client[1], "resource": URI} | form
    response = request_token(authserver, (sent.pop("id"), sent.pop("secret")), **sent)
    assert response.status_code == (401 if error == "invalid_client" else 400)
    before_022 = {"invalid_target": "invalid_scope"}.get(error, error)
    assert response.json()["error"] in (error, before_022)
    assert response.json()["error_description"]


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
def test_admin_key_is_required(authserver: Machine, call: str, key: str) -> None:
    method, path = call.split()
    url, headers = f"{authserver.admin_url}/admin/{path}", {"Authorization": key} if key else {}
    response = httpx.request(method, url, json={}, headers=headers, trust_env=False)
    assert response.status_code == 401


def test_resource(authserver: Machine) -> None:
    slug, uri, new_uri = f"test-{uuid.uuid4()}", f"{URI}/1", f"{URI}/2"
    scopes = [{"name": "mcp:echo", "description": "echo tool"}]
    resource = {"slug": slug, "uri": uri, "scopes": scopes}
    resource |= {"backend_kind": "mint", "display_name": "Test"}

    def members(response: httpx.Response) -> list[Any]:
        view = response.json()
        names = [scope["name"] for scope in view["scopes"]]
        return [response.status_code, view["slug"], view["uri"], *names]

    assert authserver.admin("GET", f"resources?slug={slug}").status_code == 404
    created = authserver.admin("POST", "resources", json=resource)
    assert members(created) == [201, slug, uri, "mcp:echo"]
    again = authserver.admin("POST", "resources", json=resource | {"uri": new_uri})
    assert again.status_code == 409
    path = f"resources/{created.json()['id']}"
    changed = authserver.admin("PATCH", path, json={"uri": new_uri})
    assert members(changed) == [200, slug, new_uri, "mcp:echo"]
    new_scopes = [{"name": "mcp:new", "description": ""}]
    changed = authserver.admin("PATCH", path, json={"scopes": new_scopes})
    assert members(changed) == [200, slug, new_uri, "mcp:new"]
    read = authserver.admin("GET", f"resources?slug={slug}")
    assert members(read) == [200, slug, new_uri, "mcp:new"]


def test_client(authserver: Machine) -> None:
    client, newer = authserver.register_client(), authserver.register_client()  # of one name
    newest = [(each["id"], each["name"]) for each in authserver.admin("GET", "clients").json()[:2]]
    assert newest == [(newer[0], "demo-agent-client"), (client[0], "demo-agent-client")]
    path = f"clients/{client[0]}"
    assert all(re.fullmatch("[A-Za-z0-9_-]+", value) for value in client)
    assert request_token(authserver, client).status_code == 200
    assert authserver.admin("DELETE", path).status_code == 409  # it has a live token
    assert request_token(authserver, client).status_code == 200
    assert client[0] in authserver.clients()
    assert authserver.admin("DELETE", f"{path}?force=true").status_code == 204
    assert request_token(authserver, client).status_code == 401
    assert client[0] not in authserver.clients()
