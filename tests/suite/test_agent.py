"""The agent: what it sends, every form of reply that it reads, and one line for every failure."""

import difflib
import gzip
import json
import re
import select
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from textwrap import dedent, indent
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import pytest

from conftest import StartFake
from fakes import Answer, Fake, Handler, Request, http
from machine import AGENT_PYTHON, ROOT, Machine, wait_until

type Call = Callable[[dict[str, str]], Outcome]
type StartFakes = Callable[[Reply, Changes], Fakes]
type Reply = Answer | Handler
type Changes = dict[str, Answer | dict[str, str]]  # path: a response, or fields of its JSON object

OK, TOKEN, RUNNER = "authenticated MCP initialize OK", "a-token", "tests/suite/agent_runner.py"
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
    """What `agent.main` printed and returned, and the CPU time that it took."""

    printed: str
    failure: str | None
    cpu_seconds: float = 0


class Fakes(NamedTuple):
    """A fake authorization server, a fake MCP server, and the settings to call them."""

    issuer: Fake
    mcp: Fake
    settings: dict[str, str]


def start_runner(machine: Machine) -> Call:
    """Return a function that calls `agent.main` with settings, in a process that starts here."""
    process = machine.popen([AGENT_PYTHON, RUNNER], {"PYTHONPATH": "."}, stdin=subprocess.PIPE)
    stdin, stdout = process.stdin, process.stdout
    assert stdin and stdout

    def call(settings: dict[str, str]) -> Outcome:
        print(json.dumps(machine.environment(**settings)), file=stdin, flush=True)
        assert select.select([stdout], [], [], 20)[0] or process.kill(), "no outcome after 20 s"
        return Outcome(*json.loads(stdout.readline()))

    return call


@pytest.fixture(scope="session")
def call(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Call]:
    machine = Machine(tmp_path_factory.mktemp("agent"))
    yield start_runner(machine)
    machine.close()


@pytest.fixture
def fakes(fake: StartFake) -> StartFakes:
    """Start the fakes: what the MCP server responds, and changes of what the other one does."""

    def start(reply: Reply, changes: Changes) -> Fakes:
        def authorization_server(request: Request) -> Answer:
            urls = {"token_endpoint": f"{issuer.url}/token", "jwks_uri": f"{issuer.url}/jwks"}
            token = {"access_token": TOKEN, "token_type": "Bearer", "expires_in": 60}
            usual: dict[str, dict[str, Any]] = {"/jwks": {"keys": []}, "/token": token}
            usual[METADATA] = {"issuer": issuer.url, **urls}
            change = changes.get(request.path, {})
            if isinstance(change, dict):
                return http("200 OK", json.dumps(usual[request.path] | change))
            return change

        issuer = fake(authorization_server)
        mcp = fake(lambda request: reply(request) if callable(reply) else reply)
        settings = {"CLIENT_ID": "agent", "CLIENT_SECRET": "secret", "AUTHPLANE_DEV_MODE": "1"}
        settings |= {"AUTHPLANE_ISSUER": issuer.url, "RESOURCE_URI": "https://mcp.example/mcp"}
        return Fakes(issuer, mcp, settings | {"MCP_URL": f"{mcp.url}/mcp"})

    return start


def assert_fails(outcome: Outcome, told: str) -> None:
    """Check what all failures have in common, and what this one must say: … is any text."""
    assert outcome.printed == ""
    assert re.fullmatch("agent: [ -~]{1,992}", outcome.failure or ""), outcome.failure
    assert re.search(".*".join(map(re.escape, told.split("…"))), outcome.failure or "")


def json_reply(content: object, **headers: str) -> bytes:
    return http("200 OK", json.dumps(content), content_type="application/json", **headers)


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


def test_waits_10_seconds_for_a_token(call: Call, fakes: StartFakes) -> None:
    assert_fails(call(fakes(None, {"/token": None}).settings), "access token from…(ReadTimeout)")


PRIMED = b": hi\n\nid: 0\ndata:\n\nretry: 5\n: data: hi\ndata:%b\n\n" % json.dumps(REPLY).encode()
SPREAD = (event(NOTIFICATION) + event(REPLY, indent=1)).replace(b"\n", b"\r\n")
NEWLINES = {"LF": b"\n", "CRLF": b"\r\n", "CR": b"\r"}
REPLIES: dict[str, Reply] = {
    "JSON": json_reply(REPLY),
    "JSON with blank lines": http("200 OK", json.dumps(REPLY, indent=1).replace("\n", "\n\n")),
    "JSON of 250 KiB": json_reply({"padding": "x" * 250 * 1024, **REPLY}),
    "gzip": http("200 OK", gzip.compress(json.dumps(REPLY).encode()), content_encoding="gzip"),
    **{name: sse(REPLY, newline=n) for name, n in NEWLINES.items()},
    **{f"{name}, open": endless(sse(REPLY, newline=n), pause=20) for name, n in NEWLINES.items()},
    **{f"{name} at each chunk boundary": each_boundary(n) for name, n in NEWLINES.items()},
    "CRLF byte by byte": chunked(*(bytes([byte]) for byte in SPREAD)),
    "notification first": sse(NOTIFICATION, REPLY),
    "request with the same id first": sse({"jsonrpc": "2.0", "id": 1, "method": "ping"}, REPLY),
    "reply with another id first": sse(OTHER, REPLY),
    "comments, priming event, no space": STREAM + PRIMED,
}


@pytest.mark.parametrize("reply", REPLIES.values(), ids=REPLIES)
def test_reads_every_form_of_reply(call: Call, fakes: StartFakes, reply: Reply) -> None:
    printed, failure, _ = call(fakes(reply, {}).settings)
    assert failure is None
    assert re.fullmatch(rf"[ -~]+\n{OK}\n", printed)
    assert json.loads(printed.splitlines()[0])["result"] == RESULT


def run(machine: Machine, settings: dict[str, str], program: str = "agent.py") -> Outcome:
    result = machine.run(AGENT_PYTHON, program, **settings)
    assert result.returncode == bool(result.stderr)  # 1 with the line of a failure, otherwise 0
    return Outcome(result.stdout, result.stderr.removesuffix("\n") or None)


def test_tier01_accepts_it(tier01: Machine, agent_settings: dict[str, str]) -> None:
    other_url = tier01.mcp_url.replace("localhost", "127.0.0.1")  # than the audience
    outcome = run(tier01, agent_settings | {"MCP_URL": other_url})
    assert outcome.failure is None
    reply, verdict = outcome.printed.splitlines()
    assert (json.loads(reply)["result"]["serverInfo"]["name"], verdict) == ("demo-server", OK)
    assert re.findall(r'"(\w+) /mcp \S+ 200', tier01.log.read_text())[-2:] == ["POST", "DELETE"]


AGENT, PLAIN = ((ROOT / name).read_text() for name in ("agent.py", "tests/examples/plain_agent.py"))
BLOCK = AGENT.partition("# authplane:begin\n")[2].partition("# authplane:end")[0]
OTHER_PROGRAM = """
import asyncio, os, httpx, agent
async def call(url, issuer, client_id, secret, resource):
    headers = {"Accept": "application/json, text/event-stream"}
%s
    print(httpx.post(url, json=agent.INITIALIZE, headers=headers).status_code)
asyncio.run(call(*map(os.environ.get, agent.REQUIRED)))
"""


def test_the_block_in_another_program(machine: Machine, agent_settings: dict[str, str]) -> None:
    (machine.clone / "other.py").write_text(OTHER_PROGRAM % indent(dedent(BLOCK), "    "))
    assert machine.run(AGENT_PYTHON, "other.py", **agent_settings).stdout == "200\n"


def test_a_failure_is_one_line_whatever_the_sdk_logs(machine: Machine, fakes: StartFakes) -> None:
    assert_fails(run(machine, {}), "settings: MCP_URL, AUTHPLANE_ISSUER, …RESOURCE_URI not set")
    settings = fakes(None, AS_FAILURES["invalid_client"][0]).settings
    assert_fails(run(machine, settings), "access token from…(invalid_client)")


WAITS: dict[str, tuple[Reply, str]] = {
    "no response": (None, "(ReadTimeout)"),
    "a stream that stalls": (endless(sse(NOTIFICATION), pause=20), "(ReadTimeout)"),
    "a stream that never ends": (endless(STREAM, b":\n\n", pause=0.2), "(TimeoutError)"),
}


@pytest.mark.parametrize(("reply", "kind"), WAITS.values(), ids=WAITS)
def test_short_time_limits(machine: Machine, fakes: StartFakes, reply: Reply, kind: str) -> None:
    agent = machine.clone / "agent.py"
    text = agent.read_text().replace("timeout(30)", "timeout(2)").replace("timeout=10", "timeout=1")
    agent.write_text(text)
    assert_fails(start_runner(machine)(fakes(reply, {}).settings), f"initialize at…{kind}")


SLOW_SDK = """
import pathlib, time, unittest.mock
pathlib.Path("importing").touch()
time.sleep(0.5)
ASCredentials, AuthplaneClient = unittest.mock.Mock(), unittest.mock.AsyncMock()
"""


@pytest.mark.parametrize("sdk", ["", SLOW_SDK], ids=["in a request", "in the import of the SDK"])
def test_ctrl_c_ends_it_quietly(machine: Machine, fakes: StartFakes, sdk: str) -> None:
    started, importing = fakes(None, {}), machine.clone / "importing"
    if sdk:
        (machine.clone / "authplane.py").write_text(sdk)
    process = machine.start(AGENT_PYTHON, "agent.py", **started.settings)
    wait_until(lambda: started.mcp.requests or importing.exists(), "the request, or the import")
    process.send_signal(signal.SIGINT)
    assert (process.communicate(timeout=5), process.returncode) == (("", ""), 130)


CHALLENGE = 'Bearer error="invalid_token", resource_metadata="http://r/meta"'
NAMES = {"serverInfo": {"name": f"{HOSTILE}demo-server"}, "instructions": "demo-server"}
MIB, SIZE = 1024 * 1024, "the response exceeds 256 KiB (ValueError)"
STATUSES = "202 Accepted|403 Forbidden|406 Not Acceptable|421 Misdirected Request|503 Unavailable"
MCP_FAILURES: dict[str, tuple[Reply, str]] = {
    **{status: (http(status, json.dumps(REPLY)), status) for status in STATUSES.split("|")},
    "401": (http("401 Unauthorized", www_authenticate=CHALLENGE), f"401 Unauthorized {CHALLENGE}"),
    "307": (http("307 Temporary Redirect", location="/mcp2"), "307 Temporary Redirect /mcp2"),
    "500, endless": (endless(LENGTHY.replace(b"200 OK", b"500 Oops"), b"x"), "500 Oops"),
    "hostile": (http(f"401 No{HOSTILE}", location=f"one {HOSTILE}\r\n two"), "401 No…one…two"),
    "no HTTP": (b"SSH-2.0-OpenSSH\r\n", "(RemoteProtocolError)"),
    "connection closed": (b"", "(RemoteProtocolError)"),
    "JSON-RPC error": (json_reply(ERROR), "no result.serverInfo.name…-32602…Unsupported version"),
    "JSON-RPC error, then the reply": (sse(ERROR, REPLY), "-32602"),
    "no serverInfo, then the reply": (sse({"id": 1, "result": {}}, REPLY), '"result": {}'),
    "HTML": (http("200 OK", "<html>hello</html>"), "(JSONDecodeError)"),
    "not an object": (json_reply([]), "in []"),
    "empty": (http("200 OK"), "(JSONDecodeError)"),
    "malformed data": (STREAM + b"data: {oops\n\n" + event(REPLY), "(JSONDecodeError)"),
    "other name": (json_reply(REPLY | {"result": NAMES}), r"'demo-server' in…\u202edemo-server"),
    "other id": (json_reply(OTHER), '"id": 2'),
    "stream without the response": (sse(NOTIFICATION), "(JSONDecodeError)"),
    "deep nesting": (http("200 OK", "[" * 100_000), "(RecursionError)"),
    "long": (json_reply({"instructions": "long " * 9_999}), "long long"),
    "257 KiB": (json_reply({"padding": "x" * 257 * 1024, **REPLY}), SIZE),
    "an endless reply": (endless(LENGTHY, b"x" * 65536), SIZE),
    "an endless stream": (endless(STREAM, b": hi\n\n" * 4_096), SIZE),
    "a megabyte of LF": (STREAM + b"\n" * MIB, SIZE),
    "a megabyte of CRLF": (STREAM + b"\r\n" * (MIB // 2), SIZE),
    "262,144 chunks": (chunked(*[b"x"] * 262_144), SIZE),
    "40,000 data lines": (chunked(*[b"data:\n" * 40] * 1_000), "(JSONDecodeError)"),
}


@pytest.mark.parametrize(("reply", "told"), MCP_FAILURES.values(), ids=MCP_FAILURES)
def test_mcp_server(call: Call, fakes: StartFakes, reply: Reply, told: str) -> None:
    started = fakes(reply, {})
    outcome = call(started.settings)
    assert_fails(outcome, f"initialize at {started.mcp.url}/mcp: …{told}")
    assert outcome.cpu_seconds < 1.5
    assert [request.method for request in started.mcp.requests] == ["POST"]


def oauth_error(error: str, description: str) -> tuple[Changes, str]:
    body = {"error": error, "error_description": description}
    return {"/token": http("400 Bad", json.dumps(body))}, f"{description:.400} ({error})"


AS_FAILURES: dict[str, tuple[Changes, str]] = {
    "invalid_client": oauth_error("invalid_client", "client authentication failed"),
    "invalid_scope": oauth_error("invalid_scope", "exceeds the client's registered scopes"),
    "invalid_target": oauth_error("invalid_target", "is not a registered resource"),
    "long code": (oauth_error("x" * 5_000, "")[0], "xxx"),
    "slow_down": oauth_error("slow_down", "rate limit exceeded"),
    "hostile": (oauth_error("invalid_scope", f"one {HOSTILE}\r\n" * 999)[0], "one…one"),
    "metadata 404": ({METADATA: http("404 Not Found")}, "404"),
    "metadata 500": ({METADATA: http("500 Oops")}, "500"),
    "metadata redirected": ({METADATA: http("302 Found", location="/x")}, "issuer"),
    "metadata not JSON": ({METADATA: http("200 OK", "<html>")}, "(JSONDecodeError)"),
    "metadata not an object": ({METADATA: http("200 OK", "[]")}, "Error)"),
    "other issuer": ({METADATA: {"issuer": "https://other"}}, "'http://localhost:…'https://other'"),
    "no jwks_uri": ({METADATA: {"jwks_uri": ""}}, "jwks_uri"),
    "no token endpoint": ({METADATA: {"token_endpoint": ""}}, "token_endpoint"),
    "jwks 500": ({"/jwks": http("500 Oops")}, "500"),
    "token 503": ({"/token": http("503 Oops")}, "503"),
    "token not JSON": ({"/token": http("200 OK", "<html>")}, "(JSONDecodeError)"),
    "no access_token": ({"/token": http("200 OK", "{}")}, "access_token"),
}


@pytest.mark.parametrize(("changes", "told"), AS_FAILURES.values(), ids=AS_FAILURES)
def test_authorization_server(call: Call, fakes: StartFakes, changes: Changes, told: str) -> None:
    started = fakes(None, changes)
    assert_fails(call(started.settings), f"access token from {started.issuer.url}: …{told}")
    assert started.mcp.requests == []


SETTINGS: dict[str, tuple[dict[str, str], str]] = {
    "two unset": ({"CLIENT_ID": "", "MCP_URL": ""}, "settings: MCP_URL, CLIENT_ID not set"),
    "plain http without dev mode": ({"AUTHPLANE_DEV_MODE": ""}, "access token from…HTTPS"),
    "no authorization server": (
        {"AUTHPLANE_ISSUER": "http://localhost:1"},
        "localhost:1: …(ConnectError)",
    ),
    "no such host": ({"AUTHPLANE_ISSUER": "http://no.invalid"}, "from http://no.invalid: …DNS"),
    "no MCP server": ({"MCP_URL": "http://localhost:1"}, "at http://localhost:1: …(ConnectError)"),
    "no URL scheme": ({"MCP_URL": "localhost/mcp"}, "at localhost/mcp: …(UnsupportedProtocol)"),
    "bad port": ({"MCP_URL": "http://localhost:x/"}, "at http://localhost:x/: …(InvalidURL)"),
}


@pytest.mark.parametrize(("change", "told"), SETTINGS.values(), ids=SETTINGS)
def test_settings(call: Call, fakes: StartFakes, change: dict[str, str], told: str) -> None:
    assert_fails(call(fakes(None, {}).settings | change), told)


def test_requests_a_token_initializes_and_ends_the_session(call: Call, fakes: StartFakes) -> None:
    reply = json_reply({"id": 1, "result": {"serverInfo": {"name": "other"}}}, mcp_session_id="s1")
    forever = endless(LENGTHY, b"x" * 65536)  # which isn't read
    started = fakes(lambda sent: reply if sent.method == "POST" else forever(sent), {})
    outcome = call(started.settings | {"MCP_SERVER_NAME": "other"})
    assert (outcome.failure, outcome.cpu_seconds < 1) == (None, True)
    token = next(request for request in started.issuer.requests if request.path == "/token")
    form = {"grant_type": "client_credentials", "resource": "https://mcp.example/mcp"}
    assert sorted(parse_qsl(token.body.decode())) == [*form.items(), ("scope", "mcp:echo")]
    post, delete = started.mcp.requests
    assert [(r.method, r.path) for r in (post, delete)] == [("POST", "/mcp"), ("DELETE", "/mcp")]
    bearer, accept = {"authorization": f"Bearer {TOKEN}"}, "application/json, text/event-stream"
    of_post = bearer | {"accept": accept, "content-type": "application/json"}
    session = {"mcp-session-id": "s1", "mcp-protocol-version": "2025-11-25"}
    assert post.headers.items() >= of_post.items()
    assert not post.headers.keys() & session.keys()
    assert delete.headers.items() >= (bearer | session).items()
    client = {"name": "demo-agent", "version": "0.1.0"}
    params = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": client}
    body = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": params}
    assert json.loads(post.body) == body


def test_the_agent_without_authentication(machine: Machine, fakes: StartFakes) -> None:
    mcp = fakes(json_reply(REPLY), {}).mcp
    outcome = run(machine, {"MCP_URL": mcp.url}, "tests/examples/plain_agent.py")
    assert outcome == (f"{json.dumps(REPLY)}\nMCP initialize OK\n", None, 0)
    assert "authorization" not in mcp.requests[0].headers


def test_it_is_small() -> None:
    for text, most in (AGENT, 58), (BLOCK, 8):
        assert len(re.findall(r"(?m)^ *[^ #\n]", text)) <= most
    diff = list(difflib.unified_diff(PLAIN.splitlines(), AGENT.splitlines(), n=1))[2:]
    assert len([line for line in diff if line.startswith("@@")]) <= 3
    assert len([line for line in diff if line[0] in "+-"]) <= 16
