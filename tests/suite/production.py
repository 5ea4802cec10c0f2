"""What test_production runs in a network of its own. It ends with exit 0 if all is as it must be.

The argument is a folder for its files.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import asyncio
import sys
from pathlib import Path
from textwrap import indent

import trustme
from fastmcp import Client
from pyroute2 import IPRoute  # on Linux only

from authserver_client import AuthserverClient, status_of
from pages import EXAMPLES, blocks, section
from sandbox import PYTHON, Sandbox, free_ports, replace_once, wait_until

ADDRESS = "10.0.0.5"
ALLOW_PRIVATE = "fetch_settings=FetchSettings(allow_private_networks=True)"


def main() -> None:
    """Run all in a sandbox whose servers have https and a private address."""
    with Sandbox(Path(sys.argv[1])) as sandbox:
        use_address()
        use_tls(sandbox)
        check_agent(sandbox)
        check_relay_server(sandbox)


def use_address() -> None:
    with IPRoute() as network:
        network.link("set", index=1, state="up")
        network.addr("add", index=1, address=ADDRESS, prefixlen=32)


def use_tls(sandbox: Sandbox) -> None:
    """Make serve.py serve https at ADDRESS, each server with a certificate of its own authority."""
    servers = {"authserver": 'lifespan="off"', "mcp-server": "await mcp_app()"}
    for server, argument in servers.items():
        authority = trustme.CA()
        authority.cert_pem.write_to_path(sandbox.project / f"authority of {server}.pem")
        authority.cert_pem.write_to_path(sandbox.project / "authorities.pem", append=True)
        certificate = authority.issue_cert(ADDRESS, "localhost")
        certificate.private_key_and_cert_chain_pem.write_to_path(sandbox.project / f"{server}.pem")
        edit(
            sandbox.project / "tests/tier01/serve.py",
            argument,
            f'{argument}, ssl_certfile="{server}.pem"',
        )
    public, admin, mcp = sandbox.ports
    sandbox.issuer = f"https://{ADDRESS}:{public}"
    sandbox.mcp_url = f"https://{ADDRESS}:{mcp}/mcp"
    sandbox.authserver = AuthserverClient(sandbox.issuer, f"https://localhost:{admin}")
    sandbox.settings = {
        "AUTHPLANE_SERVER_ADDRESS": f"{ADDRESS}:{public}",
        "MCP_ADDRESS": f"{ADDRESS}:{mcp}",
        "AUTHPLANE_ISSUER": sandbox.issuer,
        "AUTHSERVER_URL": sandbox.issuer,
        "ADMIN_URL": f"https://localhost:{admin}",
        "MCP_URL": sandbox.mcp_url,
        "RESOURCE_URI": sandbox.mcp_url,
        "AUTHPLANE_DEV_MODE": "",
        "SSL_CERT_FILE": "authorities.pem",
    }


def check_agent(sandbox: Sandbox) -> None:
    """MCP server and agent reject a private address until they are edited."""
    sandbox.serve()
    last = sandbox.log.read_text().splitlines()[-1]
    assert last.startswith(f"mcp_server.py: the authorization server {sandbox.issuer}: "), last
    allow_private_addresses(sandbox.project / "tests/tier01/mcp_server.py", "mcp_path=path")
    sandbox.serve()
    settings = sandbox.settings
    rejected = sandbox.verify(**settings).stderr
    assert rejected.startswith("verify.sh: agent: accepted: "), rejected
    allow_private_addresses(sandbox.project / "agent.py", "auth=credentials")
    result = sandbox.verify(**settings)
    assert (result.returncode, result.stderr) == (0, "")
    # neither verify.sh nor the agent accepts an unknown certificate of the MCP server
    one = settings | {"SSL_CERT_FILE": "authority of authserver.pem"}
    rejected = sandbox.verify(**one).stderr
    assert rejected.startswith("verify.sh: no token: rejected: expected 401"), rejected
    rejected = sandbox.verify(CURL_CA_BUNDLE="authorities.pem", **one).stderr
    assert rejected.startswith("verify.sh: agent: accepted: "), rejected
    assert f"agent: {sandbox.mcp_url}: ConnectError(" in rejected


def check_relay_server(sandbox: Sandbox) -> None:
    """The lines of the page let the server start; FASTMCP_HOST opens it to other machines."""
    [lines] = blocks(section(EXAMPLES, "Private networks and proxies"), "python")
    create = "    authplane = await AuthplaneClient.create(ISSUER, auth=CREDENTIALS)"
    program = sandbox.project / "tests/examples/relay_server.py"
    edit(program, create, indent(lines.rstrip(), "    "))
    port = free_ports()[0]
    url = f"http://{ADDRESS}:{port}/mcp"
    settings = sandbox.relay_settings(sandbox.authserver.register_client(), port)
    settings["FASTMCP_HOST"] = "0.0.0.0"  # noqa: S104
    server = sandbox.start_logged(PYTHON, program, **settings)
    wait_until(lambda: server.poll() or status_of(url), f"the server, {sandbox.log}")

    async def call_tool() -> None:
        async with Client(url) as client:
            result = await client.call_tool("relay", {"text": "hello"})
            assert "hello" in str(result.content)

    asyncio.run(call_tool())


def allow_private_addresses(file: Path, argument: str) -> None:
    edit(file, argument, f"{argument}, {ALLOW_PRIVATE}")
    edit(file, "from authplane import ", "from authplane import FetchSettings, ")


def edit(file: Path, old: str, new: str) -> None:
    file.write_text(replace_once(file.read_text(), old, new))


if __name__ == "__main__":
    main()
