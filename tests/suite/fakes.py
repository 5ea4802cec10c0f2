"""Servers that do what a real one can't be made to do: lie, stall, break off."""

import re
import socket
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.client import parse_headers
from socketserver import BaseRequestHandler, ThreadingTCPServer
from typing import Any, NamedTuple

type Response = bytes | Iterable[bytes] | None
type Handler = Callable[[Request], Response]
type Change = Callable[[Request, Callable[[Request], bytes]], Response]


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


def http_response(status: str, body: str = "", **headers: str) -> bytes:
    """Return the bytes of an HTTP response; in the names of headers, _ stands for -."""
    content = body.encode()
    fields = {"content-length": str(len(content)), "connection": "close"}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return message(f"HTTP/1.1 {status}", fields | named, content)


class Fake(ThreadingTCPServer):
    """A server that responds with any bytes, or with nothing at all."""

    daemon_threads = True

    def __init__(self, handler: Handler) -> None:
        super().__init__(("127.0.0.1", 0), BaseRequestHandler)
        self.url = f"http://localhost:{self.server_address[1]}"
        self.handler = handler
        self.requests: list[Request] = []

    def serve(self) -> None:
        self.serve_forever(poll_interval=0.02)

    def finish_request(self, request: Any, client_address: object) -> None:
        """Respond to one request; with None as the response, keep the connection open."""
        with request.makefile("rb") as incoming:
            line = incoming.readline().decode()
            if not line:
                return  # only looked whether something listens
            method, path, _ = line.split(" ", 2)
            headers = {name.lower(): value for name, value in parse_headers(incoming).items()}
            body = incoming.read(int(headers.get("content-length", "0")))
        received = Request(method, path, headers, body)
        self.requests.append(received)
        response = self.handler(received)
        with suppress(OSError):  # the client can give up
            if response is None:
                request.recv(1)
            elif isinstance(response, bytes):
                request.sendall(response)
            else:
                for part in response:
                    request.sendall(part)

    def handle_error(self, request: object, client_address: object) -> None:
        raise  # which pytest reports

    def close(self) -> None:
        self.shutdown()
        self.server_close()


def in_front_of(port: int, change: Change) -> Handler:
    """Return a handler that forwards requests to a server, unless `change` responds itself."""

    def forward(request: Request) -> bytes:
        with socket.create_connection(("localhost", port)) as server:
            server.sendall(bytes(request))
            return server.makefile("rb").read()

    return lambda request: change(request, forward)


def when(pattern: bytes, response: Response) -> Change:
    """Return a change that responds with this to the requests in which the pattern is found."""
    return lambda sent, forward: response if re.search(pattern, bytes(sent)) else forward(sent)


def replacing(old: bytes, new: bytes) -> Change:
    """Return a change of one thing in the responses; the length stays."""
    assert len(old) == len(new)
    return lambda sent, forward: forward(sent).replace(old, new)
