"""Production: https, development mode off, a private address, and an unknown certificate."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import sys
from pathlib import Path

import trustme

from conftest import NewSandbox, skip_or_fail
from sandbox import Sandbox

# when unshare ends, so does all that was started there
NAMESPACE = ["unshare", "--map-root-user", "--net", "--pid", "--kill-child", "--mount-proc"]
ADDRESS = "10.0.0.5"
ALLOW_PRIVATE = "fetch_settings=FetchSettings(allow_private_networks=True)"


def test_production(new_sandbox: NewSandbox) -> None:
    """Run the one below in a network of its own, where this machine has that address."""
    sandbox = new_sandbox("unshare")
    if sys.platform != "linux" or sandbox.run(*NAMESPACE, "sh", "-c", "true").returncode != 0:
        skip_or_fail("there is no network namespace")
    options = ["-n0", "-o", "python_functions=production"]
    result = sandbox.run(*NAMESPACE, sys.executable, "-m", "pytest", *options, __file__)
    assert result.returncode == 0, result.stdout


def production(new_sandbox: NewSandbox) -> None:
    """Server and agent reject a private address before the edit that README.md shows."""
    sandbox = new_sandbox()
    use_tls(sandbox)
    sandbox.serve()
    last = sandbox.log.read_text().splitlines()[-1]
    assert last.startswith(f"mcp_server.py: the authorization server {sandbox.issuer}: "), last
    allow_private_addresses(sandbox.clone / "tests/tier01/mcp_server.py", "mcp_path=path")
    sandbox.serve()
    settings = sandbox.settings
    rejected = sandbox.verify(**settings).stderr
    assert rejected.startswith("verify.sh: agent: accepted: "), rejected
    allow_private_addresses(sandbox.clone / "agent.py", "auth=auth")
    result = sandbox.verify(**settings)
    assert (result.returncode, result.stderr) == (0, "")
    # neither verify.sh nor the agent accepts an unknown certificate of the MCP server
    settings["SSL_CERT_FILE"] = "authority of authserver.pem"
    rejected = sandbox.verify(**settings).stderr
    assert rejected.startswith("verify.sh: no token: rejected: expected 401"), rejected
    rejected = sandbox.verify(CURL_CA_BUNDLE="authorities.pem", **settings).stderr
    assert rejected.startswith("verify.sh: agent: accepted: "), rejected
    assert f"agent: {sandbox.mcp_url}: ConnectError(" in rejected


def use_tls(sandbox: Sandbox) -> None:
    """Make serve.py serve https at ADDRESS. .env.example has the development mode on."""
    from pyroute2 import IPRoute  # on Linux only

    with IPRoute() as network:
        network.link("set", index=1, state="up")
        network.addr("add", index=1, address=ADDRESS, prefixlen=32)
    program = sandbox.clone / "tests/tier01/serve.py"
    for server, argument in {
        "authserver": 'lifespan="off"',
        "mcp-server": "await mcp_app()",
    }.items():
        authority = trustme.CA()
        authority.cert_pem.write_to_path(sandbox.clone / f"authority of {server}.pem")
        authority.cert_pem.write_to_path(sandbox.clone / "authorities.pem", append=True)
        certificate = authority.issue_cert(ADDRESS, "localhost")
        certificate.private_key_and_cert_chain_pem.write_to_path(sandbox.clone / f"{server}.pem")
        edit(program, argument, f'{argument}, ssl_certfile="{server}.pem"')
    public, admin, mcp = sandbox.ports
    sandbox.issuer = f"https://{ADDRESS}:{public}"
    sandbox.mcp_url = f"https://{ADDRESS}:{mcp}/mcp"
    sandbox.settings = {
        "AUTHPLANE_SERVER_ADDRESS": f"{ADDRESS}:{public}",
        "MCP_ADDRESS": f"{ADDRESS}:{mcp}",
        "AUTHPLANE_ISSUER": sandbox.issuer,
        "AUTHSERVER_URL": sandbox.issuer,
        "ADMIN_URL": f"https://localhost:{admin}",
        "MCP_URL": sandbox.mcp_url,
        "RESOURCE_URI": sandbox.mcp_url,
        "SSL_CERT_FILE": "authorities.pem",
    }


def allow_private_addresses(file: Path, argument: str) -> None:
    edit(file, argument, f"{argument}, {ALLOW_PRIVATE}")
    edit(file, "from authplane import ", "from authplane import FetchSettings, ")


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
