"""Servers that do what a real one can't be made to do: lie, stall, break off."""

import socket
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import httpx


@dataclass(frozen=True)
class Request:
    """A request as a fake server received it; the names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


type Answer = bytes | Iterable[bytes] | None
type Handler = Callable[[Request], Answer]
type Change = Callable[[Request, Handler], Answer]


@dataclass
class Fake:
    """A server that responds with any bytes, or with nothing at all."""

    handler: Handler
    requests: list[Request] = field(default_factory=list[Request])
    closing: threading.Event = field(default_factory=threading.Event)
    listener: socket.socket = field(
        default_factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=64)
    )

    @property
    def url(self) -> str:
        return f"http://localhost:{self.listener.getsockname()[1]}"

    def serve(self) -> None:
        while not self.closing.is_set():
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        """Answer one request, then close; with None as the answer, keep the connection open."""
        with connection, connection.makefile("rb") as incoming:
            if not (line := incoming.readline()):
                return  # only looked whether something listens
            method, path, _ = line.decode().split(" ", 2)
            headers: dict[str, str] = {}
            while line := incoming.readline().decode().strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = incoming.read(int(headers.get("content-length", "0")))
            request = Request(method, path, headers, body)
            self.requests.append(request)
            answer = self.handler(request)
            try:
                for part in [answer] if isinstance(answer, bytes) else answer or []:
                    connection.sendall(part)
            except OSError:
                return
            if answer is None:
                self.closing.wait(60)

    def close(self) -> None:
        self.closing.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


def http(status: str, body: str | bytes = b"", **headers: str) -> bytes:
    """Return the bytes of an HTTP response; in the names of headers, _ stands for -."""
    content = body.encode() if isinstance(body, str) else body
    fields = {"content_length": str(len(content)), "connection": "close"} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + content


def in_front_of(base: str, change: Change) -> Handler:
    """Return a handler that forwards requests to a server, unless `change` answers differently."""

    def forward(request: Request) -> Answer:
        headers = {name: request.headers[name] for name in request.headers.keys() - {"host"}}
        url = base + request.path
        with httpx.Client(trust_env=False, timeout=10) as client:
            answer = client.request(request.method, url, headers=headers, content=request.body)
        kept = {
            name: answer.headers[name]
            for name in ("content-type", "www-authenticate", "mcp-session-id")
            if name in answer.headers
        }
        return http(f"{answer.status_code} {answer.reason_phrase}", answer.content, **kept)

    return lambda request: change(request, forward)


def always(path: str, answer: Answer, method: str = "") -> Change:
    """Return a change that gives one answer to every request whose path starts so."""

    def change(request: Request, forward: Handler) -> Answer:
        named = request.path.startswith(path) and method in ("", request.method)
        return answer if named else forward(request)

    return change
