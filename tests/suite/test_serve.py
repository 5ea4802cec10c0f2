"""serve.py: it requires an authorization server, and an admin API key."""

from sandbox import Sandbox


def test_ends_without_an_authorization_server(sandbox: Sandbox) -> None:
    (sandbox.project / ".env").write_bytes(b"# caf\xe9\n")  # FastMCP would read it, as UTF-8
    sandbox.serve("mcp-server")
    last = sandbox.log.read_text().splitlines()[-1]
    assert last.startswith(f"mcp_server.py: the authorization server {sandbox.issuer}: ")


def test_the_admin_api_is_closed_without_a_key(sandbox: Sandbox) -> None:
    sandbox.serve("authserver", AUTHPLANE_ADMIN_API_KEY="")
    assert sandbox.authserver.admin("GET", "clients", headers={}).status_code == 401
