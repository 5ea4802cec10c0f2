"""The agent as a program: let in by tier 01, and one line for every way to fail."""

import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

import pytest

from conftest import (
    AGENT_PYTHON,
    ROOT,
    Answer,
    Fake,
    Handler,
    Request,
    Result,
    StartFake,
    Tier01,
    http,
    plain_environment,
    run_agent,
)

TOKEN = "the-token-that-nobody-may-see"
SECRET = "the-secret-that-nobody-may-see"
REPLY = {
    "jsonrpc": "2.0",
    "id": 1,
    "result": {"protocolVersion": "2025-11-25", "serverInfo": {"name": "demo-server"}},
}
NOTIFICATION = {"jsonrpc": "2.0", "method": "notifications/message", "params": {"data": "\u2028"}}
PING = {"jsonrpc": "2.0", "id": 1, "method": "ping"}
JSON = "application/json"
SSE = "text/event-stream"


def test_is_let_in_by_tier01(agent_settings: dict[str, str]) -> None:
    result = run_agent(agent_settings)
    reply, verdict = result.stdout.splitlines()
    assert json.loads(reply)["result"]["serverInfo"]["name"] == "demo-server"
    assert verdict == "authenticated MCP initialize OK"
    assert (result.returncode, result.stderr) == (0, "")


def test_calls_another_address_than_the_audience(agent_settings: dict[str, str]) -> None:
    mcp_url = agent_settings["MCP_URL"].replace("localhost", "127.0.0.1")
    assert run_agent(agent_settings | {"MCP_URL": mcp_url}).returncode == 0


def test_ends_the_session_that_tier01_opened(
    tier01: Tier01, agent_settings: dict[str, str]
) -> None:
    run_agent(agent_settings)
    log = (tier01.logs / "mcp_server.log").read_text()
    assert re.findall(r'"(POST|DELETE) /mcp HTTP/1.1" 200', log)[-2:] == ["POST", "DELETE"]


def authorization_server(**answers: Answer | Callable[[str], Answer]) -> Handler:
    """Return the handler of a fake authorization server, with answers that may be replaced."""

    def handler(request: Request) -> Answer:
        issuer = f"http://{request.headers['host']}"
        metadata = {
            "issuer": issuer,
            "token_endpoint": f"{issuer}/token",
            "jwks_uri": f"{issuer}/jwks",
        }
        minted = {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 3600}
        normal = {
            "metadata": http("200 OK", json.dumps(metadata)),
            "jwks": http("200 OK", json.dumps({"keys": []})),
            "token": http("200 OK", json.dumps(minted)),
        }
        name = request.path.removeprefix("/").replace(
            ".well-known/oauth-authorization-server", "metadata"
        )
        answer = (normal | answers)[name]
        return answer(issuer) if callable(answer) else answer

    return handler


def sse(*messages: Any, newline: str = "\n") -> bytes:
    """Return an SSE answer with the messages as events; it ends when the connection does."""
    events = [
        f"event: message\ndata: {json.dumps(each, ensure_ascii=False)}\n\n" for each in messages
    ]
    head = f"HTTP/1.1 200 OK\r\ncontent-type: {SSE}\r\n\r\n"
    return (head + "".join(events).replace("\n", newline)).encode()


def stalling(*parts: bytes) -> Iterator[bytes]:
    """Yield the parts, then keep the connection open for longer than the agent waits."""
    yield from parts
    time.sleep(40)


def endless(head: bytes, part: bytes, content_type: str = JSON) -> Iterator[bytes]:
    """Yield an answer that never ends."""
    yield f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n\r\n".encode() + head
    while True:
        yield part


def call(
    start: StartFake,
    mcp: Answer | Handler = None,
    authserver: Handler | None = None,
    settings: dict[str, str] | None = None,
    program: Path = ROOT / "agent.py",
) -> tuple[Result, Fake, Fake]:
    """Run the agent against fakes; return its result and both fakes."""

    def answer(request: Request) -> Answer:
        if callable(mcp):
            return mcp(request)
        return mcp if request.method == "POST" else http("405 Method Not Allowed")

    issuer, server = start(authserver or authorization_server()), start(answer)
    required = {
        "AUTHPLANE_ISSUER": issuer.url,
        "CLIENT_ID": "agent",
        "CLIENT_SECRET": SECRET,
        "RESOURCE_URI": "https://mcp.example/mcp",
        "MCP_URL": f"{server.url}/mcp",
        "AUTHPLANE_DEV_MODE": "1",
    }
    return run_agent(required | (settings or {}), program), issuer, server


def test_asks_for_one_scope_and_one_resource(fake: StartFake) -> None:
    _, issuer, _ = call(fake, http("200 OK", json.dumps(REPLY), content_type=JSON))
    [request] = [request for request in issuer.requests if request.path == "/token"]
    assert sorted(parse_qsl(request.body.decode())) == [
        ("grant_type", "client_credentials"),
        ("resource", "https://mcp.example/mcp"),
        ("scope", "mcp:echo"),
    ]


def test_posts_initialize_with_the_token(fake: StartFake) -> None:
    _, _, server = call(fake, http("200 OK", json.dumps(REPLY), content_type=JSON))
    [request] = server.requests
    body = json.loads(request.body)
    assert request.method == "POST"
    assert request.headers["authorization"] == f"Bearer {TOKEN}"
    assert request.headers["accept"] == "application/json, text/event-stream"
    assert request.headers["content-type"] == JSON
    assert "mcp-protocol-version" not in request.headers
    assert (body["method"], body["params"]["protocolVersion"]) == ("initialize", "2025-11-25")


def test_ends_the_session_with_its_id_and_version(fake: StartFake) -> None:
    answer = http("200 OK", json.dumps(REPLY), content_type=JSON, mcp_session_id="s1")
    result, _, server = call(fake, answer)
    ended = server.requests[-1]
    assert result.returncode == 0
    assert (ended.method, ended.headers["mcp-session-id"]) == ("DELETE", "s1")
    assert ended.headers["mcp-protocol-version"] == "2025-11-25"
    assert ended.headers["authorization"] == f"Bearer {TOKEN}"


SPREAD = json.dumps(REPLY, indent=1).replace("\n", "\ndata: ")
PRIMED = f": hello\n\nid: 0\ndata:\n\nretry: 5\ndata: {json.dumps(REPLY)}\n\n"
REPLIES: dict[str, Answer] = {
    "JSON": http("200 OK", json.dumps(REPLY), content_type=JSON),
    "JSON with blank lines": http("200 OK", json.dumps(REPLY, indent=1).replace("\n", "\n\n")),
    "SSE": sse(REPLY),
    "SSE with CRLF": sse(REPLY, newline="\r\n"),
    "SSE with CR": sse(REPLY, newline="\r"),
    "SSE that stays open": stalling(sse(REPLY)),
    "SSE with CRLF that stays open": stalling(sse(REPLY, newline="\r\n")),
    "notification first": sse(NOTIFICATION, REPLY),
    "request with the same id first": sse(PING, REPLY),
    "reply to another id first": sse({"jsonrpc": "2.0", "id": 2, "result": {}}, REPLY),
    "comment and priming event first": http("200 OK", PRIMED, content_type=SSE),
    "data over several lines": http("200 OK", f"data: {SPREAD}\n\n", content_type=SSE),
    "no space after data:": http("200 OK", f"data:{json.dumps(REPLY)}\n\n", content_type=SSE),
    "byte by byte": [bytes([byte]) for byte in sse(PING, REPLY, newline="\r\n")],
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES.keys())
def test_reads_every_form_of_reply(fake: StartFake, reply: Answer) -> None:
    started = time.monotonic()
    result, _, _ = call(fake, reply)
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout.removesuffix("authenticated MCP initialize OK\n")) == REPLY
    assert time.monotonic() - started < 8


def refused(status: str, **headers: str) -> bytes:
    return http(status, "{}", **headers)


def problem(status: str, code: str, description: str) -> Answer:
    body = {"error": code, "error_description": description}
    return http(status, json.dumps(body), content_type="application/problem+json")


def reply_with(**members: Any) -> Answer:
    return http("200 OK", json.dumps({"jsonrpc": "2.0", "id": 1} | members), content_type=JSON)


CHALLENGE = 'Bearer error="invalid_token", resource_metadata="http://r/meta"'
MCP_FAILURES: dict[str, tuple[Answer, list[str]]] = {
    "redirect": (refused("307 Temporary Redirect", location="/mcp2"), ["307", "/mcp2"]),
    "401": (refused("401 Unauthorized", www_authenticate=CHALLENGE), ["401", CHALLENGE]),
    "403": (
        refused("403 Forbidden", www_authenticate='Bearer error="insufficient_scope"'),
        ["403", "insufficient_scope"],
    ),
    "406": (refused("406 Not Acceptable"), ["406 Not Acceptable"]),
    "421": (refused("421 Misdirected Request"), ["421 Misdirected Request"]),
    "500": (refused("500 Internal Server Error"), ["500"]),
    "503": (refused("503 Service Unavailable"), ["503"]),
    "202 without a reply": (refused("202 Accepted"), ["202"]),
    "no HTTP at all": (b"SSH-2.0-OpenSSH\r\n", ["RemoteProtocolError"]),
    "connection closed": (b"", ["RemoteProtocolError"]),
    "JSON-RPC error": (
        reply_with(error={"code": -32602, "message": "Unsupported protocol version"}),
        ["-32602", "Unsupported protocol version"],
    ),
    "JSON-RPC error in SSE": (
        sse({"jsonrpc": "2.0", "id": 1, "error": {"code": -32001, "message": "gone"}}),
        ["-32001", "gone"],
    ),
    "not JSON": (http("200 OK", "<html>hello</html>"), ["<html>hello</html>"]),
    "JSON, but no object": (http("200 OK", "[]"), ["[]"]),
    "empty": (http("200 OK", ""), ["JSONDecodeError"]),
    "not JSON in SSE": (http("200 OK", "data: {oops\n\n", content_type=SSE), ["JSONDecodeError"]),
    "no name": (reply_with(result={"serverInfo": {}}), ["demo-server", '"serverInfo"']),
    "another name": (
        reply_with(result={"serverInfo": {"name": "other"}}),
        ["demo-server", "other"],
    ),
    "long reply": (reply_with(result={"instructions": "long " * 9999}), ["long long"]),
    "name elsewhere": (
        reply_with(result={"serverInfo": {"name": "x"}, "instructions": "demo-server"}),
        ['"name": "x"'],
    ),
    "another id": (http("200 OK", json.dumps(REPLY | {"id": 2})), ['"id": 2']),
    "stream without the reply": (sse(NOTIFICATION), ["notifications/message"]),
    "empty stream": (http("200 OK", "", content_type=SSE), ["JSONDecodeError"]),
    "endless reply": (endless(b'{"a": "', b"x" * 65536), ["megabyte"]),
    "endless stream": (endless(b"", b": keep-alive\n\n" * 4096, SSE), ["megabyte"]),
    "token sent back": (
        refused("401 Unauthorized", www_authenticate=f"Bearer {TOKEN}"),
        ["[hidden]"],
    ),
    "token in the reply": (reply_with(result=TOKEN), ["[hidden]"]),
    "secret in the reply": (reply_with(result=SECRET), ["[hidden]"]),
    "escape sequences": (refused("401 \x1b[31mred\x9b", location="a\x1bb"), ["401"]),
}


def one_line(result: Result, *fragments: str) -> None:
    """Check what every failure has in common, and what this one must say."""
    assert result.returncode == 1
    assert result.stdout == ""
    assert re.fullmatch(r"agent: [^\n]+\n", result.stderr), result.stderr
    assert result.stderr[:-1].isprintable()
    assert len(result.stderr) < 1000
    assert TOKEN not in result.stderr
    assert SECRET not in result.stderr
    for fragment in fragments:
        assert fragment in result.stderr


@pytest.mark.parametrize(("answer", "told"), MCP_FAILURES.values(), ids=MCP_FAILURES.keys())
def test_says_what_the_mcp_server_answered(
    fake: StartFake, answer: Answer, told: list[str]
) -> None:
    result, _, server = call(fake, answer)
    one_line(result, f"initialize at {server.url}/mcp", *told)
    assert [request.method for request in server.requests] == ["POST"]


def metadata(**members: Any) -> Callable[[str], Answer]:
    """Return an answer with metadata that is right but for some members."""

    def answer(issuer: str) -> Answer:
        right = {
            "issuer": issuer,
            "token_endpoint": f"{issuer}/token",
            "jwks_uri": f"{issuer}/jwks",
        }
        return http("200 OK", json.dumps(right | members))

    return answer


AS_FAILURES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "metadata 404": ({"metadata": refused("404 Not Found")}, ["404"]),
    "metadata 500": ({"metadata": refused("500 Oops")}, ["500"]),
    "metadata redirected": ({"metadata": refused("302 Found", location="/x")}, ["issuer"]),
    "metadata not JSON": ({"metadata": http("200 OK", "<html>")}, ["JSONDecodeError"]),
    "metadata no object": ({"metadata": http("200 OK", "[]")}, ["Error"]),
    "other issuer": (
        {"metadata": metadata(issuer="https://other.example")},
        ["https://other.example"],
    ),
    "no jwks_uri": ({"metadata": metadata(jwks_uri="")}, ["jwks_uri"]),
    "no token endpoint": ({"metadata": metadata(token_endpoint="")}, ["token_endpoint"]),
    "jwks 500": ({"jwks": refused("500 Oops")}, ["500", "jwks"]),
    "invalid_client": (
        {"token": problem("401 Unauthorized", "invalid_client", "client authentication failed")},
        ["invalid_client", "client authentication failed"],
    ),
    "invalid_scope": (
        {"token": problem("400 Bad", "invalid_scope", "too much")},
        ["invalid_scope", "too much"],
    ),
    "invalid_target": (
        {"token": problem("400 Bad", "invalid_target", "who?")},
        ["invalid_target", "who?"],
    ),
    "slow_down": (
        {"token": problem("429 Slow", "slow_down", "rate limit exceeded")},
        ["slow_down", "rate limit"],
    ),
    "token 503": ({"token": refused("503 Oops")}, ["503"]),
    "token not JSON": ({"token": http("200 OK", "<html>")}, ["JSONDecodeError"]),
    "token without a token": ({"token": http("200 OK", "{}")}, ["access_token"]),
    "secret sent back": (
        {"token": problem("400 Bad", "invalid_request", f"what is {SECRET}?")},
        ["[hidden]"],
    ),
    "long and over lines": (
        {"token": problem("400 Bad", "invalid_scope", "long\n" * 9999)},
        ["long long"],
    ),
}


@pytest.mark.parametrize(("answers", "told"), AS_FAILURES.values(), ids=AS_FAILURES.keys())
def test_says_what_the_authorization_server_answered(
    fake: StartFake, answers: dict[str, Any], told: list[str]
) -> None:
    result, issuer, server = call(fake, authserver=authorization_server(**answers))
    one_line(result, f"access token from {issuer.url}", *told)
    assert server.requests == []


def test_shows_both_issuers(fake: StartFake) -> None:
    other = authorization_server(metadata=metadata(issuer="https://other.example"))
    result, issuer, _ = call(fake, authserver=other)
    one_line(result, f"'{issuer.url}'", "'https://other.example'")


SETTINGS: dict[str, tuple[dict[str, str], list[str]]] = {
    "all unset": (
        dict.fromkeys(
            ["AUTHPLANE_ISSUER", "CLIENT_ID", "CLIENT_SECRET", "RESOURCE_URI", "MCP_URL"], ""
        ),
        ["AUTHPLANE_ISSUER", "CLIENT_ID", "CLIENT_SECRET", "RESOURCE_URI", "MCP_URL"],
    ),
    "two unset": ({"CLIENT_ID": "", "MCP_URL": ""}, ["settings: MCP_URL, CLIENT_ID not set"]),
    "plain http without dev mode": (
        {"AUTHPLANE_DEV_MODE": ""},
        ["access token from http://", "HTTPS"],
    ),
    "no authorization server": (
        {"AUTHPLANE_ISSUER": "http://localhost:1"},
        ["http://localhost:1", "ConnectError"],
    ),
    "no such host": ({"AUTHPLANE_ISSUER": "http://no.invalid"}, ["http://no.invalid", "DNS"]),
    "no MCP server": (
        {"MCP_URL": "http://localhost:1/mcp"},
        ["initialize at http://localhost:1/mcp", "ConnectError"],
    ),
    "no URL": ({"MCP_URL": "localhost/mcp"}, ["initialize at localhost/mcp", "http://"]),
    "no port": (
        {"MCP_URL": "http://localhost:port/mcp"},
        ["initialize at http://localhost:port/mcp", "port"],
    ),
}


@pytest.mark.parametrize(("settings", "told"), SETTINGS.values(), ids=SETTINGS.keys())
def test_says_which_setting_is_wrong(
    fake: StartFake, settings: dict[str, str], told: list[str]
) -> None:
    one_line(call(fake, settings=settings)[0], *told)


def test_waits_for_no_token_for_long(fake: StartFake) -> None:
    started = time.monotonic()
    silent = authorization_server(token=None)
    one_line(call(fake, authserver=silent)[0], "access token from", "(ReadTimeout)")
    assert time.monotonic() - started < 25


def dripping(_: Request) -> Iterator[bytes]:
    """Answer for ever, and never with the reply."""
    yield f"HTTP/1.1 200 OK\r\ncontent-type: {SSE}\r\n\r\n".encode()
    while True:
        time.sleep(0.2)
        yield b": keep-alive\n\n"


WAITS: dict[str, tuple[Answer | Handler, str]] = {
    "no answer": (None, "(ReadTimeout)"),
    "a stream that stalls": (stalling(sse(NOTIFICATION)), "(ReadTimeout)"),
    "a stream that never ends": (dripping, "(TimeoutError)"),
}


@pytest.mark.parametrize(("answer", "kind"), WAITS.values(), ids=WAITS.keys())
def test_bounds_every_wait_and_the_whole_call(
    fake: StartFake, tmp_path: Path, answer: Answer | Handler, kind: str
) -> None:
    """In a copy that waits for a second, and two seconds for all."""
    agent = (ROOT / "agent.py").read_text()
    hasty = agent.replace("timeout(30)", "timeout(2)").replace("timeout=10", "timeout=1")
    assert hasty.count("timeout(2)") == hasty.count("timeout=1)") == 1
    (tmp_path / "agent.py").write_text(hasty)
    started = time.monotonic()
    one_line(call(fake, answer, program=tmp_path / "agent.py")[0], "initialize at", kind)
    assert time.monotonic() - started < 8


def test_ends_quietly_on_ctrl_c(fake: StartFake, agent_settings: dict[str, str]) -> None:
    silent = fake(lambda _: None)
    environment = plain_environment(**agent_settings | {"MCP_URL": silent.url})
    with subprocess.Popen(
        [AGENT_PYTHON, ROOT / "agent.py"], env=environment, stdout=-1, stderr=-1
    ) as agent:
        while not silent.requests:
            time.sleep(0.02)
        agent.send_signal(signal.SIGINT)
        assert agent.communicate(timeout=5) == (b"", b"")
    assert agent.returncode == 130


def test_shows_a_warning_of_its_own(agent_settings: dict[str, str], tmp_path: Path) -> None:
    warned = (ROOT / "agent.py").read_text() + "\n    warnings.warn('ours')\n"
    (tmp_path / "agent.py").write_text(warned)
    assert "ours" in run_agent(agent_settings, tmp_path / "agent.py").stderr


def test_is_as_small_as_the_readme_says() -> None:
    lines = [line.strip() for line in (ROOT / "agent.py").read_text().splitlines()]
    begin, end = lines.index("# authplane:begin"), lines.index("# authplane:end")
    assert len([line for line in lines if line and not line.startswith("#")]) <= 72
    assert len([line for line in lines[begin:end] if line and not line.startswith("#")]) <= 8
