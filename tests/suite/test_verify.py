"""verify.sh: it passes only for servers as they should be, and leaves nothing."""

import base64
import json
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from contextlib import suppress

import agent
import psutil
import pytest

from authserver_client import ADMIN_KEY
from conftest import StartFake
from fakes import Change, Handler, Request, Response, http_response, in_front_of, replacing, when
from sandbox import ROOT, Sandbox, wait_until

type Intercept = Callable[..., dict[str, str]]

ACCEPTED = "authenticated MCP initialize OK"
AGENT_SETTINGS = {*agent.REQUIRED, "MCP_SERVER_NAME", "AUTHPLANE_DEV_MODE"}


def masked(output: str) -> str:
    """Return the output with the ports of this run replaced."""
    return re.sub(r"localhost:\d+", "localhost:PORT", output)


TRANSCRIPT = (ROOT / "README.md").read_text().split("```text\n")[1].split("```")[0]
# what verify.sh prints if the resource is registered already
CHECKS = masked(TRANSCRIPT[TRANSCRIPT.index("✓") :]).replace(" 201\n", " 409\n", 1)


@pytest.fixture
def intercept(fake: StartFake, servers: Sandbox) -> Intercept:
    """Return a function: the settings for the servers behind fakes with these changes."""
    names = ["AUTHSERVER_URL", "ADMIN_URL", "MCP_URL"]

    def start(**changes: Change) -> dict[str, str]:
        settings: dict[str, str] = {}
        for name, change in changes.items():
            settings[name] = fake(in_front_of(servers.ports[names.index(name)], change)).url
            if name == "MCP_URL":
                settings[name] += "/mcp"
        return settings

    return start


def test_checks_everything_and_leaves_nothing(served: Sandbox) -> None:
    """Two runs at once do not disturb each other."""
    before = served.authserver.clients()
    runs = [served.start("./verify.sh") for _ in range(2)]
    for run in runs:
        output, errors = run.communicate(timeout=60)
        assert (masked(output), errors, run.returncode) == (CHECKS, "", 0)
    assert served.authserver.clients() == before
    assert served.left() == []


def test_holds_in_any_environment(served: Sandbox, sandbox: Sandbox) -> None:
    """Proxies, certificates that are missing, and what changes curl, grep and cd."""
    (served.folder / ".curlrc").write_text("url = http://localhost:1\n")
    proxies = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
    settings = dict.fromkeys(proxies, "socks5://localhost:1")
    settings |= {"SSL_CERT_FILE": "/nowhere", "SSL_CERT_DIR": "/nowhere", "NO_PROXY": ""}
    settings |= {"GREP_OPTIONS": "--color=always", "CDPATH": str(sandbox.folder)}
    result = served.run("bash", "-c", "cd .. && clone/verify.sh", **settings)
    assert (masked(result.stdout), result.stderr) == (CHECKS, "")


def test_reads_settings_from_dotenv_without_executing_it(served: Sandbox) -> None:
    """It may have Windows line ends, and bytes that are not UTF-8."""
    lines = [
        "# caf\xe9",
        "AUTHSERVER_URL=http://first",
        "X=$(touch ran)",
        f"export AUTHSERVER_URL={served.issuer}/",
        "ADMIN_URL=http://localhost:1",
        f'AUTHPLANE_ADMIN_API_KEY="{ADMIN_KEY}"  # a comment',
        " TIER01_RUNTIME = 'native'",
        "# AUTHSERVER_URL=http://localhost:1",
        "PYTHON_IMAGE=a'",
    ]
    dotenv = served.clone / ".env"
    dotenv.write_text("".join(f"{line}\r\n" for line in lines), encoding="latin-1")
    result = served.verify(ADMIN_URL=f"{served.authserver.admin_url}/")
    assert (masked(result.stdout), result.stderr) == (CHECKS, "")
    assert not (served.clone / "ran").exists()
    read = '. tests/harness/settings.sh; read_settings; echo "$PYTHON_IMAGE"'
    assert served.run("bash", "-c", read).stdout == "a'\n"
    assert "no token: rejected" not in served.verify(AUTHSERVER_URL="").stdout
    assert "registered: expected" in served.verify().stderr


def test_which_url_is_of_this_host(sandbox: Sandbox) -> None:
    """The agent gets no proxy if both servers are on this host."""
    here = ["http://127.0.0.1", "http://localhost:1/a", "http://[::1]:9000"]
    elsewhere = ["http://localhost.example", "http://auth.example/?x=://localhost:1"]
    for url in here + elsewhere:
        script = f". tests/harness/settings.sh; is_local '{url}'"
        assert (sandbox.run("bash", "-c", script).returncode == 0) == (url in here), url


OK = http_response("200 OK", "{}")
REDIRECT = http_response("307 No", location="/mcp?x")
NOT_FOUND = http_response("404 Not Found")
TOO_MUCH = http_response("200 OK", "x" * 2**20)
WRONG_KEY = http_response("401 Unauthorized")
ERROR = http_response("400 Bad Request", json.dumps({"error": "\x1b[31m\r\nALL" + "\x01" * 5_000}))
HOSTILE = http_response("200 OK", json.dumps({"issuer": "ftp://x\x1b[31m\r\nALL"}))
ELSEWHERE = http_response("200 OK", json.dumps({"issuer": "http://no.invalid"}))


def accepts_all_audiences(request: Request, forward: Handler) -> Response:
    """Accept a token that verify.sh sends, unless it has tampered with it."""
    token = request.headers.get("authorization", "")
    by_verify = "curl" in request.headers["user-agent"]
    return OK if by_verify and token and not token.endswith("AAAA") else forward(request)


BROKEN: dict[str, dict[str, tuple[Change, str]]] = {
    "MCP_URL": {
        "accepts all": (when(b"", OK), "no token: rejected"),
        "redirects": (when(b"/mcp HTTP", REDIRECT), "no token: rejected"),
        "names no metadata": (replacing(b"resource_meta", b"resource_mega"), "no token: rejected"),
        "does not respond": (when(b"", None), "got no response ("),
        "sends too much": (when(b"", TOO_MUCH), "got no response ("),
        "is another": (replacing(b"demo-server", b"my_server_1"), "agent: accepted"),
        "accepts tampered tokens": (when(rb"Bearer .*AAAA\r", OK), "tampered token: rejected"),
        "accepts all audiences": (accepts_all_audiences, "different audience: rejected"),
    },
    "AUTHSERVER_URL": {
        "no metadata": (when(b"GET", NOT_FOUND), "no authorization server at http://"),
        "no issuer": (replacing(b'"issuer"', b'"iss"   '), "has no issuer"),
        "hostile issuer": (when(b"GET", HOSTILE), "ftp://x [31m  ALL: it must begin with http"),
        "issuer elsewhere": (when(b"GET", ELSEWHERE), "no.invalid is not reachable from this host"),
        "hostile error": (when(b"POST", ERROR), "token: issued: expected 200, got 400  [31m  ALL "),
        "400 for a wrong secret": (replacing(b" 401 ", b" 400 "), "wrong secret: rejected"),
        "issues all scopes": (when(b"mcp%3Anot", OK), "scope not granted: rejected"),
        "issues for all resources": (when(b"not-registered", OK), "unknown resource: rejected"),
    },
    "ADMIN_URL": {
        "another key": (when(b"", WRONG_KEY), "got 401: are AUTHPLANE_ADMIN_API_KEY"),
    },
}


@pytest.mark.parametrize(
    ("server", "case"), [(server, case) for server, cases in BROKEN.items() for case in cases]
)
def test_fails_for(intercept: Intercept, served: Sandbox, server: str, case: str) -> None:
    """It says why in one line, sends no control character to a terminal, and leaves nothing."""
    change, message = BROKEN[server][case]
    before = served.authserver.clients()
    result = served.verify(**intercept(**{server: change}))
    assert result.returncode == 1
    [error] = result.stderr.splitlines()
    assert error.startswith("verify.sh: ")
    assert message in error
    assert len(error) < 1_000
    assert ("✗" in result.stdout) == (": expected " in error)
    assert "✗" not in "".join(result.stdout.splitlines()[:-1])
    assert (result.stderr + result.stdout).replace("\n", "").isprintable()
    assert served.authserver.clients() == before
    assert served.left() == []


STAYS = {
    "500 Oops": [
        "client: deleted: expected 204, got 500",
        "client {} was not deleted (500): delete it manually",
    ],
    "204 No Content": ["deleted client: rejected: expected 401 invalid_client, got 200"],
}


@pytest.mark.parametrize(("response", "message"), STAYS.items(), ids=STAYS)
def test_fails_if_the_client_stays(
    intercept: Intercept, served: Sandbox, response: str, message: list[str]
) -> None:
    before = served.authserver.clients()
    result = served.verify(**intercept(ADMIN_URL=when(b"DELETE", http_response(response))))
    [client] = set(served.authserver.clients()) - set(before)
    served.authserver.delete_client(client)
    assert result.returncode == 1
    for line, expected in zip(result.stderr.splitlines(), message, strict=True):
        assert expected.format(client) in line


def test_says_that_the_resource_may_have_another_uri(served: Sandbox) -> None:
    result = served.verify(RESOURCE_URI="http://localhost/other")
    assert "(invalid_target): if the resource demo-mcp has another uri" in result.stderr


@pytest.mark.parametrize("tool", ["curl", "jq"])
def test_says_which_tool_is_missing(sandbox: Sandbox, tool: str) -> None:
    (sandbox.folder / "bin" / tool).unlink()
    assert f"verify.sh: {tool} is missing: install it" in sandbox.verify().stderr


def test_requests_the_metadata_of_the_issuer(
    fake: StartFake, intercept: Intercept, served: Sandbox
) -> None:
    """RFC 8414, section 3.1: the path comes last. It is one request, whatever brackets it has."""
    other = fake(lambda _: OK)
    issuer = f"{other.url.replace('localhost', '0.0.0.0')}/[1-9]/"  # noqa: S104
    metadata = http_response("200 OK", json.dumps({"issuer": issuer}))
    result = served.verify(**intercept(AUTHSERVER_URL=when(b"GET", metadata)))
    assert "is not reachable from this host" in result.stderr  # what responds is no such issuer
    paths = [request.path for request in other.requests]
    assert paths == ["/.well-known/oauth-authorization-server/[1-9]"]


def test_older_servers_respond_invalid_scope(intercept: Intercept, served: Sandbox) -> None:
    older = replacing(b'"invalid_target"', b'"invalid_scope" ')
    result = served.verify(**intercept(AUTHSERVER_URL=older))
    assert masked(result.stdout) == CHECKS.replace("invalid_target", "invalid_scope")


def basic(client_id: str, secret: str) -> str:
    return "Basic " + base64.b64encode(f"{client_id}:{secret}".encode()).decode()


def test_a_secret_of_any_characters(intercept: Intercept, served: Sandbox) -> None:
    """It is sent as RFC 6749, section 2.3.1, says; the agent is not the subject."""
    (served.clone / ".venv").unlink()
    agent = served.clone / ".venv/bin/python"
    agent.parent.mkdir(parents=True)
    agent.write_text(f"#!/bin/sh\necho {ACCEPTED}\n")
    agent.chmod(0o755)
    sent: list[str] = []

    def odd_secret(request: Request, forward: Handler) -> Response:
        if request.method == "POST" and "clients" in request.path:
            client = {"client_id": "id", "client_secret": "+/=&%: x"}
            return http_response("201 Created", json.dumps(client))
        return forward(request)

    def recorded(request: Request, forward: Handler) -> Response:
        if request.method == "POST":
            sent.append(request.headers["authorization"])
        return forward(request)

    served.verify(**intercept(ADMIN_URL=odd_secret, AUTHSERVER_URL=recorded))
    assert sent == [basic("id", "%2B%2F%3D%26%25%3A%20x")]


def test_a_registration_without_a_secret(intercept: Intercept, served: Sandbox) -> None:
    """The client is deleted by its id, whatever characters that has."""
    deleted: list[str] = []

    def without_secret(request: Request, forward: Handler) -> Response:
        if request.method == "DELETE":
            deleted.append(request.path)
        if "clients" in request.path:
            return http_response("201 Created", json.dumps({"client_id": "../x"}))
        return forward(request)

    result = served.verify(**intercept(ADMIN_URL=without_secret))
    assert "got 201 without client_id and client_secret" in result.stderr
    assert deleted == ["/admin/clients/..%2Fx?force=true"]


def test_shows_no_secret(intercept: Intercept, served: Sandbox) -> None:
    """No secret is in an argument or in the output; the agent gets its own settings only."""
    responses: list[bytes] = []

    def recorded(request: Request, forward: Callable[[Request], bytes]) -> Response:
        responses.append(forward(request))
        return responses[-1]

    settings = {
        "AUTHPLANE_SESSION_SECRET": "a-session-secret",
        "AUTHPLANE_ADMIN_API_KEY": ADMIN_KEY,
    }
    settings |= intercept(AUTHSERVER_URL=recorded, ADMIN_URL=recorded)
    run = served.start("./verify.sh", **settings)
    arguments: set[str] = set()
    names: set[str] = set()
    deadline = time.monotonic() + 60
    while run.poll() is None:
        assert time.monotonic() < deadline
        for process in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.Error):
                command = " ".join(process.cmdline())
                arguments.add(command)
                if command.endswith("agent.py"):
                    names |= process.environ().keys()
                elif "curl" in command:
                    assert ADMIN_KEY not in process.environ().values()
    output, errors = run.communicate()
    assert masked(output) == CHECKS
    text = b"\n".join(responses).decode()
    secrets = re.findall(r'"(?:client_secret|access_token)": ?"([^"]+)"', text)
    [client] = re.findall(r'"client_id": ?"([^"]+)"', text)
    secrets += [ADMIN_KEY, basic(client, secrets[0])]
    assert len(secrets) == 5
    assert any("curl" in each for each in arguments)
    for secret in secrets:
        assert secret not in output + errors + "".join(arguments)
    of_bash = {"PWD", "SHLVL", "_", "OLDPWD", "LC_CTYPE", "__CF_USER_TEXT_ENCODING"}
    assert names - of_bash == AGENT_SETTINGS | {"NO_PROXY", "no_proxy"}


@pytest.mark.parametrize(
    ("server", "moment", "number"),
    [
        ("ADMIN_URL", b"POST /admin/clients", signal.SIGINT),
        ("ADMIN_URL", b"POST /admin/clients", signal.SIGTERM),
        ("AUTHSERVER_URL", b"POST /oauth/token", signal.SIGHUP),
        ("MCP_URL", b"Bearer", signal.SIGINT),
        ("MCP_URL", b"Bearer", signal.SIGTERM),
    ],
)
def test_cleans_up_when_interrupted(
    intercept: Intercept, served: Sandbox, server: str, moment: bytes, number: signal.Signals
) -> None:
    """The signal comes when the server has acted and has not responded yet."""
    before = served.authserver.clients()
    reached, go_on = threading.Event(), threading.Event()

    def slow(request: Request, forward: Handler) -> Response:
        response = forward(request)
        if re.search(moment, bytes(request)):
            reached.set()
            go_on.wait(20)
        return response

    run = served.start("./verify.sh", **intercept(**{server: slow}))
    assert reached.wait(20)
    assert len(served.authserver.clients()) == len(before) + 1
    interrupt(run, number)
    if server != "MCP_URL":  # curl is waited for, the agent is ended
        threading.Timer(0.3, go_on.set).start()
    output, errors = run.communicate(timeout=8)  # the agent, by itself, would take 10 s
    assert (run.returncode, errors) == (128 + number, "")
    assert "ALL CHECKS PASSED" not in output
    assert served.authserver.clients() == before
    wait_until(lambda: not served.left(), "the end of every process of the run", 5)


def interrupt(run: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send SIGTERM to the process, and what a terminal sends to its whole process group."""
    if number == signal.SIGTERM:
        run.send_signal(number)
    else:
        os.killpg(run.pid, number)
