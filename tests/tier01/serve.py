"""Serve tier 01, or the part of it that the argument names, until SIGINT or SIGTERM."""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import stat
import sys
from collections.abc import Generator
from importlib import import_module

import uvicorn
from starlette.types import ASGIApp
from uvicorn.config import LOGGING_CONFIG

LOGGING_CONFIG["loggers"]["uvicorn.error"]["level"] = "WARNING"


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


async def serve(app: ASGIApp, listener: socket.socket) -> None:
    await Server(uvicorn.Config(app)).serve([listener])


async def serve_authserver(public: socket.socket, admin: socket.socket) -> None:
    import authserver

    ready = f"ready on :{public.getsockname()[1]} and :{admin.getsockname()[1]} (admin)"
    print(f"stand-in authorization server: issuer {authserver.ISSUER}, {ready}", flush=True)
    await asyncio.gather(serve(authserver.public, public), serve(authserver.admin, admin))


async def serve_mcp_server(listener: socket.socket) -> None:
    # in a thread: the import takes a second, and the authorization server answers meanwhile
    mcp_server = await asyncio.to_thread(import_module, "mcp_server")
    app = await mcp_server.mcp_app()
    ready = f"audience {mcp_server.RESOURCE_URI}, ready on :{listener.getsockname()[1]}"
    print(f"MCP server {mcp_server.NAME}: {ready}", flush=True)
    await serve(app, listener)


async def end_without_log() -> None:
    """End the program when its log has been deleted: so `make clean` ends it, and needs no pid."""
    while os.fstat(1).st_nlink or not stat.S_ISREG(os.fstat(1).st_mode):  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    os._exit(0)


async def main() -> None:
    """Bind all sockets before anything else, then serve."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", nargs="?", choices=["authserver", "mcp-server"])
    part = parser.parse_args().part
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(end_without_log())
        if part != "mcp-server":
            public = listen("AUTHPLANE_SERVER_ADDRESS", ":9000")
            admin = listen("AUTHPLANE_ADMIN_ADDRESS", ":9001")
            tasks.create_task(serve_authserver(public, admin))
        if part != "authserver":
            tasks.create_task(serve_mcp_server(listen("MCP_ADDRESS", ":8080")))


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM):  # process 1 of a container has no default action
        signal.signal(number, lambda _number, _frame: os._exit(0))  # there is nothing to save
    asyncio.run(main())
