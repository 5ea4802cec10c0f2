"""The agent: what it sends, every form of reply that it reads, and one line for every failure.

The cases run `agent.main` in the process of the test, with real HTTP to fake servers; a few run the
program. The gate runs them with other versions of the SDK and of Python, too.
"""

import asyncio
import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import redirect_stdout
from io import StringIO
from textwrap import dedent, indent
from typing import Any, NamedTuple
from unittest.mock import patch
from urllib.parse import parse_qsl

import agent
import pytest

import plain_agent
from conftest import StartFake
from fakes import RESET, Answer, Fake, Handler, Request, http_response
from sandbox import ROOT, Sandbox, wait_until

type Reply = Answer | Handler
type Changes = dict[str, Answer | dict[str, Any]]  # path: a response, or fields of its JSON object
type Result = subprocess.CompletedProcess[str]
type StartFakes = Callable[..., Fakes]
type Main = Callable[[], Coroutine[Any, Any, None]]

OK = "authenticated MCP initialize OK"
TOKEN = "a-token"
HOSTILE = "\x1b[2J\x9b\u202e"  # escape, C1, right-to-left override
RESULT = {"serverInfo": {"name": "demo-server"}, "instructions": HOSTILE}
REPLY = {"jsonrpc": "2.0", "id": 1, "result": RESULT}
OTHER = {"jsonrpc": "2.0", "id": 2, "result": RESULT}
ERROR = {"jsonrpc": "2.0", "id": 1, "error": {"code": -32602, "message": "Unsupported version"}}
NOTIFICATION = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "\u2028"}}
STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"
LENGTHY = b"HTTP/1.1 200 OK\r\ncontent-length: 999999999\r\n\r\n"
METADATA = "/.well-known/oauth-authorization-server"


class Outcome(NamedTuple):
    """What `agent.main` printed, what it ended with, and the CPU time of its thread."""

    printed: str
    failure: str | None
    cpu_seconds: float


class Fakes(NamedTuple):
    """A fake authorization server, a fake MCP server, and the settings to call them."""

    issuer: Fake
    mcp: Fake
    settings: dict[str, str]


def call(settings: dict[str, str], main: Main = agent.main) -> Outcome:
    """Run `agent.main` with these settings, and none of the environment."""
    environment = {
        "NO_PROXY": "localhost",  # macOS has proxies outside of the environment
        "SSL_CERT_DIR": os.curdir,  # no certificates, which take 40 ms to load: all is http
    }
    with patch.dict(os.environ, environment | settings, clear=True):
        started = time.thread_time()
        failure = None
        with redirect_stdout(StringIO()) as printed:
            try:
                asyncio.run(main())
            except SystemExit as end:
                failure = str(end.code)
        return Outcome(printed.getvalue(), failure, time.thread_time() - started)


@pytest.fixture
def fakes(fake: StartFake) -> StartFakes:
    """Start the fakes: what the MCP server responds, and changes of what the other one does."""

    def start(reply: Reply = None, changes: Changes | None = None, of_delete: Reply = b"") -> Fakes:
        def authorization_server(request: Request) -> Answer:
            usual: dict[str, dict[str, Any]] = {
                METADATA: {
                    "issuer": issuer.url,
                    "token_endpoint": f"{issuer.url}/token",
                    "jwks_uri": f"{issuer.url}/jwks",
                },
                "/jwks": {"keys": []},
                "/token": {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60},
            }
            change = (changes or {}).get(request.path, {})
            if isinstance(change, dict):
                return http_response("200 OK", json.dumps(usual[request.path] | change))
            return change

        issuer = fake(authorization_server)

        def mcp_server(request: Request) -> Answer:
            answer = of_delete if request.method == "DELETE" else reply
            return answer(request) if callable(answer) else answer

        mcp = fake(mcp_server)
        settings = {
            "MCP_URL": f"{mcp.url}/mcp",
            "AUTHPLANE_ISSUER": issuer.url,
            "CLIENT_ID": "agent",
            "CLIENT_SECRET": "secret",
            "RESOURCE_URI": "https://mcp.example/mcp",
            "AUTHPLANE_DEV_MODE": "1",
        }
        return Fakes(issuer, mcp, settings)

    return start


@pytest.fixture
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the time limits, of which the README speaks."""
    assert (agent.WAIT_SECONDS, agent.TOTAL_SECONDS) == (10, 30)
    monkeypatch.setattr(agent, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(agent, "TOTAL_SECONDS", 1.5)


def assert_fails(failure: str | None, line: str) -> None:
    """Check the line, in which … stands for any text, and what all failures have in common."""
    pattern = ".*".join(re.escape(part) for part in f"agent: {line}".split("…"))
    assert re.fullmatch(pattern, failure or ""), failure
    assert re.fullmatch("[ -~]{1,999}", failure or ""), failure


# What it sends


def test_requests_a_token_initializes_and_ends_the_session(fakes: StartFakes) -> None:
    reply = json_reply({"id": 1, "result": {"serverInfo": {"name": "other"}}}, mcp_session_id="s1")
    started = fakes(reply)
    assert call(started.settings | {"MCP_SERVER_NAME": "other"}).failure is None
    assert [r.path for r in started.issuer.requests] == [METADATA, "/jwks", "/token"]
    token = started.issuer.requests[-1]
    form = [("grant_type", "client_credentials"), ("resource", "https://mcp.example/mcp")]
    assert sorted(parse_qsl(token.body.decode())) == [*form, ("scope", "mcp:echo")]
    assert token.headers["authorization"] == "Basic YWdlbnQ6c2VjcmV0"  # agent:secret
    post, delete = started.mcp.requests
    assert [(r.method, r.path) for r in (post, delete)] == [("POST", "/mcp"), ("DELETE", "/mcp")]
    assert post.headers["authorization"] == delete.headers["authorization"] == f"Bearer {TOKEN}"
    assert post.headers["accept"] == "application/json, text/event-stream"
    assert post.headers["content-type"] == "application/json"
    session = {"mcp-session-id": "s1", "mcp-protocol-version": "2025-11-25"}
    assert not post.headers.keys() & session.keys()
    assert delete.headers.items() >= session.items()
    client = {"name": "demo-agent", "version": "0.1.0"}
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}
    body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    assert json.loads(post.body) == body


# What it reads


def json_reply(content: object, **headers: str) -> bytes:
    body = json.dumps(content)
    return http_response("200 OK", body, content_type="application/json", **headers)


def event(message: object, indent: int | None = None) -> bytes:
    """Return an event of SSE, with a `data` for each line of the message."""
    lines = json.dumps(message, ensure_ascii=False, indent=indent).replace("\n", "\ndata: ")
    return f"event: message\ndata: {lines}\n\n".encode()


def sse(*messages: object, newline: bytes = b"\n") -> bytes:
    """Return a stream with these messages; it ends when the connection does."""
    return STREAM + b"".join(map(event, messages)).replace(b"\n", newline)


def chunked(*chunks: bytes) -> bytes:
    """Return a stream in chunked transfer encoding, in which the agent receives these chunks."""
    head = STREAM.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n")
    return head + b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in (*chunks, b""))


def each_boundary(newline: bytes) -> bytes:
    """Return a stream with an event again and again, each time with another chunk boundary."""
    content = event(OTHER, indent=1).replace(b"\n", newline)
    halves = (half for n in range(1, len(content)) for half in (content[:n], content[n:]))
    return chunked(*halves, event(REPLY))


def endless(head: bytes, part: bytes = b"", pause: float = 0) -> Handler:
    """Return a handler that sends the head, then the part again and again."""

    def answer(_: Request) -> Iterator[bytes]:
        yield head
        while True:
            yield part
            time.sleep(pause)

    return answer


SPACED_JSON = json.dumps(REPLY, indent=1).replace("\n", "\n\n").encode()
PRIMED = b": hi\n\nid: 0\ndata: \n\nretry: 5\n: data: hi\ndata:%b\n\n" % json.dumps(REPLY).encode()
SPREAD = (event(NOTIFICATION) + event(REPLY, indent=1)).replace(b"\n", b"\r\n")
NEWLINES = {"LF": b"\n", "CRLF": b"\r\n", "CR": b"\r"}
REPLIES: dict[str, Reply] = {
    "JSON": json_reply(REPLY),
    "JSON with blank lines": http_response("200 OK", SPACED_JSON),
    "JSON of 250 KiB": json_reply({"padding": "x" * 250 * 1024, **REPLY}),
    "gzip": http_response("200 OK", gzip.compress(SPACED_JSON), content_encoding="gzip"),
    **{name: sse(REPLY, newline=n) for name, n in NEWLINES.items()},
    **{f"{name}, open": endless(sse(REPLY, newline=n), pause=20) for name, n in NEWLINES.items()},
    **{f"{name} at each chunk boundary": each_boundary(n) for name, n in NEWLINES.items()},
    "CRLF byte by byte": chunked(*(bytes([byte]) for byte in SPREAD)),
    "mixed newlines": sse(OTHER, REPLY).replace(b"\n\n", b"\n\r\n"),
    "Content-Type in capitals": sse(REPLY).replace(b"text/event-stream", b"Text/Event-Stream; a=b"),
    "notification first": sse(NOTIFICATION, REPLY),
    "request with the same id first": sse({"jsonrpc": "2.0", "id": 1, "method": "ping"}, REPLY),
    "reply with another id first": sse(OTHER, REPLY),
    "comments, priming event, no space": STREAM + PRIMED,
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_reads_every_form_of_reply(fakes: StartFakes, reply: Reply) -> None:
    printed, failure, _ = call(fakes(reply).settings)
    assert failure is None
    assert re.fullmatch(rf"[ -~]+\n{OK}\n", printed)
    assert json.loads(printed.splitlines()[0])["result"] == RESULT


ENDS_OF_SESSION: dict[str, Reply] = {
    "405": http_response("405 Method Not Allowed"),
    "cut off": b"HTTP/1.1 2",
    "reset": RESET,
    "no response": None,
    "a response that never ends": endless(LENGTHY, b"x" * 65536),
    "headers that never end": endless(b"HTTP/1.1 200 OK\r\n", b"a: b\r\n", pause=0.1),
}


@pytest.mark.parametrize("end", ENDS_OF_SESSION.values(), ids=ENDS_OF_SESSION)
@pytest.mark.usefixtures("short_waits")
def test_after_the_reply_nothing_fails(fakes: StartFakes, end: Reply) -> None:
    started = fakes(json_reply(REPLY, mcp_session_id="s1"), of_delete=end)
    printed, failure, cpu_seconds = call(started.settings)
    assert (failure, printed.endswith(f"\n{OK}\n"), cpu_seconds < 1) == (None, True, True)
    assert [request.method for request in started.mcp.requests] == ["POST", "DELETE"]


# How it fails

SIZE = "the response exceeds 256 KiB (ValueError)"
ENDED = "the stream ended without a response (ValueError)"
NAME = "no result.serverInfo.name 'demo-server' in"
NO_DETAILS = "no complete response"  # where an exception has no text
CHALLENGE = 'Bearer error="invalid_token", resource_metadata="http://r/meta"'
NAMES = {"serverInfo": {"name": f"{HOSTILE}demo-server"}, "instructions": "demo-server"}
STATUSES = "202 Accepted|403 Forbidden|406 Not Acceptable|421 Misdirected Request|503 Unavailable"
STALLED = endless(sse(NOTIFICATION), pause=20)
TRICKLE = endless(STREAM, b":\n\n", pause=0.1)
MCP_FAILURES: dict[str, tuple[Reply, str]] = {
    **{s: (http_response(s, json.dumps(REPLY)), f"{s}  (ValueError)") for s in STATUSES.split("|")},
    "401": (http_response("401 No", www_authenticate=CHALLENGE), f"401 No {CHALLENGE} …"),
    "307": (http_response("307 Moved", location="/mcp2"), "307 Moved /mcp2 (ValueError)"),
    "500, endless": (endless(LENGTHY.replace(b"200 OK", b"500 Oops"), b"x"), "500 Oops …"),
    "hostile": (http_response(f"401 No{HOSTILE}", location=f"a{HOSTILE}\r\n b"), "401 No…a…"),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n", "…(RemoteProtocolError)"),
    "connection reset": (RESET, f"{NO_DETAILS} (ReadError)"),
    "JSON-RPC error": (json_reply(ERROR), f"{NAME} {json.dumps(ERROR)} (ValueError)"),
    "JSON-RPC error, then the reply": (sse(ERROR, REPLY), f"{NAME} {json.dumps(ERROR)} …"),
    "no serverInfo, then the reply": (sse({"id": 1, "result": {}}, REPLY), f"{NAME} {{…{{}}}} …"),
    "HTML": (http_response("200 OK", "<html>hello</html>"), "…(JSONDecodeError)"),
    "stream of another type": (http_response("200 OK", event(REPLY)), "…(JSONDecodeError)"),
    "not an object": (json_reply([]), f"{NAME} [] (ValueError)"),
    "malformed data": (STREAM + b"data: {oops\n\n" + event(REPLY), "…(JSONDecodeError)"),
    "a number on two lines": (STREAM + b'data: {"id": 1\ndata:2}\n\n', "…(JSONDecodeError)"),
    "other name": (json_reply({"id": 1, "result": NAMES}), f"{NAME} …\\u202edemo-server…"),
    "other id": (json_reply(OTHER), f"{NAME} {json.dumps(OTHER)} (ValueError)"),
    "stream without the response": (sse(NOTIFICATION), ENDED),
    "stream whose last event has no end": (sse(REPLY)[:-1], ENDED),
    "long": (json_reply({"instructions": "long " * 9_999}), f"{NAME} …long long…(ValueError)"),
    "257 KiB": (json_reply({"padding": "x" * 257 * 1024, **REPLY}), SIZE),
    "an endless reply": (endless(LENGTHY, b"x" * 65536), SIZE),
}
for size in 1, 16, 1024:  # a flood of chunks, of events, of lines
    for part in b"\n", b"x\n":
        flood = chunked(*[(part * size)[:size]] * (256 * 1024 // size))
        MCP_FAILURES[f"chunks of {size}, {part}"] = (flood, SIZE)


@pytest.mark.parametrize(("reply", "told"), MCP_FAILURES.values(), ids=MCP_FAILURES)
def test_mcp_server(fakes: StartFakes, reply: Reply, told: str) -> None:
    started = fakes(reply)
    printed, failure, cpu_seconds = call(started.settings)
    assert_fails(failure, f"initialize at {started.mcp.url}/mcp: {told}")
    assert (printed, cpu_seconds < 2) == ("", True)
    assert [request.method for request in started.mcp.requests] == ["POST"]


WAITS: dict[str, tuple[Reply, Changes, str]] = {
    "metadata": (None, {METADATA: None}, f"access token from …: {NO_DETAILS} (TimeoutError)"),
    "token": (None, {"/token": None}, f"access token from …: {NO_DETAILS} (TimeoutError)"),
    "response": (None, {}, f"initialize at …: {NO_DETAILS} (ReadTimeout)"),
    "stalled stream": (STALLED, {}, f"initialize at …: {NO_DETAILS} (ReadTimeout)"),
    "endless stream": (TRICKLE, {}, f"initialize at …: {NO_DETAILS} (TimeoutError)"),
}


@pytest.mark.parametrize(("reply", "changes", "told"), WAITS.values(), ids=WAITS)
@pytest.mark.usefixtures("short_waits")
def test_time_limits(fakes: StartFakes, reply: Reply, changes: Changes, told: str) -> None:
    assert_fails(call(fakes(reply, changes).settings).failure, told)


def oauth_error(error: str, description: str) -> Changes:
    body = {"error": error, "error_description": description}
    return {"/token": http_response("400 Bad", json.dumps(body))}


FETCH = "…(MetadataFetchError)"
AS_FAILURES: dict[str, tuple[Changes, str]] = {
    "wrong secret": (oauth_error("invalid_client", "failed"), "…failed (invalid_client)"),
    "scope": (oauth_error("invalid_scope", "exceeds"), "…exceeds (invalid_scope)"),
    "resource": (oauth_error("invalid_target", "unknown"), "…unknown (invalid_target)"),
    "hostile": (oauth_error("invalid_scope", f"a{HOSTILE}\r\n" * 999), "…(invalid_scope)"),
    "long code": (oauth_error("x" * 5_000, ""), "…xxx"),
    "metadata of another issuer": ({METADATA: {"issuer": "https://o"}}, FETCH),
    "metadata, reset": ({METADATA: RESET}, f"…{NO_DETAILS} (MetadataFetchError)"),
    "token 503": ({"/token": http_response("503 Oops")}, "…(server_error)"),
}


@pytest.mark.parametrize(("changes", "told"), AS_FAILURES.values(), ids=AS_FAILURES)
def test_authorization_server(fakes: StartFakes, changes: Changes, told: str) -> None:
    started = fakes(None, changes)
    failure = call(started.settings).failure
    assert_fails(failure, f"access token from {started.issuer.url}: {told}")
    assert started.mcp.requests == []


HTTP = "HTTP client (check SSL_CERT_FILE, SSL_CERT_DIR, HTTP_PROXY, HTTPS_PROXY, ALL_PROXY)"
NO_SERVER = "http://localhost:1"
SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "two empty": ({"MCP_URL": "", "CLIENT_ID": ""}, "settings: MCP_URL, CLIENT_ID not set"),
    "plain http": ({"AUTHPLANE_DEV_MODE": ""}, f"access token from …: {FETCH}"),
    "no issuer": ({"AUTHPLANE_ISSUER": NO_SERVER}, f"access token from {NO_SERVER}: {FETCH}"),
    "no MCP server": ({"MCP_URL": NO_SERVER}, f"initialize at {NO_SERVER}: …(ConnectError)"),
    "bad port": ({"MCP_URL": "http://host:x/"}, "…at http://host:x/: …(InvalidURL)"),
    "not ASCII": ({"MCP_URL": "http://\xe4:x/"}, "…at http:// :x/: …(InvalidURL)"),
    "no certificates": ({"SSL_CERT_FILE": "/none"}, f"{HTTP}: …(FileNotFoundError)"),
    "no SOCKS": ({"ALL_PROXY": "socks5://localhost:1"}, f"{HTTP}: …(ImportError)"),
}


@pytest.mark.parametrize(("change", "told"), SETTINGS.values(), ids=SETTINGS)
def test_settings(fakes: StartFakes, change: dict[str, str], told: str) -> None:
    assert_fails(call(fakes().settings | change).failure, told)


# The program

BLOCK = (ROOT / "agent.py").read_text().split("# authplane:begin\n")[1].split("# authplane:end")[0]
OTHER_PROGRAM = """
import asyncio, httpx, agent
from os import environ
async def call():
    headers = {"Accept": "application/json, text/event-stream"}
%s
    print(httpx.post(environ["MCP_URL"], json=agent.INITIALIZE, headers=headers).status_code)
asyncio.run(call())
"""


def run(
    sandbox: Sandbox, settings: dict[str, str], program: str = "agent.py"
) -> subprocess.CompletedProcess[str]:
    return sandbox.run(sys.executable, program, **settings)


def test_tier01_accepts_it(servers: Sandbox, agent_settings: dict[str, str]) -> None:
    other_url = servers.mcp_url.replace("localhost", "127.0.0.1")  # than the audience
    result = run(servers, agent_settings | {"MCP_URL": other_url})
    assert (result.returncode, result.stderr) == (0, "")
    reply, verdict = result.stdout.splitlines()
    assert (json.loads(reply)["result"]["serverInfo"]["name"], verdict) == ("demo-server", OK)
    assert re.findall(r'"(\w+) /mcp \S+ 200', servers.log.read_text())[-2:] == ["POST", "DELETE"]


def test_the_block_in_another_program(sandbox: Sandbox, agent_settings: dict[str, str]) -> None:
    (sandbox.clone / "other.py").write_text(OTHER_PROGRAM % indent(dedent(BLOCK), "    "))
    result = run(sandbox, agent_settings, "other.py")
    assert (result.returncode, result.stdout) == (0, "200\n"), result


def test_a_failure_is_one_line_whatever_the_sdk_logs(sandbox: Sandbox, fakes: StartFakes) -> None:
    started = fakes(None, {"/token": http_response("503 Oops")})
    result = run(sandbox, started.settings)
    assert (result.returncode, result.stdout, result.stderr[-1]) == (1, "", "\n")
    assert_fails(result.stderr[:-1], f"access token from {started.issuer.url}: …(server_error)")


SLOW_SDK = """
import pathlib, time, unittest.mock
pathlib.Path("importing").touch()
time.sleep(0.5)
ASCredentials, AuthplaneClient = unittest.mock.Mock(), unittest.mock.AsyncMock()
"""


@pytest.mark.parametrize("sdk", ["", SLOW_SDK], ids=["in a request", "in the import of the SDK"])
def test_ctrl_c_ends_it_quietly(sandbox: Sandbox, fakes: StartFakes, sdk: str) -> None:
    started, importing = fakes(), sandbox.clone / "importing"
    if sdk:
        (sandbox.clone / "authplane.py").write_text(sdk)
    process = sandbox.start(sys.executable, "agent.py", **started.settings)
    wait_until(lambda: started.mcp.requests or importing.exists(), "the request, or the import")
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=30), process.returncode) == (("", ""), 130)


# The same without authentication


def test_the_plain_agent(fakes: StartFakes) -> None:
    mcp = fakes(json_reply(REPLY)).mcp
    printed, failure, _ = call({"MCP_URL": mcp.url}, plain_agent.main)
    assert (printed, failure) == (f"{json.dumps(REPLY)}\nMCP initialize OK\n", None)
    assert "authorization" not in mcp.requests[0].headers
