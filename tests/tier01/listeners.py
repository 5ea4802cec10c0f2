"""Serving for both programs: their addresses, one line when a port is taken, an end at once."""

import contextlib
import os
import socket
import sys

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send


async def serve(name: str, *listeners: tuple[str, ASGIApp]) -> None:
    """Serve each app at its address until SIGINT or SIGTERM; say when all of them answer.

    An address is `:port`, on loopback only, or `host:port`. Exits with one line if it can't be had.
    """
    sockets: list[socket.socket] = []
    apps: dict[int, ASGIApp] = {}
    for address, app in listeners:
        host, _, port = address.rpartition(":")
        try:
            bound = socket.create_server((host or "127.0.0.1", int(port)))
        except (OSError, ValueError, OverflowError) as error:
            number = error.errno if isinstance(error, OSError) else None
            reason = os.strerror(number) if number else error
            sys.exit(f"{name}: can't listen on {address}: {reason}")
        bound.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio leaves ours as it is
        sockets.append(bound)
        apps[bound.getsockname()[1]] = app

    async def by_port(scope: Scope, receive: Receive, send: Send) -> None:
        port = scope["server"][1] if "server" in scope else next(iter(apps))  # no port: lifespan
        await apps[port](scope, receive, send)

    config = uvicorn.Config(by_port, log_level="info", timeout_graceful_shutdown=1)
    print(f"{name}: ready on {', '.join(address for address, _ in listeners)}", flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        await uvicorn.Server(config).serve(sockets)
