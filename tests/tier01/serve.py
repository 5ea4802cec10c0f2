"""Serve tier 01 until SIGINT or SIGTERM: both servers, or the one that the argument names."""

import asyncio
import logging
import os
import socket
import sys

import uvicorn


def listen(variable: str) -> socket.socket:
    """Listen on the address in the environment: `:port`, on loopback only, or `host:port`."""
    address = os.environ[variable]
    host, _, port = address.rpartition(":")
    try:
        listener = socket.create_server((host or "127.0.0.1", int(port)))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        sys.exit(
            f"can't listen on {address}: {reason}. If a tier 01 is starting there, run the command"
            " again: it will be used. If not, set another port in .env"
        )
    # else each response on a kept connection waits 40 ms
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listener


async def main() -> None:
    """Print `ready` when the chosen servers listen. Raises SystemExit if one can't start."""
    chosen = sys.argv[1:] or ["authserver", "mcp-server"]
    async with asyncio.TaskGroup() as tasks:
        if "authserver" in chosen:
            import authserver

            public = listen("AUTHPLANE_SERVER_ADDRESS")
            admin = listen("AUTHPLANE_ADMIN_ADDRESS")
            for app, listener in ((authserver.public, public), (authserver.admin, admin)):
                config = uvicorn.Config(app, lifespan="off", timeout_graceful_shutdown=0)
                tasks.create_task(uvicorn.Server(config).serve([listener]))
            print(f"stand-in authorization server: issuer {authserver.ISSUER}")
        if "mcp-server" in chosen:
            from mcp_server import NAME, RESOURCE_URI, mcp_app

            config = uvicorn.Config(await mcp_app(), timeout_graceful_shutdown=0)
            listener = listen("MCP_ADDRESS")
            tasks.create_task(uvicorn.Server(config).serve([listener]))
            print(f"MCP server {NAME}: audience {RESOURCE_URI}")
        print("ready", flush=True)


if __name__ == "__main__":
    print("process", os.getpid(), flush=True)  # background.py reads it
    logging.captureWarnings(True)  # a module that the SDK imports is deprecated
    asyncio.run(main())
