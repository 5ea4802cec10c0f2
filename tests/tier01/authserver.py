"""A stand-in for the Authplane authserver: what a `client_credentials` agent and its set-up touch.

Two listeners, as the real one has: the public one (metadata, JWKS, token endpoint) and the admin
one (resources, clients). It signs real ES256 access tokens (RFC 9068), keeps everything in memory
and has nothing for users: no authorization endpoint, no refresh token, no rate limit.
"""

import asyncio
import base64
import hmac
import json
import os
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from http import HTTPStatus
from typing import Any
from urllib.parse import parse_qsl, unquote_plus

from joserfc import jwt
from joserfc.jwk import ECKey
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from listeners import serve

TOKEN_SECONDS = 3600
MAX_FORM_BYTES = 64 * 1024
SLUG = re.compile(r"[a-z0-9][a-z0-9-]{0,63}")
ABSOLUTE_URI = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:.")
BAD_ESCAPE = re.compile(r"%(?![0-9A-Fa-f]{2})")
RESOURCE_SHAPE = {
    "slug": "",
    "uri": "",
    "backend_kind": "",
    "display_name": "",
    "scopes": [{"name": "", "description": ""}],
}
CLIENT_SHAPE = {
    "client_name": "",
    "grant_types": [""],
    "token_endpoint_auth_method": "",
    "scope": "",
}
AUTH_METHODS = {"client_secret_basic", "client_secret_post"}
GRANT_TYPES = {"authorization_code", "refresh_token", "client_credentials"}
SCOPE_REFUSED = "the requested scope is invalid or not allowed: the requested scope "

type Json = dict[str, Any]


def now() -> str:
    """Return the time as RFC 3339 writes it, in UTC."""
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


@dataclass
class Resource:
    """A registered protected resource, the `resource` of RFC 8707."""

    slug: str = ""
    uri: str = ""
    backend_kind: str = ""
    display_name: str = ""
    scopes: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    created_at: str = field(default_factory=now)
    updated_at: str = field(default_factory=now)
    minted: bool = False

    @property
    def scope_names(self) -> set[str]:
        return {scope["name"] for scope in self.scopes}

    def view(self) -> Json:
        members: Json = {**vars(self), "broker_provider_id": "", "policy": {}}
        del members["minted"]
        return members


@dataclass
class Client:
    """A registered confidential client (RFC 6749 section 2.1)."""

    name: str
    grant_types: list[str]
    token_endpoint_auth_method: str
    scope: str
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(32))
    issued_at: str = field(default_factory=now)
    tokens_until: float = 0

    def view(self) -> Json:
        members = vars(self) | {"status": "active"}
        del members["secret"], members["tokens_until"]
        return members


@dataclass
class Authserver:
    """Everything the two listeners share."""

    issuer: str
    admin_key: str
    resources: dict[str, Resource] = field(default_factory=dict[str, Resource])
    clients: dict[str, Client] = field(default_factory=dict[str, Client])
    key: ECKey = field(
        default_factory=lambda: ECKey.generate_key(
            "P-256", {"kid": secrets.token_urlsafe(16), "use": "sig", "alg": "ES256"}
        )
    )

    def in_slug_order(self) -> list[Resource]:
        return sorted(self.resources.values(), key=lambda resource: resource.slug)

    # The public listener

    async def metadata(self, _: Request) -> Response:
        """Authorization server metadata (RFC 8414), of what this stand-in serves and no more."""
        document: Json = {
            "issuer": self.issuer,
            "token_endpoint": f"{self.issuer}/oauth/token",
            "jwks_uri": f"{self.issuer}/.well-known/jwks.json",
            "response_types_supported": [],
            "grant_types_supported": ["client_credentials"],
            "token_endpoint_auth_methods_supported": ["client_secret_basic", "client_secret_post"],
            "resource_indicators_supported": True,
        }
        if scopes := [
            scope["name"] for resource in self.in_slug_order() for scope in resource.scopes
        ]:
            document["scopes_supported"] = list(dict.fromkeys(scopes))
        return answer(document, headers={"Cache-Control": "public, max-age=3600"})

    async def jwks(self, _: Request) -> Response:
        return answer({"keys": [self.key.as_dict(private=False)]})

    async def health(self, _: Request) -> Response:
        return answer({"status": "ok", "time": now(), "db": "ok"})

    async def livez(self, _: Request) -> Response:
        return answer({"status": "alive", "time": now()})

    async def token(self, request: Request) -> Response:
        """The token endpoint, RFC 6749 section 4.4.2 with the `resource` of RFC 8707."""
        form = parse_form(await read(request, MAX_FORM_BYTES))
        if form is None:
            return oauth_error("invalid_request", "invalid form body")
        if (grant := form.get("grant_type", "")) != "client_credentials":
            return oauth_error("unsupported_grant_type", f'grant_type "{grant}" is not supported')
        basic = basic_credentials(request.headers.get("Authorization", ""))
        client_id, secret = basic or (form.get("client_id", ""), form.get("client_secret", ""))
        client = self.clients.get(client_id)
        if client is None or not hmac.compare_digest(client.secret.encode(), secret.encode()):
            return oauth_error("invalid_client", "client authentication failed")
        if grant not in client.grant_types:
            return oauth_error(
                "unauthorized_client", "client is not authorized for this grant type"
            )
        audience, scopes = self.issuer, set(client.scope.split())
        requested = set(form.get("scope", "").split())
        resource = None
        if uri := form.get("resource"):
            resource = next((one for one in self.in_slug_order() if one.uri == uri), None)
            if resource is None:
                return oauth_error(
                    "invalid_target",
                    "the requested resource target is unavailable: "
                    f'resource "{uri}" is not a registered resource',
                )
            audience = uri
        if not requested <= scopes:
            return oauth_error(
                "invalid_scope", SCOPE_REFUSED + "exceeds the client's registered scopes"
            )
        if resource and not requested <= resource.scope_names:
            return oauth_error(
                "invalid_scope", SCOPE_REFUSED + "is not declared by the target resource"
            )
        granted = requested or (scopes & resource.scope_names if resource else scopes)
        body = {
            "access_token": self.sign(client, audience, granted),
            "token_type": "Bearer",
            "expires_in": TOKEN_SECONDS,
            "scope": " ".join(sorted(granted)),
        }
        if resource:
            resource.minted = True
        return answer(body, headers={"Cache-Control": "no-store", "Pragma": "no-cache"})

    def sign(self, client: Client, audience: str, scopes: Iterable[str]) -> str:
        """Return a JWT access token (RFC 9068), and note how long the client has a live one."""
        issued = int(time.time())
        client.tokens_until = issued + TOKEN_SECONDS
        claims = {
            "iss": self.issuer,
            "sub": client.id,
            "aud": [audience],
            "client_id": client.id,
            "scope": " ".join(sorted(scopes)),
            "jti": secrets.token_urlsafe(16),
            "iat": issued,
            "nbf": issued,
            "exp": issued + TOKEN_SECONDS,
        }
        return jwt.encode({"alg": "ES256", "kid": self.key.kid, "typ": "at+jwt"}, claims, self.key)

    def public(self) -> Starlette:
        return listener(
            Route("/.well-known/oauth-authorization-server", self.metadata),
            Route("/.well-known/openid-configuration", self.metadata),
            Route("/.well-known/jwks.json", self.jwks),
            Route("/health", self.health),
            Route("/livez", self.livez),
            Route("/oauth/token", self.token, methods=["POST"]),
        )

    # The admin listener

    async def authenticate(
        self, request: Request, forward: Callable[[Request], Awaitable[Response]]
    ) -> Response:
        scheme, _, sent = request.headers.get("Authorization", "").partition(" ")
        if scheme != "Bearer" or not sent:
            reason = "missing API key"
        elif not hmac.compare_digest(sent.encode("latin-1"), self.admin_key.encode()):
            reason = "invalid API key"
        else:
            return await forward(request)
        challenge = {"WWW-Authenticate": 'Bearer realm="admin"'}
        return answer(
            {"error": "unauthorized", "error_description": reason}, 401, headers=challenge
        )

    async def all_resources(self, request: Request) -> Response:
        if request.method == "POST":
            return await self.create_resource(request)
        slug = request.query_params.get("slug")
        if slug is None:
            return answer([resource.view() for resource in self.in_slug_order()])
        found = next(
            (resource for resource in self.resources.values() if resource.slug == slug), None
        )
        return answer(found.view()) if found else problem(404, "resource not found")

    async def create_resource(self, request: Request) -> Response:
        return self.store(Resource(**await resource_members(request)), 201)

    async def one_resource(self, request: Request) -> Response:
        resource = self.resources.get(request.path_params["id"])
        if resource is None:
            return problem(404, "resource not found")
        if request.method == "PATCH":
            changes = await resource_members(request)
            return self.store(replace(resource, **changes, updated_at=now()), 200)
        if request.method == "DELETE":
            if resource.minted:
                return problem(409, "resource has references and cannot be deleted")
            del self.resources[resource.id]
            return Response(status_code=204)
        return answer(resource.view())

    def store(self, resource: Resource, status: int) -> Response:
        """Keep a new or changed resource, unless it is one that can't be."""
        if not SLUG.fullmatch(resource.slug):
            return problem(400, f'invalid slug "{resource.slug}"')
        if not all(scope.get("name") for scope in resource.scopes):
            return problem(400, "invalid scope: it has no name")
        if resource.backend_kind != "mint" or not ABSOLUTE_URI.match(resource.uri):
            return problem(500, "internal error")
        others = (other for other in self.resources.values() if other.id != resource.id)
        if any(other.slug == resource.slug for other in others):
            return problem(409, f'slug "{resource.slug}" is already in use')
        self.resources[resource.id] = resource
        return answer(resource.view(), status)

    async def all_clients(self, request: Request) -> Response:
        if request.method == "POST":
            return await self.create_client(request)
        return answer([client.view() for client in reversed(self.clients.values())])

    async def create_client(self, request: Request) -> Response:
        try:
            client = new_client(await json_members(request, CLIENT_SHAPE))
        except ValueError as error:
            return problem(400, f"client authentication failed: client validation failed: {error}")
        self.clients[client.id] = client
        view = client.view()
        shown_once = {
            "client_id": view.pop("id"),
            "client_secret": client.secret,
            "client_name": view.pop("name"),
        }
        return answer(shown_once | view, 201)

    async def one_client(self, request: Request) -> Response:
        client = self.clients.get(request.path_params["id"])
        if request.method != "DELETE":
            return answer(client.view()) if client else problem(404, "client not found")
        if client is None:
            return problem(400, "client authentication failed")
        if client.tokens_until > time.time() and request.query_params.get("force") != "true":
            return problem(409, "client has active tokens — use force=true to revoke and delete")
        del self.clients[client.id]
        return Response(status_code=204)

    def admin(self) -> Starlette:
        return listener(
            Route("/admin/resources", self.all_resources, methods=["GET", "POST"]),
            Route("/admin/resources/{id}", self.one_resource, methods=["GET", "PATCH", "DELETE"]),
            Route("/admin/clients", self.all_clients, methods=["GET", "POST"]),
            Route("/admin/clients/{id}", self.one_client, methods=["GET", "DELETE"]),
            middleware=[Middleware(BaseHTTPMiddleware, dispatch=self.authenticate)],
        )


def answer(
    body: Any,
    status: int = 200,
    media_type: str = "application/json",
    headers: dict[str, str] | None = None,
) -> Response:
    """Return a JSON response; like the real one's, its body ends with a newline."""
    text = json.dumps(body, ensure_ascii=False, separators=(",", ":")) + "\n"
    return Response(text, status, headers, media_type)


def problem(status: int, detail: str) -> Response:
    """Return an admin API error (RFC 9457): it has no `error` member."""
    body = {
        "detail": detail,
        "status": status,
        "title": HTTPStatus(status).phrase,
        "type": "about:blank",
    }
    return answer(body, status, "application/problem+json")


def oauth_error(error: str, description: str) -> Response:
    """Return a token endpoint error: RFC 6749 section 5.2, beside the members of RFC 9457."""
    status = 401 if error == "invalid_client" else 400
    body = {
        "error": error,
        "error_description": description,
        "type": f"https://docs.authplane.ai/errors/{error}",
        "title": HTTPStatus(status).phrase,
        "detail": description,
        "status": status,
    }
    headers = {"WWW-Authenticate": 'Basic realm="authserver"'} if status == 401 else None
    return answer(body, status, "application/problem+json", headers)


async def read(request: Request, limit: int) -> bytes | None:
    """Return the body, or None as soon as it is longer than limit bytes."""
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            return None
    return body


def parse_form(body: bytes | None) -> dict[str, str] | None:
    """Return the first value of each name of a form body, or None when it can't be decoded."""
    text = ";" if body is None else body.decode(errors="replace")
    if ";" in text or BAD_ESCAPE.search(text):
        return None
    return dict(reversed(parse_qsl(text, keep_blank_values=True)))


def basic_credentials(header: str) -> tuple[str, str] | None:
    """Return client id and secret of a Basic header, or None when it isn't a usable one."""
    scheme, _, value = header.partition(" ")
    try:
        pair = base64.b64decode(value, validate=True).decode(errors="replace")
    except ValueError:
        return None
    client_id, colon, secret = pair.partition(":")
    if scheme.lower() != "basic" or not colon or BAD_ESCAPE.search(pair):
        return None
    return unquote_plus(client_id), unquote_plus(secret)  # RFC 6749 section 2.3.1


async def json_members(request: Request, shape: Json, closed: bool = False) -> Json:
    """Return the members of the body that the shape names; a closed shape allows no others."""
    body = await request.json()
    check(body, shape, closed)
    return {name: value for name, value in body.items() if name in shape}


async def resource_members(request: Request) -> Json:
    try:
        return await json_members(request, RESOURCE_SHAPE, closed=True)
    except ValueError as error:
        raise HTTPException(400, f"invalid JSON body: {error}") from error


def check(value: Any, shape: Any, closed: bool) -> None:
    """Raise ValueError unless a JSON value is made as the shape is, an example of one."""
    kind, found = type(shape).__name__, type(value).__name__
    if found != kind:
        raise ValueError(f"{found} where {kind} belongs")
    if kind == "list":
        for one in value:
            check(one, shape[0], closed)
    if kind == "dict":
        for name, member in value.items():
            if name in shape:
                check(member, shape[name], closed)
            elif closed:
                raise ValueError(f'unknown field "{name}"')


def new_client(members: Json) -> Client:
    """Return the client to register; raise ValueError when it can't be."""
    client = Client(
        name=members.get("client_name", ""),
        grant_types=members.get("grant_types") or ["authorization_code"],
        token_endpoint_auth_method=members.get("token_endpoint_auth_method")
        or "client_secret_basic",
        scope=members.get("scope", ""),
    )
    if not client.name:
        raise ValueError("client_name is required")
    if client.token_endpoint_auth_method not in AUTH_METHODS:
        raise ValueError(f'unsupported method "{client.token_endpoint_auth_method}"')
    if unknown := set(client.grant_types) - GRANT_TYPES:
        raise ValueError(f'unsupported grant_type "{min(unknown)}"')
    return client


async def on_error(request: Request, error: Exception) -> Response:
    """Answer for a path or a method that isn't there; the latter is not a problem document."""
    assert isinstance(error, HTTPException)
    if error.status_code != 405:
        return problem(error.status_code, error.detail)
    headers = dict(error.headers or {})
    if request.url.path.startswith("/admin/resources"):
        headers["Allow"] = "GET, HEAD, POST"  # the real one says so of a single resource too
    return PlainTextResponse("Method Not Allowed\n", 405, headers)


def listener(*routes: Route, middleware: list[Middleware] | None = None) -> Starlette:
    return Starlette(
        routes=routes, middleware=middleware, exception_handlers={HTTPException: on_error}
    )


async def main() -> None:
    """Serve both listeners until SIGINT or SIGTERM."""
    state = Authserver(
        issuer=os.environ.get("AUTHPLANE_SERVER_ISSUER") or "http://localhost:9000",
        admin_key=os.environ.get("AUTHPLANE_ADMIN_API_KEY", ""),
    )
    await serve(
        f"stand-in for the Authplane authserver, issuer {state.issuer}",
        (os.environ.get("AUTHPLANE_SERVER_ADDRESS") or ":9000", state.public()),
        (os.environ.get("AUTHPLANE_ADMIN_ADDRESS") or ":9001", state.admin()),
    )


if __name__ == "__main__":
    asyncio.run(main())
