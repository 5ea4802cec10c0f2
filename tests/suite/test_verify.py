"""verify.sh: it passes only for a tier 01 as it should be, and leaves nothing."""

import base64
import json
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest

from conftest import StartFake
from fakes import Answer, Change, Handler, Request, http, in_front_of, replacing, when
from machine import ADMIN_KEY, Machine, wait_until

type Behind = Callable[..., dict[str, str]]

CHECKS = """\
✓ discovery                      200
  the agent runs on this host: the issuer is http://localhost:PORT
✓ no token: rejected             401 Bearer resource_metadata
✓ resource: registered           200 demo-mcp
✓ client: registered             201
✓ agent: accepted                exit 0, authenticated MCP initialize OK
✓ token: issued                  200
✓ wrong secret: rejected         401 invalid_client
✓ scope not granted: rejected    400 invalid_scope
✓ unknown resource: rejected     400 invalid_target
✓ tampered token: rejected       401 Bearer invalid_token resource_metadata
✓ different audience: issued     200
✓ different audience: rejected   401 Bearer invalid_token resource_metadata
✓ client: deleted                204
✓ deleted client: rejected       401 invalid_client
ALL CHECKS PASSED
"""


def masked(output: str) -> str:
    """Return the output with the ports of this run replaced."""
    return re.sub(r"localhost:\d+", "localhost:PORT", output)


@pytest.fixture
def behind(fake: StartFake, tier01: Machine) -> Behind:
    """Return a function: the settings for that tier 01 behind fakes with these changes."""
    names = ["ISSUER_URL", "ADMIN_URL", "MCP_URL"]

    def start(**changes: Change) -> dict[str, str]:
        settings: dict[str, str] = {}
        for name, change in changes.items():
            server = fake(in_front_of(tier01.ports[names.index(name)], change))
            settings[name] = server.url + "/mcp" * (name == "MCP_URL")
        return settings

    return start


def test_checks_everything_and_leaves_nothing(beside: Machine) -> None:
    """Two runs at once do not disturb each other."""
    before = beside.clients()
    runs = [beside.start("./verify.sh") for _ in range(2)]
    for run in runs:
        output, errors = run.communicate(timeout=60)
        assert (masked(output), errors, run.returncode) == (CHECKS, "", 0)
    assert beside.clients() == before
    assert beside.left() == []


def test_reads_settings_from_dotenv_without_executing_it(beside: Machine) -> None:
    lines = [
        "ISSUER_URL=http://first",
        "X=$(touch ran)",
        f"export ISSUER_URL={beside.issuer}",
        "ADMIN_URL=http://localhost:1",
        f'AUTHPLANE_ADMIN_API_KEY="{ADMIN_KEY}"  # a comment',
        " TIER01 = 'native'",
    ]
    (beside.clone / ".env").write_text("".join(f"{line}\r\n" for line in lines))
    told = CHECKS.replace("the issuer is http://localhost:PORT", "TIER01=native")
    assert masked(beside.verify(ADMIN_URL=beside.admin_url).stdout) == told
    assert not (beside.clone / "ran").exists()
    assert "Failed to connect to localhost port 1" in beside.verify().stderr


def test_colours_only_on_a_terminal(beside: Machine) -> None:
    code = "import os, pty; os._exit(os.waitstatus_to_exitcode(pty.spawn(['./verify.sh'])))"
    settings = {"TERM": "xterm", "MCP_URL": "http://localhost:1"}
    coloured = beside.run(beside.python, "-c", code, **settings).stdout
    assert "\x1b[32m✓\x1b[0m discovery" in coloured
    assert "\x1b[31m✗\x1b[0m no token" in coloured
    assert "\x1b" not in beside.run(beside.python, "-c", code, NO_COLOR="1", **settings).stdout


OK = http("200 OK", "{}")
REFUSED = http("400 Bad Request", json.dumps({"error": "\x1b[31m\r\nALL"}))
HOSTILE = http("200 OK", json.dumps({"issuer": "ftp://x\x1b[31m\r\nALL"}))
MIB = b"HTTP/1.1 200 OK\r\n\r\n" + bytes(2**20)
TAMPERED, UNTAMPERED = rb"Bearer .*AAAA\r", rb"(?s)curl/(?!.*AAAA\r).*Bearer "  # by verify.sh
CLIENT = http("201 Created", json.dumps({"client_id": "../x", "client_secret": "../y"}))

BROKEN: dict[str, dict[str, tuple[Change, str]]] = {
    "MCP_URL": {
        "accepts all": (when(b"", OK), "no token: rejected"),
        "redirects": (when(b"/mcp HTTP", http("307 No", location="/mcp?x")), "no token: rejected"),
        "names no metadata": (replacing(b"resource_meta", b"resource_mega"), "no token: rejected"),
        "wants Basic": (replacing(b": Bearer ", b": Basic  "), "no token: rejected"),
        "does not respond": (when(b"", b""), "got no response (curl: (52)"),
        "sends too much": (when(b"", MIB), "got no response"),
        "is another": (replacing(b"demo-server", b"my_server_1"), "agent: accepted"),
        "accepts tampered tokens": (when(TAMPERED, OK), "tampered token: rejected"),
        "accepts all audiences": (when(UNTAMPERED, OK), "different audience: rejected"),
    },
    "ISSUER_URL": {
        "no metadata": (when(b"GET", http("404 Not Found")), "no authorization server at http://"),
        "no issuer": (replacing(b'"issuer"', b'"iss"   '), "has no issuer"),
        "HTML": (when(b"GET", http("200 OK", "<p>")), "has no issuer"),
        "hostile issuer": (when(b"GET", HOSTILE), "ftp://x [31m  ALL is not reachable from this"),
        "hostile error": (when(b"POST", REFUSED), "token: issued: expected 200, got 400  [31m  AL"),
        "400 for a wrong secret": (replacing(b" 401 ", b" 400 "), "wrong secret: rejected"),
        "issues all scopes": (when(b"mcp%3Anot", OK), "scope not granted: rejected"),
        "issues for all resources": (when(b"not-registered", OK), "unknown resource: rejected"),
    },
    "ADMIN_URL": {
        "another key": (
            when(b"", http("401 No")),
            "got 401: are AUTHPLANE_ADMIN_API_KEY",
        ),
        "another uri": (replacing(b'/mcp"', b'/api"'), '/api ["mcp:echo"]'),
        "another scope": (replacing(b"mcp:echo", b"mcp:else"), '/mcp ["mcp:else"]'),
        "no id": (when(b"POST", CLIENT), "client: registered: expected 201"),
    },
}


@pytest.mark.parametrize(
    ("server", "case"), [(server, case) for server, cases in BROKEN.items() for case in cases]
)
def test_fails_for(behind: Behind, beside: Machine, server: str, case: str) -> None:
    """It says why in one line, sends no control character to a terminal, and leaves nothing."""
    change, told = BROKEN[server][case]
    before = beside.clients()
    result = beside.verify(**behind(**{server: change}))
    assert result.returncode == 1
    assert re.fullmatch(r"verify\.sh: .+\n", result.stderr)
    assert told in result.stderr
    assert ("✗" in result.stdout) == (": expected " in result.stderr)
    assert "✗" not in "".join(result.stdout.splitlines()[:-1])
    assert (result.stderr + result.stdout).replace("\n", "").isprintable()
    assert beside.clients() == before
    assert beside.left() == []


STAYS = {
    "500 Oops": r"client: deleted: expected 204, got 500.*\n.*client {} was not deleted \(500\): ",
    "204 No Content": "deleted client: rejected: expected 401 invalid_client, got 200",
}


@pytest.mark.parametrize(("answer", "told"), STAYS.items(), ids=STAYS)
def test_fails_if_the_client_stays(behind: Behind, beside: Machine, answer: str, told: str) -> None:
    before = beside.clients()
    result = beside.verify(**behind(ADMIN_URL=when(b"DELETE", http(answer))))
    [client] = set(beside.clients()) - set(before)
    beside.delete_client(client)
    assert result.returncode == 1
    assert re.search(told.format(client), result.stderr)


MISSING = {
    "bin/curl": "curl is missing: install it",
    "bin/jq": "jq is missing: install it",
    "clone/.venv": "the agent has no .venv: make run prepares it",
}


@pytest.mark.parametrize(("missing", "told"), MISSING.items(), ids=MISSING)
def test_says_what_is_missing(beside: Machine, missing: str, told: str) -> None:
    (beside.folder / missing).unlink()
    result = beside.verify()
    assert result.returncode == 1
    assert result.stderr.startswith(f"verify.sh: {told}")


def test_speaks_no_other_protocol(behind: Behind, beside: Machine) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        issuer = f"ftp://127.0.0.1:{listener.getsockname()[1]}"
        metadata = http("200 OK", json.dumps({"issuer": issuer}))
        result = beside.verify(**behind(ISSUER_URL=when(b"GET", metadata)))
        with pytest.raises(TimeoutError):
            listener.accept()
    assert f"the issuer {issuer} is not reachable from this host" in result.stderr


def test_looks_again_if_another_run_registers_the_resource(behind: Behind, beside: Machine) -> None:
    late, created = [http("404 Not Found"), http("409 Conflict")], list[Request]()

    def raced(request: Request, forward: Handler) -> Answer:
        if "resources" not in request.path or not late:
            return forward(request)
        created.append(request)
        return late.pop(0)

    result = beside.verify(**behind(ADMIN_URL=raced))
    assert masked(result.stdout) == CHECKS
    assert json.loads(created[1].body) == {
        "slug": "demo-mcp",
        "uri": beside.mcp_url,
        "backend_kind": "mint",
        "display_name": "Demo MCP",
        "scopes": [{"name": "mcp:echo", "description": "echo tool"}],
    }


def test_older_servers_answer_invalid_scope(behind: Behind, beside: Machine) -> None:
    older = replacing(b'"invalid_target"', b'"invalid_scope" ')
    result = beside.verify(**behind(ISSUER_URL=older))
    assert masked(result.stdout) == CHECKS.replace("invalid_target", "invalid_scope")


def test_shows_no_secret(behind: Behind, beside: Machine) -> None:
    """No secret in the arguments of a process, in the output, or in the agent's environment."""
    answers: list[bytes] = []

    def recorded(request: Request, forward: Callable[[Request], bytes]) -> Answer:
        answers.append(forward(request))
        return answers[-1]

    run = beside.start("./verify.sh", **behind(ISSUER_URL=recorded, ADMIN_URL=recorded))
    arguments, environments = set[str](), list[dict[str, str]]()
    while run.poll() is None:
        for process in psutil.Process(run.pid).children(recursive=True):
            with suppress(psutil.Error):
                arguments.add(command := " ".join(process.cmdline()))
                if command.endswith("agent.py"):
                    environments.append(process.environ())
    output, errors = run.communicate()
    assert masked(output) == CHECKS
    said = b"\n".join(answers).decode()
    secrets = re.findall(r'"(?:client_secret|access_token)": ?"([^"]+)"', said)
    [client] = re.findall(r'"client_id": ?"([^"]+)"', said)
    secrets += [ADMIN_KEY, base64.b64encode(f"{client}:{secrets[0]}".encode()).decode()]
    assert len(secrets) == 5
    assert any("curl" in each for each in arguments)
    for secret in secrets:
        assert secret not in output + errors + "".join(arguments)
    assert {ADMIN_KEY in each.values() for each in environments} == {False}


@pytest.mark.parametrize(
    ("server", "moment", "number"),
    [
        ("ADMIN_URL", b"POST /admin/clients", signal.SIGINT),
        ("ADMIN_URL", b"POST /admin/clients", signal.SIGTERM),
        ("ISSUER_URL", b"POST /oauth/token", signal.SIGHUP),
        ("MCP_URL", b"Bearer", signal.SIGINT),
        ("MCP_URL", b"Bearer", signal.SIGTERM),
    ],
)
def test_cleans_up_when_interrupted(
    behind: Behind, beside: Machine, server: str, moment: bytes, number: signal.Signals
) -> None:
    """The signal comes when the server has acted and has not responded yet."""
    before = beside.clients()
    reached, go_on = threading.Event(), threading.Event()

    def slow(request: Request, forward: Handler) -> Answer:
        answer = forward(request)
        if re.search(moment, bytes(request)):
            reached.set()
            go_on.wait(20)
        return answer

    run = beside.start("./verify.sh", **behind(**{server: slow}))
    assert reached.wait(20)
    assert len(beside.clients()) == len(before) + 1
    interrupt(run, number)
    if server != "MCP_URL":  # curl is waited for, the agent is ended
        threading.Timer(0.3, go_on.set).start()
    output, errors = run.communicate(timeout=20)
    assert (run.returncode, errors) == (128 + number, "")
    assert "ALL CHECKS PASSED" not in output
    assert beside.clients() == before
    wait_until(lambda: not beside.left(), "the end of every process of the run", 5)


def interrupt(run: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send SIGTERM to the process, and what a terminal sends to its whole process group."""
    if number == signal.SIGTERM:
        run.send_signal(number)
    else:
        os.killpg(run.pid, number)
