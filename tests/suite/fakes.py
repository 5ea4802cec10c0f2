"""Servers that do what a real one can't be made to do: lie, stall, break off."""

import re
import socket
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.client import parse_headers
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any, NamedTuple

type Answer = bytes | Iterable[bytes] | None
type Handler = Callable[[Request], Answer]
type Change = Callable[[Request, Callable[[Request], bytes]], Answer]

RESET = b"RST"  # this object, as the answer: the connection is reset
NO_LINGER = struct.pack("ii", 1, 0)


class Request(NamedTuple):
    """A request as a fake server received it; the names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    def __bytes__(self) -> bytes:
        start = f"{self.method} {self.path} HTTP/1.1"
        return message(start, self.headers | {"connection": "close"}, self.body)


def message(start: str, headers: dict[str, str], body: bytes) -> bytes:
    """Return the bytes of an HTTP request or response."""
    fields = [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join([start, *fields, "", ""]).encode() + body


def http_response(status: str, body: str | bytes = b"", **headers: str) -> bytes:
    """Return the bytes of an HTTP response; in the names of headers, _ stands for -."""
    content = body.encode() if isinstance(body, str) else body
    fields = {"content-length": str(len(content)), "connection": "close"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return message(f"HTTP/1.1 {status}", fields | named, content)


class Fake(ThreadingTCPServer):
    """A server that responds with any bytes, or with nothing at all."""

    daemon_threads, request_queue_size = True, 64

    def __init__(self, handler: Handler) -> None:
        super().__init__(("127.0.0.1", 0), BaseRequestHandler)
        self.url = f"http://localhost:{self.server_address[1]}"
        self.handler, self.requests = handler, list[Request]()

    def serve(self) -> None:
        self.serve_forever(poll_interval=0.02)

    def finish_request(self, request: Any, client_address: object) -> None:
        """Answer one request; with None as the answer, keep the connection open.

        With `RESET`, it is reset instead of closed.
        """
        with request.makefile("rb") as incoming:
            if not (line := incoming.readline().decode()):
                return  # only looked whether something listens
            method, path, _ = line.split(" ", 2)
            headers = {name.lower(): value for name, value in parse_headers(incoming).items()}
            body = incoming.read(int(headers.get("content-length", "0")))
        self.requests.append(Request(method, path, headers, body))
        answer = self.handler(self.requests[-1])
        if answer is RESET:
            request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            request.close()
            return
        with suppress(OSError):
            for part in [answer] if isinstance(answer, bytes) else answer or []:
                request.sendall(part)
            if answer is None:
                request.recv(1)  # until the client gives up

    def handle_error(self, request: object, client_address: object) -> None:
        raise  # which pytest reports

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def in_front_of(port: int, change: Change) -> Handler:
    """Return a handler that forwards requests to a server, unless `change` answers differently."""

    def forward(request: Request) -> bytes:
        with socket.create_connection(("localhost", port)) as server:
            server.sendall(bytes(request))
            return server.makefile("rb").read()

    return lambda request: change(request, forward)


def when(pattern: bytes, answer: Answer) -> Change:
    """Return a change that gives this answer to the requests in which the pattern is found."""
    return lambda sent, forward: answer if re.search(pattern, bytes(sent)) else forward(sent)


def replacing(old: bytes, new: bytes) -> Change:
    """Return a change of one thing in the responses; the length stays."""
    assert len(old) == len(new)
    return lambda sent, forward: forward(sent).replace(old, new)
