"""Production: https, development mode off, an unknown certificate, and a private address."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import sys
from pathlib import Path

import trustme

from authserver_client import status_of
from conftest import NewSandbox, skip
from sandbox import Sandbox, wait_until

# when unshare ends, so does all that was started there
NAMESPACE = ["unshare", "--map-root-user", "--net", "--pid", "--kill-child", "--mount-proc"]
PUBLIC, PRIVATE = "192.88.99.1", "10.0.0.5"  # nobody uses the first since RFC 7526
ALLOW_PRIVATE = "fetch_settings=FetchSettings(allow_private_networks=True), "


def test_production(new_sandbox: NewSandbox) -> None:
    """Run the two below in a network of their own, where this machine has those addresses."""
    if sys.platform != "linux":
        skip("there is no network namespace")
    sandbox = new_sandbox("unshare")
    if sandbox.run(*NAMESPACE, "sh", "-c", "true").returncode != 0:
        skip("there is no network namespace")
    options = ["-n0", "-o", "python_functions=production_*"]
    result = sandbox.run(*NAMESPACE, sys.executable, "-m", "pytest", *options, __file__)
    assert result.returncode == 0, result.stdout


def production_with_a_public_address(new_sandbox: NewSandbox) -> None:
    sandbox = new_sandbox()
    settings = use_tls(sandbox, PUBLIC)
    sandbox.serve(AUTHPLANE_DEV_MODE="", **settings)
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, "the MCP server")
    result = sandbox.verify(**settings)
    assert (result.returncode, result.stderr) == (0, ""), result

    # the authority of the MCP server's certificate is unknown
    settings["SSL_CERT_FILE"] = str(sandbox.clone / "authorities of authserver.public.pem")
    result = sandbox.verify(**settings)
    assert result.returncode == 1, result
    assert result.stderr.startswith("verify.sh: no token: rejected: "), result
    client_id, secret = sandbox.authserver.register_client()
    agent = [".venv/bin/python", "agent.py"]
    result = sandbox.run(*agent, CLIENT_ID=client_id, CLIENT_SECRET=secret, **settings)
    assert (result.returncode, result.stdout) == (1, ""), result
    assert result.stderr.startswith(f"agent: initialize at {sandbox.mcp_url}: "), result


def production_with_a_private_address(new_sandbox: NewSandbox) -> None:
    """Server and agent reject it, and accept it after the edit that README.md shows."""
    sandbox = new_sandbox()
    settings = use_tls(sandbox, PRIVATE)
    server = sandbox.serve(AUTHPLANE_DEV_MODE="", **settings)
    rejected = f"waiting for the authorization server {sandbox.issuer}: "
    wait_until(lambda: rejected in sandbox.log.read_text(), rejected)
    server.kill()
    server.wait()
    allow_private_addresses(sandbox.clone / "tests/tier01/mcp_server.py", "mcp_path=")
    sandbox.serve(AUTHPLANE_DEV_MODE="", **settings)
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, "the MCP server")

    result = sandbox.verify(**settings)
    assert result.returncode == 1, result
    assert result.stderr.startswith("verify.sh: agent: accepted: "), result
    allow_private_addresses(sandbox.clone / "agent.py", "auth=credentials")
    result = sandbox.verify(**settings)
    assert (result.returncode, result.stderr) == (0, ""), result


def use_tls(sandbox: Sandbox, address: str) -> dict[str, str]:
    """Make serve.py serve https at this address; return the settings for production.

    The development mode is on in .env.example: verify.sh must not pass it on.
    """
    from pyroute2 import IPRoute  # on Linux only

    with IPRoute() as network:
        network.link("set", index=1, state="up")
        network.addr("add", index=1, address=address, prefixlen=32)
    program = sandbox.clone / "tests/tier01/serve.py"
    for app in ("authserver.public", "app"):
        authority = trustme.CA()
        authority.cert_pem.write_to_path(sandbox.clone / f"authorities of {app}.pem")
        authority.cert_pem.write_to_path(sandbox.clone / "authorities.pem", append=True)
        certificate = authority.issue_cert(address).private_key_and_cert_chain_pem
        certificate.write_to_path(sandbox.clone / f"{app}.pem")
        edit(program, f"uvicorn.Config({app}", f'uvicorn.Config({app}, ssl_certfile="{app}.pem"')
    issuer_port, _, mcp_port = sandbox.ports
    sandbox.issuer = f"https://{address}:{issuer_port}"
    sandbox.mcp_url = f"https://{address}:{mcp_port}/mcp"
    return {
        "AUTHPLANE_SERVER_ADDRESS": f"{address}:{issuer_port}",
        "MCP_ADDRESS": f"{address}:{mcp_port}",
        "AUTHSERVER_URL": sandbox.issuer,
        "AUTHPLANE_ISSUER": sandbox.issuer,
        "MCP_URL": sandbox.mcp_url,
        "RESOURCE_URI": sandbox.mcp_url,
        "SSL_CERT_FILE": str(sandbox.clone / "authorities.pem"),
        "SSL_CERT_DIR": "",
    }


def allow_private_addresses(file: Path, argument: str) -> None:
    """Insert the setting in front of this argument."""
    edit(file, argument, ALLOW_PRIVATE + argument)
    edit(file, "from authplane import ", "from authplane import FetchSettings, ")


def edit(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert text.count(old) == 1
    file.write_text(text.replace(old, new))
