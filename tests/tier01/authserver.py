"""A stand-in for the Authplane authserver: what this example relies on, and no more.

Two apps, one for each listener, `public` and `admin`; everything is kept in memory.
"""

import base64
import contextlib
import hmac
import os
import secrets
import time
from typing import Any, Literal
from urllib.parse import parse_qsl, unquote_plus

from joserfc import jwt
from joserfc.jwk import ECKey
from pydantic import BaseModel, Field, TypeAdapter, ValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

ISSUER = os.environ.get("AUTHPLANE_SERVER_ISSUER") or "http://localhost:9000"
ADMIN_KEY = os.environ.get("AUTHPLANE_ADMIN_API_KEY", "")
TOKEN_SECONDS = int(os.environ.get("TOKEN_SECONDS") or 3600)
MAX_BODY_BYTES = 64 * 1024
METADATA = {  # RFC 8414 section 2, of what is served here
    "issuer": ISSUER,
    "token_endpoint": f"{ISSUER}/oauth/token",
    "jwks_uri": f"{ISSUER}/.well-known/jwks.json",
    "response_types_supported": [],
    "grant_types_supported": ["client_credentials"],
    "token_endpoint_auth_methods_supported": ["client_secret_basic"],
}


class Scope(BaseModel, extra="forbid"):
    name: str
    description: str = ""


class Resource(BaseModel, extra="forbid"):
    """A registered protected resource, the `resource` of RFC 8707."""

    id: str
    slug: str
    uri: str
    backend_kind: Literal["mint"]
    display_name: str
    scopes: list[Scope]


class Client(BaseModel):
    """A registered confidential client, RFC 6749 section 2.1."""

    client_id: str
    client_secret: str
    client_name: str
    grant_types: list[Literal["client_credentials"]]
    token_endpoint_auth_method: Literal["client_secret_basic"]
    scope: str
    tokens_expire: int = Field(exclude=True)


KEY_ID = secrets.token_urlsafe(16)
SIGNING_KEY = ECKey.generate_key("P-256", {"kid": KEY_ID, "use": "sig", "alg": "ES256"})
KEY_SET = {"keys": [SIGNING_KEY.as_dict(private=False)]}  # RFC 7517 section 5
resources: dict[str, Resource] = {}
clients: dict[str, Client] = {}


async def token(request: Request) -> Response:
    """Return an access token (RFC 6749 section 4.4) for the `resource` of RFC 8707."""
    fields = parse_qsl((await request.body()).decode(errors="replace"))
    form = dict(reversed(fields))  # the first of a name counts
    if form.get("grant_type") != "client_credentials":
        return token_error("unsupported_grant_type", "the grant type is not client_credentials")
    client_id, secret = basic_credentials(request.headers.get("Authorization", ""))
    client = clients.get(client_id)
    if not client or not hmac.compare_digest(client.client_secret.encode(), secret.encode()):
        return token_error("invalid_client", "client authentication failed")
    audience = form.get("resource", ISSUER)
    if "resource" in form and audience not in {resource.uri for resource in resources.values()}:
        return token_error("invalid_target", f'resource "{audience}" is not registered')
    scope = form.get("scope", client.scope)
    if not set(scope.split()) <= set(client.scope.split()):
        return token_error("invalid_scope", "the scope exceeds the client's registered scopes")
    response = {
        "access_token": access_token(client, audience, scope),
        "token_type": "Bearer",
        "expires_in": TOKEN_SECONDS,
        "scope": scope,
    }
    return JSONResponse(response, headers={"Cache-Control": "no-store"})


def basic_credentials(header: str) -> tuple[str, str]:
    """Return client id and secret (RFC 6749 section 2.3.1), both empty if the header has none."""
    scheme, _, encoded = header.partition(" ")
    with contextlib.suppress(ValueError):
        if scheme.lower() == "basic":
            client_id, _, secret = base64.b64decode(encoded, validate=True).decode().partition(":")
            return unquote_plus(client_id), unquote_plus(secret)
    return "", ""


def token_error(error: str, description: str) -> Response:
    """Return an error of the token endpoint, RFC 6749 section 5.2."""
    body = {"error": error, "error_description": description}
    if error == "invalid_client":
        return JSONResponse(body, 401, {"WWW-Authenticate": 'Basic realm="stand-in"'})
    return JSONResponse(body, 400)


def access_token(client: Client, audience: str, scope: str) -> str:
    """Return a signed JWT access token, RFC 9068 section 2."""
    issued = int(time.time())
    client.tokens_expire = issued + TOKEN_SECONDS
    claims = {
        "iss": ISSUER,
        "sub": client.client_id,
        "aud": [audience],
        "client_id": client.client_id,
        "scope": scope,
        "jti": secrets.token_urlsafe(16),
        "iat": issued,
        "nbf": issued,
        "exp": client.tokens_expire,
    }
    return jwt.encode({"alg": "ES256", "kid": KEY_ID, "typ": "at+jwt"}, claims, SIGNING_KEY)


async def check_admin_key(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Reject requests without the admin API key; if none is configured, all requests."""
    sent = request.headers.get("Authorization", "").encode("latin-1")
    if ADMIN_KEY and hmac.compare_digest(sent, f"Bearer {ADMIN_KEY}".encode()):
        return await call_next(request)
    return JSONResponse({"error": "unauthorized"}, 401, {"WWW-Authenticate": "Bearer"})


async def read_json(request: Request) -> dict[str, Any]:
    """Return the JSON object of the body; raise ValidationError if it is something else."""
    return TypeAdapter(dict[str, Any]).validate_json(await request.body())


async def list_resources(request: Request) -> Response:
    """Return all resources; with `slug`, that one alone, not an array."""
    slug = request.query_params.get("slug")
    found = [one.model_dump() for one in resources.values() if slug in (None, one.slug)]
    if not found and slug is not None:
        raise HTTPException(404)
    return JSONResponse(found if slug is None else found[0])


async def create_resource(request: Request) -> Response:
    resource = Resource.model_validate(await read_json(request) | {"id": secrets.token_urlsafe(16)})
    if resource.slug in {other.slug for other in resources.values()}:
        raise HTTPException(409)
    resources[resource.id] = resource
    return JSONResponse(resource.model_dump(), 201)


async def change_resource(request: Request) -> Response:
    resource = resources.get(request.path_params["id"])
    if not resource:
        raise HTTPException(404)
    members = resource.model_dump() | await read_json(request) | {"id": resource.id}
    resources[resource.id] = Resource.model_validate(members)
    return JSONResponse(resources[resource.id].model_dump())


async def list_clients(_: Request) -> Response:
    """Return all clients, newest first; the names of the members differ from registration's."""
    newest_first = reversed(clients.values())
    return JSONResponse([{"id": one.client_id, "name": one.client_name} for one in newest_first])


async def create_client(request: Request) -> Response:
    secret = {"client_id": secrets.token_urlsafe(16), "client_secret": secrets.token_urlsafe(32)}
    client = Client.model_validate(await read_json(request) | secret | {"tokens_expire": 0})
    clients[client.client_id] = client
    return JSONResponse(client.model_dump(), 201)


async def delete_client(request: Request) -> Response:
    client = clients.get(request.path_params["id"])
    if not client:
        raise HTTPException(404)
    if client.tokens_expire > time.time() and request.query_params.get("force") != "true":
        raise HTTPException(409, "the client has active tokens: use force=true")
    del clients[client.client_id]
    return Response(status_code=204)


public = Starlette(
    routes=[
        Route("/.well-known/oauth-authorization-server", JSONResponse(METADATA)),
        Route("/.well-known/jwks.json", JSONResponse(KEY_SET)),
        Route("/oauth/token", token, methods=["POST"]),
    ],
    max_body_size=MAX_BODY_BYTES,
)
admin = Starlette(
    routes=[
        Route("/admin/resources", list_resources),
        Route("/admin/resources", create_resource, methods=["POST"]),
        Route("/admin/resources/{id}", change_resource, methods=["PATCH"]),
        Route("/admin/clients", list_clients),
        Route("/admin/clients", create_client, methods=["POST"]),
        Route("/admin/clients/{id}", delete_client, methods=["DELETE"]),
    ],
    middleware=[Middleware(BaseHTTPMiddleware, dispatch=check_admin_key)],
    exception_handlers={ValidationError: lambda _, error: PlainTextResponse(str(error), 400)},
    max_body_size=MAX_BODY_BYTES,
)
