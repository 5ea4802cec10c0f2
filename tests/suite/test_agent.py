"""The agent: what it sends, the forms of a reply that it reads, and one line for each failure.

The cases run `agent.main` in the process of the test, with real HTTP to fake servers; a few run the
program. The gate runs them with other versions of the SDK and of Python, too.
"""

import asyncio
import json
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from textwrap import dedent, indent
from typing import NamedTuple
from unittest.mock import patch
from urllib.parse import parse_qsl

import agent
import pytest

from conftest import StartFake
from fakes import Fake, Request, Response, http_response
from sandbox import ROOT, Sandbox, wait_until

type StartFakes = Callable[..., Fakes]

OK = "authenticated MCP initialize OK"
HOSTILE = "\x1b[2J\x9b\u202e"  # escape, C1, right-to-left override
RESULT = {"serverInfo": {"name": "demo-server"}, "instructions": HOSTILE}
REPLY = {"jsonrpc": "2.0", "id": 1, "result": RESULT}
OTHER_ID = {"jsonrpc": "2.0", "id": 2, "result": RESULT}
OTHER_NAME = {"jsonrpc": "2.0", "id": 1, "result": {"serverInfo": {"name": "demo-server-2"}}}
ERROR = {"jsonrpc": "2.0", "id": 1, "error": {"code": -32602, "message": "Unsupported version"}}
NOTIFICATION = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "\u2028"}}
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
METADATA = "/.well-known/oauth-authorization-server"


class Outcome(NamedTuple):
    """What `agent.main` printed, and what it ended with."""

    printed: str
    failure: str | None


class Fakes(NamedTuple):
    """A fake authorization server, a fake MCP server, and the settings to call them."""

    issuer: Fake
    mcp: Fake
    settings: dict[str, str]


def call(settings: dict[str, str]) -> Outcome:
    """Run `agent.main` with these settings, and none of the environment."""
    no_proxy = {"NO_PROXY": "localhost"}  # macOS has proxies outside of the environment
    environment = patch.dict(os.environ, no_proxy | settings, clear=True)
    with environment, redirect_stdout(StringIO()) as printed:
        try:
            asyncio.run(agent.main())
        except SystemExit as end:
            return Outcome(printed.getvalue(), str(end.code))
        return Outcome(printed.getvalue(), None)


def json_reply(content: object, **headers: str) -> bytes:
    body = json.dumps(content)
    return http_response("200 OK", body, content_type="application/json", **headers)


TOKEN = json_reply({"access_token": "a-token", "token_type": "Bearer", "expires_in": 60})


@pytest.fixture
def fakes(fake: StartFake) -> StartFakes:
    """Start the fakes, with responses to `initialize`, to the token request, and to DELETE."""

    def start(reply: Response = None, token: Response = TOKEN, end: Response = b"") -> Fakes:
        def authorization_server(request: Request) -> Response:
            metadata = {
                "issuer": issuer.url,
                "token_endpoint": f"{issuer.url}/token",
                "jwks_uri": f"{issuer.url}/jwks",
            }
            responses = {
                METADATA: json_reply(metadata),
                "/jwks": json_reply({"keys": []}),
                "/token": token,
            }
            return responses[request.path]

        issuer = fake(authorization_server)
        mcp = fake(lambda request: end if request.method == "DELETE" else reply)
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


def assert_fails(failure: str | None, line: str) -> None:
    """Check the line, in which … stands for any text, and what all failures have in common."""
    pattern = ".*".join(re.escape(part) for part in f"agent: {line}".split("…"))
    assert re.fullmatch(pattern, failure or ""), failure
    assert re.fullmatch("[ -~]{1,999}", failure or ""), failure


# What it sends


def test_requests_a_token_initializes_and_ends_the_session(fakes: StartFakes) -> None:
    started = fakes(json_reply(OTHER_NAME, mcp_session_id="s1"))
    assert call(started.settings | {"MCP_SERVER_NAME": "demo-server-2"}).failure is None
    assert [r.path for r in started.issuer.requests] == [METADATA, "/jwks", "/token"]
    token = started.issuer.requests[-1]
    form = [("grant_type", "client_credentials"), ("resource", "https://mcp.example/mcp")]
    assert sorted(parse_qsl(token.body.decode())) == [*form, ("scope", "mcp:echo")]
    assert token.headers["authorization"] == "Basic YWdlbnQ6c2VjcmV0"  # agent:secret
    post, delete = started.mcp.requests
    assert [(r.method, r.path) for r in (post, delete)] == [("POST", "/mcp"), ("DELETE", "/mcp")]
    assert post.headers["authorization"] == delete.headers["authorization"] == "Bearer a-token"
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

STREAM = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n\r\n"
PRIMED = f": ping\n\nid: 0\ndata: \n\nretry: 5\n: data: no\ndata:{json.dumps(REPLY)}\n\n".encode()


def events(*messages: object, newline: str = "\n") -> bytes:
    """Return events of SSE, with a `data` for each line of a message."""
    text = ""
    for message in messages:
        lines = json.dumps(message, ensure_ascii=False, indent=1).replace("\n", "\ndata: ")
        text += f"event: message\ndata: {lines}\n\n"
    return text.replace("\n", newline).encode()


def byte_by_byte(content: bytes) -> bytes:
    """Return a stream in chunked transfer encoding, with a chunk for each byte."""
    head = STREAM.replace(b"\r\n\r\n", b"\r\ntransfer-encoding: chunked\r\n\r\n")
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in content)
    return head + chunks + b"0\r\n\r\n"


def left_open(content: bytes, part: bytes = b"") -> Iterator[bytes]:
    """Yield the beginning of a stream, then for five seconds the part again and again."""
    yield STREAM + content
    for _ in range(50):
        time.sleep(0.1)
        yield part


REPLIES: dict[str, Response] = {
    "JSON of 250 KiB": http_response("200 OK", json.dumps(REPLY).ljust(250 * 1024, "\n")),
    "LF, left open": left_open(events(REPLY)),
    "CR LF, left open": left_open(events(REPLY, newline="\r\n")),
    "CR, left open": left_open(events(REPLY, newline="\r")),
    "byte by byte": byte_by_byte(events(NOTIFICATION, REPLY, newline="\r\n")),
    "other messages first": STREAM + events(NOTIFICATION, PING, OTHER_ID, REPLY),
    "comments, priming event, no space": STREAM + PRIMED,
    "type in capitals": STREAM.replace(b"text/event", b"Text/Event") + events(REPLY),
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_reads_every_form_of_reply(fakes: StartFakes, reply: Response) -> None:
    printed, failure = call(fakes(reply).settings)
    assert failure is None
    assert re.fullmatch(rf"[ -~]+\n{OK}\n", printed)
    assert json.loads(printed.splitlines()[0]) == REPLY


def test_after_the_reply_a_session_that_breaks_off_is_no_failure(fakes: StartFakes) -> None:
    started = fakes(json_reply(REPLY, mcp_session_id="s1"), end=b"HTTP/1.1 2")
    assert call(started.settings).failure is None
    assert [request.method for request in started.mcp.requests] == ["POST", "DELETE"]


# How it fails

NAME = "no result.serverInfo.name 'demo-server' in"
CHALLENGE = 'Bearer error="invalid_token"'
TOO_LARGE = "the response is too large, or in too many chunks (ValueError)"
FAILURES: dict[str, tuple[Response, str]] = {
    "401": (http_response("401 No", www_authenticate=CHALLENGE), f"401 No {CHALLENGE} …"),
    "307": (http_response("307 Moved", location="/mcp2"), "307 Moved /mcp2 (ValueError)"),
    "hostile and long": (http_response(f"500 No{HOSTILE * 999}"), "500 No…"),
    "HTML": (http_response("200 OK", "<html>hello</html>"), "…(JSONDecodeError)"),
    "JSON-RPC error": (STREAM + events(ERROR), f"{NAME} {json.dumps(ERROR)} (ValueError)"),
    "other name": (json_reply(OTHER_NAME), f"{NAME} {json.dumps(OTHER_NAME)} (ValueError)"),
    "other id": (json_reply(OTHER_ID), f"{NAME} {json.dumps(OTHER_ID)} (ValueError)"),
    "257 KiB": (http_response("200 OK", "x" * 257 * 1024), TOO_LARGE),
    "a flood of chunks": (byte_by_byte(b"x" * 20_000), TOO_LARGE),
    "no reply": (STREAM + events(NOTIFICATION), "the stream ended without a response …"),
}


@pytest.mark.parametrize(("reply", "line"), FAILURES.values(), ids=FAILURES)
def test_mcp_server(fakes: StartFakes, reply: Response, line: str) -> None:
    started = fakes(reply)
    printed, failure = call(started.settings)
    assert_fails(failure, f"initialize at {started.mcp.url}/mcp: {line}")
    assert printed == ""
    assert [request.method for request in started.mcp.requests] == ["POST"]


@pytest.mark.parametrize("code", ["invalid_client", "invalid_scope", "invalid_target"])
def test_authorization_server(fakes: StartFakes, code: str) -> None:
    body = {"error": code, "error_description": f"failed\r\n{HOSTILE}"}
    started = fakes(token=http_response("400 Bad Request", json.dumps(body)))
    line = f"access token from {started.issuer.url}: …failed…({code})"
    assert_fails(call(started.settings).failure, line)
    assert started.mcp.requests == []


ENDLESS = left_open(events(NOTIFICATION), b": ping\n\n")
WAITS: dict[str, tuple[Response, Response, str]] = {
    "token": (None, None, "access token from …: no complete response (TimeoutError)"),
    "response": (None, TOKEN, "initialize at …: no complete response (ReadTimeout)"),
    "endless stream": (ENDLESS, TOKEN, "initialize at …: no complete response (TimeoutError)"),
}


@pytest.mark.parametrize(("reply", "token", "line"), WAITS.values(), ids=WAITS)
def test_time_limits(
    fakes: StartFakes, monkeypatch: pytest.MonkeyPatch, reply: Response, token: Response, line: str
) -> None:
    monkeypatch.setattr(agent, "WAIT_SECONDS", 0.5)
    monkeypatch.setattr(agent, "TOTAL_SECONDS", 1.5)
    assert_fails(call(fakes(reply, token).settings).failure, line)


def test_a_silent_authorization_server(fakes: StartFakes, fake: StartFake) -> None:
    """The SDK's own time limit is 10 seconds."""
    silent = fake(lambda _: None)
    failure = call(fakes().settings | {"AUTHPLANE_ISSUER": silent.url}).failure
    assert_fails(failure, f"access token from {silent.url}: …no complete response (…Error)")


SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "two empty": ({"MCP_URL": "", "CLIENT_ID": ""}, "settings: MCP_URL, CLIENT_ID not set"),
    "no MCP server": ({"MCP_URL": "http://localhost:1"}, "initialize at …:1: …(ConnectError)"),
    "no certificates": ({"SSL_CERT_FILE": "/none"}, "HTTP client (…SSL_CERT_FILE…)"),
    "no SOCKS": ({"ALL_PROXY": "socks5://localhost:1"}, "HTTP client (…ALL_PROXY…)"),
}


@pytest.mark.parametrize(("change", "line"), SETTINGS.values(), ids=SETTINGS)
def test_settings(fakes: StartFakes, change: dict[str, str], line: str) -> None:
    assert_fails(call(fakes().settings | change).failure, line)


# The program

BLOCK = (ROOT / "agent.py").read_text().split("# authplane:begin\n")[1].split("# authplane:end")[0]
OTHER_PROGRAM = """
import asyncio
from os import environ
import httpx
import agent

async def call():
    headers = {"Accept": "application/json, text/event-stream"}
%s
    print(httpx.post(environ["MCP_URL"], json=agent.INITIALIZE, headers=headers).status_code)

asyncio.run(call())
"""


def test_tier01_accepts_it(servers: Sandbox, agent_settings: dict[str, str]) -> None:
    other_url = servers.mcp_url.replace("localhost", "127.0.0.1")  # than the audience
    settings = agent_settings | {"MCP_URL": other_url}
    result = servers.run(sys.executable, "agent.py", **settings)
    assert (result.returncode, result.stderr) == (0, "")
    reply, verdict = result.stdout.splitlines()
    assert (json.loads(reply)["result"]["serverInfo"]["name"], verdict) == ("demo-server", OK)
    assert re.findall(r'"(\w+) /mcp \S+ 200', servers.log.read_text())[-2:] == ["POST", "DELETE"]


def test_the_block_in_another_program(sandbox: Sandbox, agent_settings: dict[str, str]) -> None:
    (sandbox.clone / "other.py").write_text(OTHER_PROGRAM % indent(dedent(BLOCK), "    "))
    result = sandbox.run(sys.executable, "other.py", **agent_settings)
    assert (result.returncode, result.stdout) == (0, "200\n"), result


def test_a_failure_is_one_line_whatever_the_sdk_logs(sandbox: Sandbox, fakes: StartFakes) -> None:
    started = fakes(token=http_response("503 Oops"))
    result = sandbox.run(sys.executable, "agent.py", **started.settings)
    assert (result.returncode, result.stdout, result.stderr[-1]) == (1, "", "\n")
    assert_fails(result.stderr[:-1], f"access token from {started.issuer.url}: …(server_error)")


def test_ctrl_c_ends_it_quietly(sandbox: Sandbox, fakes: StartFakes) -> None:
    started = fakes()
    process = sandbox.start(sys.executable, "agent.py", **started.settings)
    wait_until(lambda: started.mcp.requests, "the request")
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=30), process.returncode) == (("", ""), 130)
