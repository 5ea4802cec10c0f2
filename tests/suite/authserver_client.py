"""Calls to an authorization server, the stand-in or a real one: its admin API, and tokens."""

from typing import Any, NamedTuple

import httpx

ADMIN_KEY = "dev-admin-key-change-me"
DIRECT: dict[str, Any] = {"trust_env": False}  # no proxy of the environment

type Credentials = tuple[str, str]  # client id and secret


class AuthserverClient(NamedTuple):
    """Calls to one authorization server."""

    url: str
    admin_url: str

    def admin(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request to the admin API."""
        options = {"headers": {"Authorization": f"Bearer {ADMIN_KEY}"}} | DIRECT | options
        return httpx.request(method, f"{self.admin_url}/admin/{path}", **options)

    def register_resource(self, slug: str, uri: str, scope: str) -> httpx.Response:
        scopes = [{"name": scope, "description": scope}]
        resource = {"slug": slug, "uri": uri, "backend_kind": "mint", "display_name": slug}
        return self.admin("POST", "resources", json=resource | {"scopes": scopes})

    def register_client(self, scope: str = "mcp:echo") -> Credentials:
        client = {"client_name": "test", "grant_types": ["client_credentials"], "scope": scope}
        client["token_endpoint_auth_method"] = "client_secret_basic"
        registered = self.admin("POST", "clients", json=client).json()
        return registered["client_id"], registered["client_secret"]

    def delete_client(self, client_id: str) -> None:
        self.admin("DELETE", f"clients/{client_id}?force=true")

    def clients(self) -> list[str]:
        """Return the ids of the registered clients, newest first."""
        return [client["id"] for client in self.admin("GET", "clients").json()]

    def request_token(self, credentials: Credentials, **form: str) -> httpx.Response:
        """Request an access token with the client_credentials grant, RFC 6749 section 4.4."""
        data = {"grant_type": "client_credentials"} | form
        return httpx.post(f"{self.url}/oauth/token", auth=credentials, data=data, **DIRECT)


def status_of(url: str) -> int:
    """Return the HTTP status, 0 when nothing responds."""
    try:
        return httpx.get(url, **DIRECT).status_code
    except httpx.TransportError:
        return 0
