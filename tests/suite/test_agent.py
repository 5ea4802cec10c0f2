"""agent.py: what it sends, what it reads, and one line for each failure."""

import json
import re
import sys
from collections.abc import Callable
from subprocess import CompletedProcess
from urllib.parse import parse_qsl

import pytest

from fakes import Request, Response, StartFake, http_response
from sandbox import ROOT, Sandbox, replace_once

type Ended = tuple[CompletedProcess[str], list[Request]]
type Call = Callable[..., Ended]

AGENT = (ROOT / "agent.py").read_text()
SHORT_TIMEOUTS = replace_once(
    replace_once(AGENT, "timeout=10", "timeout=1"), "timeout=30", "timeout=4"
)
WITHOUT_AUTH = re.sub("(?s)# authplane:begin.*# authplane:end", "", AGENT)

METADATA_REQUEST = "GET /.well-known/oauth-authorization-server"
TOKEN = '{"access_token": %s, "token_type": "Bearer", "expires_in": 60}'
CONTROLS = "\x1b[2J\x9b\u202e"  # escape, C1, right-to-left override
RESULT = {"serverInfo": {"name": "demo-server"}, "instructions": f"\u2028{CONTROLS}"}
REPLY = json.dumps({"jsonrpc": "2.0", "id": 1, "result": RESULT}, ensure_ascii=False)
OTHER_ID = replace_once(REPLY, '"id": 1', '"id": 2')
OTHER_SERVER = replace_once(REPLY, "demo-server", "other-server")


@pytest.fixture
def call(start_fake: StartFake, sandbox: Sandbox) -> Call:
    """Run the program with a fake that is both servers; return the requests to it, too."""

    def run(changed: dict[str, Response], program: str = AGENT, **settings: str) -> Ended:
        server = start_fake(lambda request: responses[f"{request.method} {request.path}"])
        url = server.url
        metadata = {"issuer": url, "token_endpoint": f"{url}/token", "jwks_uri": f"{url}/jwks"}
        responses = {
            METADATA_REQUEST: http_response("200 OK", json.dumps(metadata)),
            "GET /jwks": http_response("200 OK", '{"keys": []}'),
            "POST /token": http_response("200 OK", TOKEN % '"a-token"'),
            "POST /mcp": http_response("200 OK", REPLY, mcp_session_id="s1"),
            "DELETE /mcp": http_response("204 No Content"),
        } | changed
        environment = {
            "MCP_URL": f"{url}/mcp",
            "AUTHPLANE_ISSUER": url,
            "CLIENT_ID": "agent",
            "CLIENT_SECRET": "secret",
            "RESOURCE_URI": "https://mcp.example/mcp",
            "AUTHPLANE_DEV_MODE": "true",
        } | settings
        return sandbox.run(sys.executable, "-c", program, **environment), server.requests

    return run


def assert_accepts(result: CompletedProcess[str]) -> None:
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"{json.dumps(json.loads(REPLY))}\nMCP initialize OK\n"


def assert_fails(result: CompletedProcess[str], text: str) -> None:
    """Check that the program says this, in one line that does nothing to a terminal."""
    assert (result.returncode, result.stdout) == (1, "")
    assert re.fullmatch("agent: [ -~]{1,999}\n", result.stderr)
    assert text in result.stderr


def test_what_it_sends(call: Call) -> None:
    reply = http_response("200 OK", OTHER_SERVER, mcp_session_id="s1")
    result, requests = call({"POST /mcp": reply}, MCP_SERVER_NAME="other-server")
    assert (result.returncode, result.stderr) == (0, "")
    sent = [f"{each.method} {each.path}" for each in requests]
    assert sent == [METADATA_REQUEST, "GET /jwks", "POST /token", "POST /mcp", "DELETE /mcp"]
    token, post, delete = requests[2:]
    assert token.headers["authorization"] == "Basic YWdlbnQ6c2VjcmV0"  # agent:secret
    form = [("grant_type", "client_credentials"), ("resource", "https://mcp.example/mcp")]
    assert sorted(parse_qsl(token.body.decode())) == [*form, ("scope", "mcp:echo")]
    assert post.headers["authorization"] == delete.headers["authorization"] == "Bearer a-token"
    assert post.headers["accept"] == "application/json, text/event-stream"
    assert post.headers["content-type"] == "application/json"
    client = {"name": "demo-agent", "version": "0.1.0"}
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}
    request = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    assert json.loads(post.body) == request
    assert delete.headers["mcp-session-id"] == "s1"
    assert "mcp-protocol-version" not in post.headers | delete.headers


def test_without_the_marked_lines_it_needs_one_setting(
    start_fake: StartFake, sandbox: Sandbox
) -> None:
    server = start_fake(lambda _: http_response("200 OK", REPLY))
    assert_accepts(sandbox.run(sys.executable, "-c", WITHOUT_AUTH, MCP_URL=server.url))
    [post] = server.requests
    assert "authorization" not in post.headers


FAILED_DELETES = {"cut off": b"HTTP/1.1 2", "silent": None}


@pytest.mark.parametrize("end", FAILED_DELETES.values(), ids=FAILED_DELETES)
def test_the_end_of_the_session_may_fail(call: Call, end: Response) -> None:
    result, requests = call({"DELETE /mcp": end}, SHORT_TIMEOUTS)
    assert_accepts(result)
    assert requests[-1].method == "DELETE"


HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: Text/Event-Stream; charset=UTF-8\r\n"
EVENT = f"event: message\ndata: {REPLY}\n\n"
LINES = json.dumps(json.loads(REPLY), indent=1).replace("\n", "\ndata: ")
PING = 'data: {"jsonrpc": "2.0", "id": 1, "method": "ping"}\n\n'
STREAMS = {
    "LF": EVENT,
    "CR LF": EVENT.replace("\n", "\r\n"),
    "CR": EVENT.replace("\n", "\r"),
    "several lines": f"data: {LINES}\n\n",
    "other messages": f'data: {{"method": "a"}}\n\n{PING}data: {OTHER_ID}\n\n{EVENT}',
    "comments, no data, no space": f": ping\n\nid: 0\ndata:\n\n: data: no\ndata:{REPLY}\n\n",
    "no JSON object": f"event: ping\ndata: ping\n\ndata: [1]\n\n{EVENT}",
}


def byte_by_byte(stream: str) -> bytes:
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in stream.encode())
    return HEAD + b"transfer-encoding: chunked\r\n\r\n" + chunks


@pytest.mark.parametrize("stream", STREAMS.values(), ids=STREAMS)
def test_reads_a_stream_that_is_left_open(call: Call, stream: str) -> None:
    result, _ = call({"POST /mcp": [byte_by_byte(stream), None]})
    assert_accepts(result)


ERROR = json.dumps({"id": 1, "error": {"code": -32602, "message": CONTROLS}})
# of a server that accepts only MCP 2026-07-28, as the MCP SDK 2 words it
NEWER_ONLY = {
    "code": -32022,
    "message": "Unsupported protocol version",
    "data": {"supported": ["2026-07-28"], "requested": "2025-11-25"},
}
FAILURES: dict[str, tuple[Response, str]] = {
    "400": (
        http_response(
            "400 Bad Request", json.dumps({"jsonrpc": "2.0", "id": 1, "error": NEWER_ONLY})
        ),
        'HTTP 400: {"jsonrpc": "2.0", "id": 1, "error": {"code": -32022, "message": "Unsupported '
        'protocol version", "data": {"supported": ["2026-07-28"]',
    ),
    "307": (http_response("307 No", location="/mcp2"), "('HTTP 307: /mcp2')"),
    "421": (
        http_response("421 No", f"Bad Host{CONTROLS}" * 999),
        r"('HTTP 421: Bad Host\x1b[2J\x9b",
    ),
    "HTML": (http_response("200 OK", "<html>"), "JSONDecodeError('Expecting value: line 1"),
    "JSON-RPC error": (
        http_response("200 OK", ERROR),
        'expected the server demo-server, got {"id": 1, "er',
    ),
    "JSON-RPC error in a stream": (
        [byte_by_byte(f"data: {ERROR}\n\n"), None],
        'expected the server demo-server, got {"id": 1, "er',
    ),
    "another server": (http_response("200 OK", OTHER_SERVER), '{"name": "other-server"}'),
    "another id": (http_response("200 OK", OTHER_ID), '"id": 2, '),
    "no response": (byte_by_byte(PING) + b"0\r\n\r\n", "the stream ended without a response"),
    "silence": (None, "/mcp: ReadTimeout('')"),
}


@pytest.mark.parametrize(("reply", "text"), FAILURES.values(), ids=FAILURES)
def test_the_mcp_server_fails(call: Call, reply: Response, text: str) -> None:
    result, _ = call({"POST /mcp": reply}, SHORT_TIMEOUTS)
    assert_fails(result, text)


def test_the_authorization_server_is_silent(call: Call) -> None:
    result, _ = call({"POST /token": None}, SHORT_TIMEOUTS)
    assert_fails(result, "agent: TimeoutError\n")


def test_the_authorization_server_rejects_the_request(call: Call) -> None:
    error = {"error": "invalid_client", "error_description": f"wrong secret\r\n{CONTROLS}"}
    result, _ = call({"POST /token": http_response("401 No", json.dumps(error))})
    assert_fails(result, "agent: InvalidClientError(")
    assert_fails(result, r"wrong secret\r\n\x1b[2J\x9b\u202e')")


@pytest.mark.parametrize("token", ["a secret\ntoken", "a secret t\xf6ken"])
def test_a_token_that_no_header_can_have_is_not_shown(call: Call, token: str) -> None:
    result, requests = call({"POST /token": http_response("200 OK", TOKEN % json.dumps(token))})
    assert_fails(result, "Error\n")
    assert "secret" not in result.stderr
    assert requests[-1].path == "/token"


def test_the_stand_in_accepts_it(servers: Sandbox, agent_settings: dict[str, str]) -> None:
    result = servers.run(sys.executable, "agent.py", **agent_settings)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.endswith("\nMCP initialize OK\n")
    assert re.findall(r'"(\w+) /mcp \S+ 200', servers.log.read_text())[-2:] == ["POST", "DELETE"]
