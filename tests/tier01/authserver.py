"""A stand-in for the Authplane authserver, as far as this example relies on it; in memory only."""

import base64
import os
import secrets
import time
from typing import Literal
from urllib.parse import parse_qsl

from joserfc import jwt
from joserfc.jwk import ECKey
from pydantic import BaseModel, Field, ValidationError
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

ISSUER = os.environ["AUTHPLANE_SERVER_ISSUER"]
ADMIN_KEY = os.environ.get("AUTHPLANE_ADMIN_API_KEY", "")
TOKEN_SECONDS = int(os.environ.get("TOKEN_SECONDS") or 3600)
METADATA = {  # RFC 8414 section 2; stand_in is for is_stand_in in requests.sh
    "issuer": ISSUER,
    "authorization_endpoint": f"{ISSUER}/oauth/authorize",  # some clients require it
    "token_endpoint": f"{ISSUER}/oauth/token",
    "jwks_uri": f"{ISSUER}/.well-known/jwks.json",
    "response_types_supported": [],
    "grant_types_supported": ["client_credentials"],
    "stand_in": True,
}
KEY_ID = secrets.token_urlsafe()
SIGNING_KEY = ECKey.generate_key("P-256", {"kid": KEY_ID, "use": "sig", "alg": "ES256"})
KEY_SET = {"keys": [SIGNING_KEY.as_dict(private=False)]}  # RFC 7517 section 5


class Resource(BaseModel, extra="forbid"):
    """A registered protected resource, the `resource` of RFC 8707."""

    slug: str
    uri: str = Field(pattern="^https?://[^/]")
    backend_kind: Literal["mint"]
    display_name: str
    scopes: list[dict[Literal["name", "description"], str]]


class Client(BaseModel):
    """A registered confidential client, RFC 6749 section 2.1."""

    client_id: str = Field(default_factory=secrets.token_urlsafe)
    client_secret: str = Field(default_factory=secrets.token_urlsafe)
    client_name: str
    grant_types: list[Literal["client_credentials"]]
    token_endpoint_auth_method: Literal["client_secret_basic"]
    scope: str
    tokens_expire: int = Field(default=0, exclude=True)


resources: dict[str, Resource] = {}  # by slug
clients: dict[str, Client] = {}  # by id


async def token(request: Request) -> Response:
    """Return an access token (RFC 6749 section 4.4) for the `resource` of RFC 8707."""
    form = dict(parse_qsl((await request.body()).decode()))
    if form.get("grant_type") != "client_credentials":
        return token_error("unsupported_grant_type", "the grant type is not client_credentials")
    client = authenticate(request.headers.get("Authorization", ""))
    if not client:
        return token_error("invalid_client", "client authentication failed")
    audience = form.get("resource", ISSUER)
    allowed = set(client.scope.split())
    if "resource" in form:
        registered = [each for each in resources.values() if each.uri == audience]
        if not registered:
            return token_error("invalid_target", f'resource "{audience}" is not registered')
        allowed &= {scope["name"] for resource in registered for scope in resource.scopes}
    requested = set(form["scope"].split()) if "scope" in form else allowed
    if not requested <= allowed:
        return token_error("invalid_scope", "a scope that the client or the resource doesn't have")
    scope = " ".join(sorted(requested))
    response = {
        "access_token": access_token(client, audience, scope),
        "token_type": "Bearer",
        "expires_in": TOKEN_SECONDS,
        "scope": scope,
    }
    return JSONResponse(response, headers={"Cache-Control": "no-store"})


def authenticate(header: str) -> Client | None:
    """Return the client whose id and secret are in the header, HTTP Basic (RFC 6749, 2.3.1).

    Nothing is percent-decoded, because ids and secrets here are URL-safe.
    """
    try:
        credentials = base64.b64decode(header.removeprefix("Basic ")).decode()
    except ValueError:
        return None
    client_id, _, secret = credentials.partition(":")
    client = clients.get(client_id)
    if client and secrets.compare_digest(client.client_secret.encode(), secret.encode()):
        return client
    return None


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
        "jti": secrets.token_urlsafe(),
        "iat": issued,
        "nbf": issued,
        "exp": client.tokens_expire,
    }
    return jwt.encode({"alg": "ES256", "kid": KEY_ID, "typ": "at+jwt"}, claims, SIGNING_KEY)


async def check_admin_key(request: Request, call_next: RequestResponseEndpoint) -> Response:
    """Reject requests without the admin API key; without a configured key, every request."""
    sent = request.headers.get("Authorization", "").encode("latin-1")
    if secrets.compare_digest(sent, f"Bearer {ADMIN_KEY}".encode()):
        return await call_next(request)
    return JSONResponse({"error": "unauthorized"}, 401, {"WWW-Authenticate": "Bearer"})


async def validation_error(_: Request, error: Exception) -> Response:
    """Return what is wrong with the JSON of a request."""
    return JSONResponse({"detail": str(error)}, 400)


async def create_resource(request: Request) -> Response:
    resource = Resource.model_validate_json(await request.body())
    if resource.slug in resources:
        return Response(status_code=409)
    resources[resource.slug] = resource
    return JSONResponse(resource.model_dump(), 201)


async def list_clients(_: Request) -> Response:
    """Return the ids of all clients, newest first."""
    return JSONResponse([{"id": client_id} for client_id in reversed(clients)])


async def create_client(request: Request) -> Response:
    client = Client.model_validate_json(await request.body())
    clients[client.client_id] = client
    return JSONResponse(client.model_dump(), 201)


async def delete_client(request: Request) -> Response:
    client = clients.get(request.path_params["id"])
    if not client:
        return Response(status_code=400)
    if client.tokens_expire > time.time() and request.query_params.get("force") != "true":
        return Response("the client has active tokens: use force=true", 409)
    del clients[client.client_id]
    return Response(status_code=204)


public = Starlette(
    routes=[
        Route("/.well-known/oauth-authorization-server", JSONResponse(METADATA)),
        Route("/.well-known/jwks.json", JSONResponse(KEY_SET)),
        Route("/oauth/token", token, methods=["POST"]),
    ]
)
admin = Starlette(
    routes=[
        Route("/admin/resources", create_resource, methods=["POST"]),
        Route("/admin/clients", list_clients),
        Route("/admin/clients", create_client, methods=["POST"]),
        Route("/admin/clients/{id}", delete_client, methods=["DELETE"]),
    ],
    exception_handlers={ValidationError: validation_error},
)
admin.add_middleware(BaseHTTPMiddleware, dispatch=check_admin_key)
