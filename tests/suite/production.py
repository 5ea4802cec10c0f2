"""Run the agent, the MCP server and verify.sh as in production: for test_production.py only.

A proxy with a certificate is in front of each server, at an address that is not private. Nothing
leaves the network namespace: it has only a loopback interface.
"""
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import asyncio
import os
import re
import ssl
import sys
from datetime import datetime
from pathlib import Path

import trustme
from pyroute2 import IPRoute

from machine import AGENT_PYTHON, MARK, Machine, status_of, wait_until

ISSUER, MCP_URL, PRIVATE = "https://auth.example", "https://mcp.example/mcp", "10.0.0.5"
BLOCKED = f"URL resolves to blocked IP address(es): ['{PRIVATE}']"
UNTRUSTED = {
    "unknown.example": "unable to get local issuer certificate",
    "other.example": "certificate is not valid for 'other.example'",
    "expired.example": "certificate has expired",
}
REJECTED = [
    *(("AUTHPLANE_ISSUER", f"https://{name}", error) for name, error in UNTRUSTED.items()),
    *(("MCP_URL", f"https://{name}/mcp", error) for name, error in UNTRUSTED.items()),
    ("AUTHPLANE_ISSUER", "https://private.example", BLOCKED),
    ("AUTHPLANE_ISSUER", "http://auth.example", "URL must use HTTPS"),
]
NAMES = ["auth.example", "mcp.example", *UNTRUSTED]
ADDRESSES = {name: f"192.88.99.{n}" for n, name in enumerate(NAMES, 1)}  # unused since RFC 7526


def write_hosts(**others: str) -> None:
    names = ADDRESSES | {"localhost": "127.0.0.1", "private.example": PRIVATE} | others
    lines = [f"{address} {name}\n" for name, address in names.items()]
    Path(sys.argv[1]).write_text("".join(lines))  # which is mounted over /etc/hosts


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(65536):
        writer.write(data)
    writer.close()


async def start_proxy(name: str, certificate: trustme.LeafCert, port: int) -> None:
    """Accept TLS connections at the address of the name; forward them to a port of loopback."""

    async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", port)
        await asyncio.gather(copy(reader, server_writer), copy(server_reader, writer))

    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    await asyncio.start_server(forward, ADDRESSES[name], 443, ssl=context)


def start_tier01(machine: Machine) -> tuple[str, str]:
    """Start both servers: one waits while its issuer's address is private. Return a client."""
    write_hosts(**{"auth.example": PRIVATE})
    settings = {"AUTHPLANE_ISSUER": ISSUER, "RESOURCE_URI": MCP_URL, "AUTHPLANE_DEV_MODE": ""}
    machine.serve(AUTHPLANE_SERVER_ISSUER=ISSUER, **settings)
    wait_until(lambda: BLOCKED in machine.log.read_text(), BLOCKED)
    write_hosts()
    wait_until(lambda: status_of("POST", machine.mcp_url) == 401, "the MCP server")
    machine.register_resource(uri=MCP_URL)
    return machine.register_client()


def check_agent(machine: Machine, client: tuple[str, str], name: str, url: str, error: str) -> None:
    settings = {"CLIENT_ID": client[0], "CLIENT_SECRET": client[1], "RESOURCE_URI": MCP_URL}
    settings |= {"AUTHPLANE_ISSUER": ISSUER, "MCP_URL": MCP_URL, name: url}
    result = machine.run(AGENT_PYTHON, "agent.py", **settings)
    assert (result.returncode, result.stdout) == (1, ""), result
    assert re.fullmatch(f"agent: .* {url}: .*{re.escape(error)}.*\n", result.stderr), result


def check_verify(machine: Machine) -> None:
    python, seen = machine.clone / ".venv/bin/python", machine.folder / "environment"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nenv >{seen}\nexec {AGENT_PYTHON} "$@"\n')
    python.chmod(0o755)
    settings = {"ISSUER_URL": ISSUER, "MCP_URL": MCP_URL, "RESOURCE_URI": MCP_URL}
    result = machine.verify(**settings)
    assert (result.returncode, result.stderr, result.stdout.count("✓ ")) == (0, "", 14), result
    assert result.stdout.endswith("\nALL CHECKS PASSED\n"), result
    assert {f"AUTHPLANE_ISSUER={ISSUER}", "AUTHPLANE_DEV_MODE="} < {*seen.read_text().split("\n")}
    result = machine.verify(**settings | {"MCP_URL": "https://unknown.example/mcp"})
    expected = "verify.sh: no token: rejected: expected 401 .*, got no response .*\n"
    assert result.returncode == 1 and re.fullmatch(expected, result.stderr), result


async def main() -> None:
    machine, ca = Machine(Path(sys.argv[1]).parent, prepared=False), trustme.CA()
    machine.name = os.environ[MARK]  # the test outside ends what is started here
    (machine.folder / "ca.pem").write_bytes(ca.cert_pem.bytes())
    os.environ |= {"SSL_CERT_FILE": str(machine.folder / "ca.pem"), "SSL_CERT_DIR": ""}
    (public, _, mcp), past = machine.ports, datetime(2001, 1, 1)
    for name, certificate, port in [
        ("auth.example", ca.issue_cert("auth.example"), public),
        ("mcp.example", ca.issue_cert("mcp.example"), mcp),
        ("unknown.example", trustme.CA().issue_cert("unknown.example"), public),
        ("other.example", ca.issue_cert("auth.example"), public),
        ("expired.example", ca.issue_cert("expired.example", not_after=past), public),
    ]:
        await start_proxy(name, certificate, port)
    client = await asyncio.to_thread(start_tier01, machine)
    agents = [asyncio.to_thread(check_agent, machine, client, *case) for case in REJECTED]
    await asyncio.gather(asyncio.to_thread(check_verify, machine), *agents)


if __name__ == "__main__":
    with IPRoute() as network:
        network.link("set", index=1, state="up")
        network.addr("add", index=1, address="192.88.99.1", prefixlen=24)
    asyncio.run(main())
