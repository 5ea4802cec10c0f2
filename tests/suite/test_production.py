"""Production: https, development mode off, a private address, and an unknown certificate."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import sys
from pathlib import Path
from textwrap import indent

import pytest
import trustme
from fastmcp import Client

from authserver_client import AuthserverClient, status_of
from pages import EXAMPLES, blocks, section
from sandbox import PYTHON, Sandbox, free_ports, replace_once, wait_until

pytestmark = pytest.mark.skipif(sys.platform == "darwin", reason="macOS has only 127.0.0.1")
ADDRESS = "127.0.0.2"  # which the SDK rejects as it rejects private addresses
ALLOW_PRIVATE = "fetch_settings=FetchSettings(allow_private_networks=True)"


@pytest.fixture
def production(sandbox: Sandbox) -> Sandbox:
    """A sandbox in which both servers have https, with certificates of different authorities."""
    servers = {"authserver": 'lifespan="off"', "mcp-server": "await mcp_app()"}
    for server, argument in servers.items():
        authority = trustme.CA()
        authority.cert_pem.write_to_path(sandbox.project / f"authority of {server}.pem")
        authority.cert_pem.write_to_path(sandbox.project / "authorities.pem", append=True)
        certificate = authority.issue_cert(ADDRESS, "localhost")
        certificate.private_key_and_cert_chain_pem.write_to_path(sandbox.project / f"{server}.pem")
        with_tls = f'{argument}, ssl_certfile="{server}.pem"'
        edit(sandbox.project / "tests/tier01/serve.py", argument, with_tls)
    allow_private_addresses(sandbox.project / "tests/tier01/mcp_server.py", "mcp_path=path")
    public, admin, mcp = sandbox.ports
    sandbox.issuer = f"https://{ADDRESS}:{public}"
    sandbox.mcp_url = f"https://{ADDRESS}:{mcp}/mcp"
    sandbox.authserver = AuthserverClient(sandbox.issuer, f"https://localhost:{admin}")
    sandbox.settings = {
        "AUTHPLANE_SERVER_ADDRESS": f"{ADDRESS}:{public}",
        "MCP_ADDRESS": f"{ADDRESS}:{mcp}",
        "AUTHPLANE_ISSUER": sandbox.issuer,
        "AUTHSERVER_URL": sandbox.issuer,
        "ADMIN_URL": sandbox.authserver.admin_url,
        "MCP_URL": sandbox.mcp_url,
        "RESOURCE_URI": sandbox.mcp_url,
        "AUTHPLANE_DEV_MODE": "",
        "SSL_CERT_FILE": "authorities.pem",
    }
    sandbox.serve()
    return sandbox


def test_the_agent_rejects_private_addresses_and_unknown_certificates(production: Sandbox) -> None:
    settings = production.settings
    rejected = production.verify(**settings).stderr
    assert rejected.startswith("verify.sh: agent: accepted: "), rejected
    allow_private_addresses(production.project / "agent.py", "auth=credentials")
    result = production.verify(**settings)
    assert (result.returncode, result.stderr) == (0, "")
    # neither verify.sh nor the agent accepts an unknown certificate of the MCP server
    settings["SSL_CERT_FILE"] = "authority of authserver.pem"
    rejected = production.verify(**settings).stderr
    assert rejected.startswith("verify.sh: no token: rejected: expected 401"), rejected
    rejected = production.verify(CURL_CA_BUNDLE="authorities.pem", **settings).stderr
    assert f"agent: {production.mcp_url}: ConnectError(" in rejected


@pytest.mark.anyio
async def test_the_relay_server_with_the_lines_of_the_page(production: Sandbox) -> None:
    """They let the server start; FASTMCP_HOST opens it to other machines."""
    [lines] = blocks(section(EXAMPLES, "Private networks and proxies"), "python")
    create = "    authplane = await AuthplaneClient.create(ISSUER, auth=CREDENTIALS)"
    program = production.project / "tests/examples/relay_server.py"
    edit(program, create, indent(lines.rstrip(), "    "))
    production.authserver.register_resource("demo-mcp", production.mcp_url, "mcp:echo")
    port = free_ports()[0]
    url = f"http://{ADDRESS}:{port}/mcp"
    settings = production.relay_settings(production.authserver.register_client(), port)
    settings["FASTMCP_HOST"] = "0.0.0.0"  # noqa: S104
    server = production.start_logged(PYTHON, program, **settings)
    wait_until(lambda: server.poll() is not None or status_of(url), f"the server, {production.log}")
    async with Client(url) as client:
        result = await client.call_tool("relay", {"text": "hello"})
    assert "hello" in str(result.content)


def allow_private_addresses(file: Path, argument: str) -> None:
    edit(file, argument, f"{argument}, {ALLOW_PRIVATE}")
    edit(file, "from authplane import ", "from authplane import FetchSettings, ")


def edit(file: Path, old: str, new: str) -> None:
    file.write_text(replace_once(file.read_text(), old, new))
