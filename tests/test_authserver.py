"""The stand-in for the authserver, held against the tables of its contract over real sockets."""

import re
import signal
import socket
import subprocess
from base64 import b64encode
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from http import HTTPStatus
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import httpx
import pytest
from joserfc import jwt
from joserfc.jwk import KeySet

from conftest import CLIENT, KEY, RESOURCE, free_ports, program, wait_until

ISSUER = "http://localhost:9000/As"  # nobody is there: only what is done with the name counts
URI = "http://localhost:8080/mcp"
JSON = "application/json"
PROBLEM = "application/problem+json"
FORM = {"Content-Type": "application/x-www-form-urlencoded"}
GRANT = "grant_type=client_credentials"
LIMIT = 64 * 1024
METADATA = "/.well-known/oauth-authorization-server"
DEMO = RESOURCE | {"uri": URI, "scopes": [{"name": f"mcp:{it}"} for it in ("write", "echo", "all")]}
AGENT = CLIENT | {"scope": "other mcp:write mcp:echo"}

type Credentials = tuple[str, str]


@dataclass(frozen=True)
class Running:
    """A running stand-in: a client of each listener, the admin one with KEY."""

    public: httpx.Client
    admin: httpx.Client
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def running(log: Path, key: str = KEY) -> Generator[Running]:
    ports = free_ports(2)
    urls = [f"http://localhost:{port}" for port in ports]
    settings = {
        "AUTHPLANE_SERVER_ISSUER": ISSUER,
        "AUTHPLANE_SERVER_ADDRESS": f":{ports[0]}",
        "AUTHPLANE_ADMIN_ADDRESS": f":{ports[1]}",
        "AUTHPLANE_ADMIN_API_KEY": key,
    }
    authorization = {"Authorization": f"Bearer {KEY}"}
    with (
        program("authserver.py", log, **settings) as process,
        httpx.Client(base_url=urls[0], trust_env=False) as public,
        httpx.Client(base_url=f"{urls[1]}/admin", headers=authorization, trust_env=False) as admin,
    ):
        wait_until(lambda: "ready" in log.read_text(), f"authserver, see {log}")
        yield Running(public, admin, process, log)


@pytest.fixture(scope="module")
def authserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A stand-in with the resource `demo-mcp`."""
    with running(tmp_path_factory.mktemp("authserver") / "log") as server:
        new_resource(server.admin)
        yield server


@pytest.fixture(scope="module")
def keyless(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A stand-in without an admin key, and so without resources."""
    with running(tmp_path_factory.mktemp("keyless") / "log", key="") as server:
        yield server


@pytest.fixture(scope="module")
def public(authserver: Running) -> httpx.Client:
    return authserver.public


@pytest.fixture(scope="module")
def admin(authserver: Running) -> httpx.Client:
    return authserver.admin


@pytest.fixture(scope="module")
def clients(admin: httpx.Client) -> dict[str, Credentials]:
    """Who asks for tokens, by what is special about them."""
    agent, gone = new_client(admin), new_client(admin)
    admin.delete(f"clients/{gone[0]}")
    return {
        "agent": agent,
        "posting": new_client(admin, token_endpoint_auth_method="client_secret_post"),
        "of another grant": new_client(admin, grant_types=["authorization_code"]),
        "unknown": ("A" * 22, agent[1]),
        "deleted": gone,
        "wrong secret": (agent[0], gone[1]),
        "longer secret": (agent[0], f"{agent[1]}A"),
        "empty secret": (agent[0], ""),
    }


@pytest.fixture(scope="module")
def agent(clients: dict[str, Credentials]) -> Credentials:
    return clients["agent"]


def register(admin: httpx.Client, path: str, body: Any) -> Any:
    return content(admin.post(path, json=body), 201)


def new_resource(admin: httpx.Client, **members: Any) -> Any:
    return register(admin, "resources", DEMO | members)


def new_client(admin: httpx.Client, **members: Any) -> Credentials:
    client = register(admin, "clients", AGENT | members)
    return client["client_id"], client["client_secret"]


def content(response: httpx.Response, status: int = 200, media_type: str = JSON) -> Any:
    """Return the JSON of a response, after a look at what all of them have in common."""
    assert (response.status_code, response.headers["Content-Type"]) == (status, media_type)
    assert response.content.endswith(b"\n")
    return response.json()


def assert_problem(response: httpx.Response, status: int, detail: str) -> None:
    """Check an admin error; the detail is a pattern."""
    problem = content(response, status, PROBLEM)
    assert re.fullmatch(detail, problem.pop("detail"))
    title = HTTPStatus(status).phrase
    assert problem == {"status": status, "title": title, "type": "about:blank"}


def post(public: httpx.Client, form: str, who: Credentials | None = None) -> httpx.Response:
    """Send a form as it is written to the token endpoint."""
    return public.post("/oauth/token", auth=who or httpx.Auth(), content=form, headers=FORM)


def ask(public: httpx.Client, who: Credentials | None, form: str = "") -> httpx.Response:
    return post(public, f"{GRANT}&{form}", who)


def verified(public: httpx.Client, response: httpx.Response) -> jwt.Token:
    """Return the access token of a response, its signature checked with the published key."""
    keys = KeySet.import_key_set(public.get("/.well-known/jwks.json").json())
    return jwt.decode(content(response)["access_token"], keys, algorithms=["ES256"])


def is_time(text: str) -> bool:
    """Is it a time of RFC 3339, and about now?"""
    told = re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?(Z|[+-]\d\d:\d\d)", text)
    return bool(told) and abs(datetime.now(UTC) - datetime.fromisoformat(text)) < timedelta(hours=1)


def short(value: Any) -> str | None:
    """Return the part of a test's name that stands for a string, which can be a long one."""
    return value[:40] if isinstance(value, str) else None


# The public listener


def test_metadata_lists_what_is_served(public: httpx.Client, admin: httpx.Client) -> None:
    response = public.get(METADATA)
    scopes = [scope["name"] for each in admin.get("resources").json() for scope in each["scopes"]]
    assert content(response) == {
        "issuer": ISSUER,
        "token_endpoint": f"{ISSUER}/oauth/token",
        "jwks_uri": f"{ISSUER}/.well-known/jwks.json",
        "response_types_supported": [],  # RFC 8414 wants the member; no endpoint here has one
        "grant_types_supported": ["client_credentials"],
        "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
        "scopes_supported": list(dict.fromkeys(scopes)),
        "resource_indicators_supported": True,
    }
    assert response.headers["Cache-Control"] == "public, max-age=3600"


def test_metadata_is_the_same_for_openid(public: httpx.Client) -> None:
    one, other = public.get(METADATA), public.get("/.well-known/openid-configuration")
    assert content(one) == content(other)
    assert one.content == other.content
    assert one.headers["Cache-Control"] == other.headers["Cache-Control"]


def test_scopes_supported_are_a_union_in_slug_order(
    public: httpx.Client, admin: httpx.Client
) -> None:
    last = new_resource(admin, slug="zz", scopes=[{"name": "z"}, {"name": "mcp:echo"}])
    first = new_resource(admin, slug="aa", scopes=[{"name": "b"}, {"name": "a"}])
    scopes = content(public.get(METADATA))["scopes_supported"]
    for each in (first, last):
        admin.delete(f"resources/{each['id']}")
    assert scopes[:2] == ["b", "a"]
    assert scopes[-1] == "z"
    assert scopes.count("mcp:echo") == 1


def test_jwks_is_one_public_key(public: httpx.Client) -> None:
    (key,) = content(public.get("/.well-known/jwks.json"))["keys"]
    assert all(re.fullmatch(r"[\w-]{43}", key.pop(coordinate)) for coordinate in "xy")
    assert re.fullmatch(r"[\w-]{22}", key.pop("kid"))
    assert key == {"kty": "EC", "crv": "P-256", "use": "sig", "alg": "ES256"}


@pytest.mark.parametrize(
    ("path", "members"),
    [("/health", {"status": "ok", "db": "ok"}), ("/livez", {"status": "alive"})],
)
def test_health(public: httpx.Client, path: str, members: dict[str, str]) -> None:
    health = content(public.get(path))
    assert is_time(health.pop("time"))
    assert health == members


UNREGISTERED = "resource=urn:other&scope=nobodys"
UNSUPPORTED = 'grant_type "{}" is not supported'
UNAUTHENTICATED = (401, "invalid_client", "client authentication failed")
TARGET = 'the requested resource target is unavailable: resource "{}" is not a registered resource'
SCOPE = "the requested scope is invalid or not allowed: the requested scope "
BEYOND_CLIENT = (400, "invalid_scope", f"{SCOPE}exceeds the client's registered scopes")
BEYOND_RESOURCE = (400, "invalid_scope", f"{SCOPE}is not declared by the target resource")


@pytest.mark.parametrize(
    ("who", "form", "status", "error", "description"),
    # each request is also wrong in all that is checked later, which tells the order of checks
    [
        *(
            ("nobody", form, 400, "invalid_request", "invalid form body")
            for form in ("a=%zz", "a=%4", "%=", "a;b", f"a={'a' * (LIMIT - 1)}")
        ),
        *(
            ("nobody", form, 400, "unsupported_grant_type", UNSUPPORTED.format(value))
            for form, value in [
                ("", ""),
                (f"grant_type=&{GRANT}", ""),
                ("grant_type=refresh_token", "refresh_token"),
                (f"grant_type=password&{GRANT}", "password"),
                ("grant_type=a+b%22%C3%A9é", 'a b"éé'),
            ]
        ),
        *(
            (who, f"{GRANT}&{UNREGISTERED}", *UNAUTHENTICATED)
            for who in [
                "nobody",
                "unknown",
                "deleted",
                "wrong secret",
                "longer secret",
                "empty secret",
            ]
        ),
        (
            "of another grant",
            f"{GRANT}&{UNREGISTERED}",
            400,
            "unauthorized_client",
            "client is not authorized for this grant type",
        ),
        ("agent", f"{GRANT}&{UNREGISTERED}", 400, "invalid_target", TARGET.format("urn:other")),
        ("agent", f"{GRANT}&scope=nobodys", *BEYOND_CLIENT),
        ("agent", f"{GRANT}&resource={URI}&scope=nobodys", *BEYOND_CLIENT),
        ("agent", f"{GRANT}&resource={URI}&scope=mcp:echo+mcp:all", *BEYOND_CLIENT),
        ("agent", f"{GRANT}&resource={URI}&scope=mcp:echo+other", *BEYOND_RESOURCE),
    ],
    ids=short,
)
def test_token_error(
    public: httpx.Client,
    clients: dict[str, Credentials],
    who: str,
    form: str,
    status: int,
    error: str,
    description: str,
) -> None:
    response = post(public, form, clients.get(who))
    assert content(response, status, PROBLEM) == {
        "error": error,
        "error_description": description,
        "type": f"https://docs.authplane.ai/errors/{error}",
        "title": HTTPStatus(status).phrase,
        "detail": description,
        "status": status,
    }
    challenge = 'Basic realm="authserver"' if status == 401 else None
    assert response.headers.get("WWW-Authenticate") == challenge


def test_a_form_may_have_64_kib(public: httpx.Client, agent: Credentials) -> None:
    assert ask(public, agent, "a=".ljust(LIMIT - len(f"{GRANT}&"), "a")).status_code == 200


SENT = "client_id={id}&client_secret={secret}"


@pytest.mark.parametrize(
    ("scheme", "pair", "form", "status"),
    [
        ("Basic", "{id}:{secret}", "", 200),
        ("Basic", "{encoded[0]}:{encoded[1]}", "", 200),
        ("", "", SENT, 200),
        # a usable header is the one that counts
        ("Basic", "{id}:{secret}", "client_id={id}&client_secret=wrong", 200),
        ("Basic", "{id}:wrong", SENT, 401),
        ("Basic", "\xff:{secret}", SENT, 401),
        # not usable
        ("Bearer", "{id}:wrong", SENT, 200),
        ("Basic", "{id}", SENT, 200),
        ("Basic", "%zz:{secret}", SENT, 200),
        ("Basic not base64", "{id}:wrong", SENT, 200),
        ("Basic \xe9", "{id}:wrong", SENT, 200),
        ("Basic", "{id}%3A{secret}", "", 401),  # split first, then decoded
        # the first of a name counts
        ("", "", f"{SENT}&client_id=wrong&client_secret=wrong", 200),
        ("", "", f"client_secret=wrong&{SENT}", 401),
    ],
)
def test_client_authentication(
    public: httpx.Client, agent: Credentials, scheme: str, pair: str, form: str, status: int
) -> None:
    encoded = ["".join(f"%{ord(letter):02x}" for letter in half) for half in agent]
    pair, form = (
        text.format(id=agent[0], secret=agent[1], encoded=encoded) for text in (pair, form)
    )
    authorization = {"Authorization": f"{scheme} {b64encode(pair.encode('latin-1')).decode()}"}
    headers = httpx.Headers(FORM | (authorization if scheme else {}), encoding="latin-1")
    response = public.post("/oauth/token", content=f"{GRANT}&{form}", headers=headers)
    assert response.status_code == status


@pytest.mark.parametrize("who", ["agent", "posting"])
def test_the_registered_method_is_not_enforced(
    public: httpx.Client, clients: dict[str, Credentials], who: str
) -> None:
    names = ("client_id", "client_secret")
    posted = urlencode(dict(zip(names, clients[who], strict=True)))
    answers = [ask(public, clients[who]), ask(public, None, posted)]
    assert [answer.status_code for answer in answers] == [200, 200]


@pytest.mark.parametrize(
    "uri",
    [
        "http://localhost:8081/mcp",
        "http://localhost/mcp",
        "http://127.0.0.1:8080/mcp",
        "http://LOCALHOST:8080/mcp",
        "http://localhost:8080/mcp/",
        "http://localhost:8080/%6Dcp",
        "http://localhost:8080/mcp#",
        " http://localhost:8080/mcp",
    ],
)
def test_a_resource_is_compared_byte_for_byte(
    public: httpx.Client, agent: Credentials, uri: str
) -> None:
    refusal = content(ask(public, agent, urlencode({"resource": uri})), 400, PROBLEM)
    assert refusal["error"] == "invalid_target"
    assert refusal["error_description"] == TARGET.format(uri)


@pytest.mark.parametrize(
    ("form", "audience", "scope"),
    [
        ("", ISSUER, "mcp:echo mcp:write other"),
        ("scope=other", ISSUER, "other"),
        (f"resource={URI}", URI, "mcp:echo mcp:write"),
        (f"resource={URI}&scope=mcp:write", URI, "mcp:write"),
        (f"resource={URI}&scope=mcp:write+mcp:echo", URI, "mcp:echo mcp:write"),
        (f"resource={URI}&resource=urn:other", URI, "mcp:echo mcp:write"),
        (f"resource={URI}&scope=mcp:echo&scope=nobodys", URI, "mcp:echo"),
    ],
)
def test_audience_and_scope(
    public: httpx.Client, agent: Credentials, form: str, audience: str, scope: str
) -> None:
    response = ask(public, agent, form)
    claims = verified(public, response).claims
    assert claims["aud"] == [audience]
    assert (response.json()["scope"], claims["scope"]) == (scope, scope)


def test_token_response(public: httpx.Client, agent: Credentials) -> None:
    response = ask(public, agent, f"resource={URI}")
    members = content(response)
    assert members.pop("access_token").count(".") == 2
    assert members == {"token_type": "Bearer", "expires_in": 3600, "scope": "mcp:echo mcp:write"}
    assert response.headers["Cache-Control"] == "no-store"
    assert response.headers["Pragma"] == "no-cache"


def test_access_token(public: httpx.Client, agent: Credentials) -> None:
    tokens = [verified(public, ask(public, agent, f"resource={URI}")) for _ in range(2)]
    (key,) = public.get("/.well-known/jwks.json").json()["keys"]
    claims = tokens[0].claims
    jti, issued = claims.pop("jti"), claims["iat"]
    assert tokens[0].header == {"alg": "ES256", "kid": key["kid"], "typ": "at+jwt"}
    assert re.fullmatch(r"[\w-]{22}", jti)
    assert jti != tokens[1].claims["jti"]
    assert abs(datetime.now(UTC).timestamp() - issued) < 60
    assert claims == {
        "iss": ISSUER,
        "sub": agent[0],
        "aud": [URI],
        "client_id": agent[0],
        "scope": "mcp:echo mcp:write",
        "iat": issued,
        "nbf": issued,
        "exp": issued + 3600,
    }


# The admin listener


@pytest.mark.parametrize(
    ("authorization", "reason"),
    [
        (None, "missing API key"),
        ("Bearer", "missing API key"),
        (f"Basic {KEY}", "missing API key"),
        ("Bearer wrong", "invalid API key"),
        (f"Bearer {KEY}0", "invalid API key"),
    ],
)
@pytest.mark.parametrize("path", ["resources", "resources/id", "clients", "clients/id", "other"])
def test_admin_authentication_failure(
    public: httpx.Client, admin: httpx.Client, path: str, authorization: str | None, reason: str
) -> None:
    headers = {"Authorization": authorization} if authorization else {}
    assert_unauthorized(public.get(f"{admin.base_url}{path}", headers=headers), reason)


def test_an_empty_admin_key_lets_nobody_in(keyless: Running) -> None:
    response = keyless.public.get(f"{keyless.admin.base_url}resources")
    assert_unauthorized(response, "missing API key")
    assert_unauthorized(keyless.admin.get("resources"), "invalid API key")


def test_metadata_omits_scopes_when_there_are_none(keyless: Running) -> None:
    assert "scopes_supported" not in content(keyless.public.get(METADATA))


def assert_unauthorized(response: httpx.Response, reason: str) -> None:
    assert content(response, 401) == {"error": "unauthorized", "error_description": reason}
    assert response.headers["WWW-Authenticate"] == 'Bearer realm="admin"'


INVALID_JSON = (400, "invalid JSON body: .+")
INVALID_CLIENT = (400, "client authentication failed: client validation failed: .+")
NO_RESOURCE = (404, "resource not found")


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "detail"),
    [
        ("POST", "resources", DEMO, 409, 'slug "demo-mcp" is already in use'),
        ("POST", "resources", DEMO | {"slug": "new", "more": 1}, *INVALID_JSON),
        ("POST", "resources", DEMO | {"slug": "new", "scopes": [{"more": ""}]}, *INVALID_JSON),
        ("POST", "resources", DEMO | {"slug": 1}, *INVALID_JSON),
        ("POST", "resources", DEMO | {"slug": "new", "scopes": ["mcp:echo"]}, *INVALID_JSON),
        ("POST", "resources", [], *INVALID_JSON),
        ("POST", "resources", "{", *INVALID_JSON),
        ("POST", "resources", "", *INVALID_JSON),
        *(
            ("POST", "resources", DEMO | {"slug": slug}, 400, f'.*invalid slug "{slug}"')
            for slug in ("", "-a", "A", "a_b", "a.b", "é", "a\n", "a" * 65)
        ),
        ("POST", "resources", {}, 400, ".*invalid slug.*"),
        ("POST", "resources", DEMO | {"slug": "new", "backend_kind": "x"}, 500, "internal error"),
        ("POST", "resources", DEMO | {"slug": "new", "uri": "mcp"}, 500, "internal error"),
        ("GET", "resources?slug=unknown", None, *NO_RESOURCE),
        ("GET", "resources/unknown", None, *NO_RESOURCE),
        ("PATCH", "resources/unknown", {}, *NO_RESOURCE),
        ("DELETE", "resources/unknown", None, *NO_RESOURCE),
        ("POST", "clients", AGENT | {"grant_types": ["unheard-of"]}, *INVALID_CLIENT),
        ("POST", "clients", AGENT | {"grant_types": "client_credentials"}, *INVALID_CLIENT),
        ("POST", "clients", AGENT | {"token_endpoint_auth_method": "x"}, *INVALID_CLIENT),
        ("POST", "clients", {}, *INVALID_CLIENT),
        ("POST", "clients", "{", *INVALID_CLIENT),
        ("GET", "clients/unknown", None, 404, "client not found"),
        ("DELETE", "clients/unknown", None, 400, "client authentication failed"),
        ("DELETE", "clients/unknown?force=true", None, 400, "client authentication failed"),
    ],
    ids=short,
)
def test_admin_error(
    admin: httpx.Client, method: str, path: str, body: Any, status: int, detail: str
) -> None:
    sent: dict[str, Any] = {"content" if isinstance(body, str) else "json": body}
    assert_problem(admin.request(method, path, **sent), status, detail)


@pytest.mark.parametrize("path", ["resources", "resources/{id}"])
def test_put_is_not_allowed(admin: httpx.Client, path: str) -> None:
    known = content(admin.get("resources?slug=demo-mcp"))
    response = admin.put(path.format(**known), json=DEMO)
    assert response.status_code == 405
    assert response.headers["Content-Type"].startswith("text/plain")
    assert response.headers["Allow"] == "GET, HEAD, POST"


@pytest.mark.parametrize("slug", ["a", "0", "a-", "0-b-", "a" * 64])
def test_slug_is_accepted(admin: httpx.Client, slug: str) -> None:
    created = new_resource(admin, slug=slug)  # the uri is demo-mcp's too
    assert created["slug"] == slug
    assert admin.delete(f"resources/{created['id']}").status_code == 204


def test_resource_from_creation_to_deletion(admin: httpx.Client) -> None:
    sent = DEMO | {"slug": "whole-life", "uri": "urn:whole-life"}
    view = register(admin, "resources", sent)
    path = f"resources/{view['id']}"
    assert re.fullmatch(r"[\w-]{22}", view["id"])
    assert is_time(view["created_at"])
    assert is_time(view["updated_at"])
    assert view.keys() == sent.keys() | {
        "id",
        "broker_provider_id",
        "policy",
        "created_at",
        "updated_at",
    }
    assert view.items() >= (sent | {"broker_provider_id": ""}).items()
    assert content(admin.get(path)) == view
    assert content(admin.get("resources?slug=whole-life")) == view
    assert view in content(admin.get("resources"))

    changes = {"scopes": [{"name": "mcp:new", "description": ""}], "uri": "urn:moved"}
    changed = content(admin.patch(path, json=changes))
    assert changed["updated_at"] > view["updated_at"]
    assert changed == view | changes | {"updated_at": changed["updated_at"]}
    assert content(admin.get(path)) == changed
    assert_problem(admin.patch(path, json={"more": 1}), *INVALID_JSON)
    assert_problem(admin.patch(path, json={"slug": "demo-mcp"}), 409, ".*already in use")
    assert content(admin.patch(path, json={"slug": "other-life"}))["slug"] == "other-life"

    deleted = admin.delete(path)
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert_problem(admin.get(path), *NO_RESOURCE)


def test_resources_are_listed_in_slug_order(admin: httpx.Client) -> None:
    made = [new_resource(admin, slug=slug) for slug in ("zz", "aa")]
    slugs = [each["slug"] for each in content(admin.get("resources"))]
    for each in made:
        admin.delete(f"resources/{each['id']}")
    assert {"zz", "aa"} < set(slugs)
    assert slugs == sorted(slugs)


def test_a_resource_with_tokens_stays(
    public: httpx.Client, admin: httpx.Client, agent: Credentials
) -> None:
    made = new_resource(admin, slug="minted", uri="urn:minted")
    assert ask(public, agent, "resource=urn:minted").status_code == 200
    admin.patch(f"resources/{made['id']}", json={"display_name": "changed"})
    detail = "resource has references and cannot be deleted"
    assert_problem(admin.delete(f"resources/{made['id']}"), 409, detail)
    assert admin.get(f"resources/{made['id']}").status_code == 200


def test_client_registration(admin: httpx.Client) -> None:
    first, second = (register(admin, "clients", AGENT | {"unheard_of": 1}) for _ in range(2))
    assert first.items() >= AGENT.items()
    assert first.keys() == AGENT.keys() | {"client_id", "client_secret", "status", "issued_at"}
    assert re.fullmatch(r"[\w-]{22}", first["client_id"])
    assert re.fullmatch(r"[\w-]{43}", first["client_secret"])
    assert first["status"] == "active"
    assert is_time(first["issued_at"])
    assert first["client_id"] != second["client_id"]
    assert first["client_secret"] != second["client_secret"]


def test_clients_are_listed_newest_first(admin: httpx.Client) -> None:
    made = [new_client(admin, client_name=name)[0] for name in ("older", "newer")]
    answer = admin.get("clients")
    newest = content(answer)[:2]
    assert [(each["id"], each["name"]) for each in newest] == [
        (made[1], "newer"),
        (made[0], "older"),
    ]
    assert not {"client_id", "client_name"} & newest[0].keys()
    assert "secret" not in re.sub("client_secret_(basic|post)", "", answer.text)
    assert content(admin.get(f"clients/{made[0]}")) == newest[1]


def test_a_client_without_tokens_is_deleted(admin: httpx.Client) -> None:
    path = f"clients/{new_client(admin)[0]}"
    assert admin.head(path).status_code == 200
    deleted = admin.delete(path)
    assert (deleted.status_code, deleted.content) == (204, b"")
    assert_problem(admin.get(path), 404, "client not found")


def test_a_client_with_tokens_is_deleted_by_force(
    public: httpx.Client, admin: httpx.Client
) -> None:
    client = new_client(admin)
    path = f"clients/{client[0]}"
    issued = ask(public, client)
    detail = "client has active tokens — use force=true to revoke and delete"
    assert_problem(admin.delete(path), 409, detail)
    assert ask(public, client).status_code == 200
    assert admin.delete(path, params={"force": "true"}).status_code == 204
    assert content(ask(public, client), 401, PROBLEM)["error"] == "invalid_client"
    assert verified(public, issued).claims["sub"] == client[0]


# The program


def test_only_loopback_is_served(public: httpx.Client, admin: httpx.Client) -> None:
    for client in (public, admin):
        address = ("127.0.0.2", client.base_url.port or 0)  # answers when all addresses do
        with pytest.raises(OSError):
            socket.create_connection(address, timeout=1).close()


def test_a_taken_port_is_told_in_one_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = f":{other.getsockname()[1]}"
        addresses = {"AUTHPLANE_SERVER_ADDRESS": ":0", "AUTHPLANE_ADMIN_ADDRESS": taken}
        with program("authserver.py", log, **addresses) as process:
            assert process.wait(10) == 1
    (line,) = log.read_text().splitlines()
    assert "stand-in" in line
    assert f"{taken}: Address already in use" in line


def test_sigterm_ends_it_at_once(tmp_path: Path) -> None:
    with running(tmp_path / "log") as server:
        server.public.get("/livez")  # a connection of each listener stays open
        server.admin.get("clients")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(1) in (0, -signal.SIGTERM)
    assert "Traceback" not in server.log.read_text()


def test_it_never_claims_to_be_the_real_one(authserver: Running) -> None:
    answers = [authserver.public.get(METADATA), authserver.admin.get("clients")]
    named = re.findall("(?im)^.*authplane.*$", authserver.log.read_text())
    assert named
    assert all("stand-in" in line for line in named)
    assert not any(re.search("(?i)authplane", f"{each.headers}{each.text}") for each in answers)
