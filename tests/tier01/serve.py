"""Serve tier 01 until SIGINT or SIGTERM: both servers, or the one that the argument names."""

import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
from collections.abc import Generator

import uvicorn.config

uvicorn.config.LOGGING_CONFIG["loggers"]["uvicorn.error"]["level"] = "WARNING"
SERVERS = ["authserver", "mcp-server"]


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
        reason = os.strerror(error.errno or 0)
        sys.exit(f"can't listen on {address}: {reason}. Set another port in .env")
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio leaves ours as it is
    return listener


async def main() -> None:
    """Print a line for each server when it is ready. Raises SystemExit if one can't be."""
    chosen = sys.argv[1:] or SERVERS
    async with asyncio.TaskGroup() as servers:
        if "authserver" in chosen:
            import authserver

            public = listen("AUTHPLANE_SERVER_ADDRESS", ":9000")
            admin = listen("AUTHPLANE_ADMIN_ADDRESS", ":9001")
            for app, listener in ((authserver.public, public), (authserver.admin, admin)):
                servers.create_task(Server(uvicorn.Config(app, lifespan="off")).serve([listener]))
            print(f"stand-in authorization server: issuer {authserver.ISSUER}, ready", flush=True)
        if "mcp-server" in chosen:
            from mcp_server import NAME, RESOURCE_URI, mcp_app

            app = await mcp_app()
            listener = listen("MCP_ADDRESS", ":8080")
            servers.create_task(Server(uvicorn.Config(app)).serve([listener]))
            print(f"MCP server {NAME}: audience {RESOURCE_URI}, ready", flush=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # process 1 of a container has no default action
        signal.signal(number, lambda _number, _frame: os._exit(0))  # there is nothing to save
    logging.captureWarnings(True)  # a module that the SDK imports is deprecated
    asyncio.run(main())
