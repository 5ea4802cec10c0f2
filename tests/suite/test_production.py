"""Production: https, development mode off, an unknown certificate, and a private address."""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import asyncio
import ssl
import sys
import threading
from contextlib import suppress
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
    options = ["-n0", "-p", "no:unraisableexception", "-o", "python_functions=production_*"]
    result = sandbox.run(*NAMESPACE, sys.executable, "-m", "pytest", *options, __file__)
    assert result.returncode == 0, result.stdout


def production_with_a_public_address(new_sandbox: NewSandbox, tmp_path: Path) -> None:
    sandbox = new_sandbox()
    settings = start_tls(sandbox, PUBLIC, tmp_path)
    sandbox.serve(**settings)
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, "the MCP server")
    result = sandbox.verify(**settings)
    assert (result.returncode, result.stderr) == (0, ""), result

    # the authority of the MCP server's certificate is unknown
    settings["SSL_CERT_FILE"] = str(tmp_path / "one.pem")
    result = sandbox.verify(**settings)
    assert result.returncode == 1, result
    assert result.stderr.startswith("verify.sh: no token: rejected: "), result
    client_id, secret = sandbox.authserver.register_client()
    agent = [".venv/bin/python", "agent.py"]
    result = sandbox.run(*agent, CLIENT_ID=client_id, CLIENT_SECRET=secret, **settings)
    assert (result.returncode, result.stdout) == (1, ""), result
    assert result.stderr.startswith(f"agent: initialize at {sandbox.mcp_url}: "), result


def production_with_a_private_address(new_sandbox: NewSandbox, tmp_path: Path) -> None:
    """Server and agent reject it, and accept it after the edit that README.md shows."""
    sandbox = new_sandbox()
    settings = start_tls(sandbox, PRIVATE, tmp_path)
    server = sandbox.serve(**settings)
    rejected = f"waiting for the authorization server {sandbox.issuer}: "
    wait_until(lambda: rejected in sandbox.log.read_text(), rejected)
    server.kill()
    server.wait()
    allow_private_addresses(sandbox.clone / "tests/tier01/mcp_server.py", "mcp_path=")
    sandbox.serve(**settings)
    wait_until(lambda: status_of("POST", sandbox.mcp_url) == 401, "the MCP server")

    result = sandbox.verify(**settings)
    assert result.returncode == 1, result
    assert result.stderr.startswith("verify.sh: agent: accepted: "), result
    allow_private_addresses(sandbox.clone / "agent.py", "auth=credentials")
    result = sandbox.verify(**settings)
    assert (result.returncode, result.stderr) == (0, ""), result


def allow_private_addresses(file: Path, argument: str) -> None:
    """Insert the setting in front of this argument."""
    text = file.read_text()
    assert text.count(argument) == 1
    text = text.replace("from authplane import ", "from authplane import FetchSettings, ")
    file.write_text(text.replace(argument, ALLOW_PRIVATE + argument))


def start_tls(sandbox: Sandbox, address: str, folder: Path) -> dict[str, str]:
    """Serve both servers over TLS at this address; return the settings for production."""
    from pyroute2 import IPRoute  # on Linux only

    with IPRoute() as network:
        network.link("set", index=1, state="up")
        network.addr("add", index=1, address=address, prefixlen=32)
    authorities = [trustme.CA(), trustme.CA()]
    certificates = [authority.cert_pem.bytes() for authority in authorities]
    (folder / "one.pem").write_bytes(certificates[0])
    (folder / "both.pem").write_bytes(b"".join(certificates))
    issuer_port, _, mcp_port = sandbox.ports
    for authority, port in zip(authorities, [issuer_port, mcp_port], strict=True):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert(address).configure_cert(context)
        threading.Thread(
            target=asyncio.run, args=[forward(address, port, context)], daemon=True
        ).start()
    sandbox.issuer = f"https://{address}:{issuer_port}"
    sandbox.mcp_url = f"https://{address}:{mcp_port}/mcp"
    return {
        "AUTHSERVER_URL": sandbox.issuer,
        "AUTHPLANE_ISSUER": sandbox.issuer,
        "MCP_URL": sandbox.mcp_url,
        "RESOURCE_URI": sandbox.mcp_url,
        "AUTHPLANE_DEV_MODE": "",
        "SSL_CERT_FILE": str(folder / "both.pem"),
        "SSL_CERT_DIR": "",
    }


async def forward(address: str, port: int, context: ssl.SSLContext) -> None:
    """Forward what is sent to this address over TLS to the same port of localhost."""

    async def connect(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with suppress(OSError):  # the server is not there yet, or somebody hangs up
            server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
            await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer))
        writer.close()

    server = await asyncio.start_server(connect, address, port, ssl=context)
    await server.serve_forever()


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    data = await reader.read(65536)
    while data:
        writer.write(data)
        data = await reader.read(65536)
    writer.close()
