"""Serve tier 01, or the part of it that the argument names, until SIGINT or SIGTERM."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Generator

import uvicorn.config

uvicorn.config.LOGGING_CONFIG["loggers"]["uvicorn.error"]["level"] = "WARNING"


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None]:
        """Leave the signals to this program."""
        yield


def listen(variable: str, default: str) -> socket.socket:
    """Listen on the address in the environment: `:port`, on loopback only, or `host:port`."""
    address = os.environ.get(variable) or default
    host, _, port = address.rpartition(":")
    try:
        listener = socket.create_server((host or "127.0.0.1", int(port)))
    except OSError as error:
        sys.exit(f"serve.py: can't listen on {address}: {os.strerror(error.errno or 0)}")
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio leaves ours as it is
    return listener


async def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["authserver", "mcp-server"])
    part = parser.parse_args().part
    async with asyncio.TaskGroup() as servers:
        if part != "mcp-server":
            import authserver

            public = listen("AUTHPLANE_SERVER_ADDRESS", ":9000")
            admin = listen("AUTHPLANE_ADMIN_ADDRESS", ":9001")
            servers.create_task(Server(uvicorn.Config(authserver.public)).serve([public]))
            servers.create_task(Server(uvicorn.Config(authserver.admin)).serve([admin]))
            print(f"stand-in authorization server: issuer {authserver.ISSUER}, ready", flush=True)
        if part != "authserver":
            listener = listen("MCP_ADDRESS", ":8080")
            from mcp_server import NAME, RESOURCE_URI, mcp_app

            app = await mcp_app()
            servers.create_task(Server(uvicorn.Config(app)).serve([listener]))
            print(f"MCP server {NAME}: audience {RESOURCE_URI}, ready", flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # process 1 of a container has no default action
        signal.signal(number, lambda _number, _frame: os._exit(0))  # there is nothing to save
    asyncio.run(main())
