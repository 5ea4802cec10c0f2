"""verify.sh: it passes only for a tier 01 as it should be, and leaves nothing."""

import base64
import json
import os
import re
import resource
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator

import psutil
import pytest

from conftest import NewMachine, StartFake
from fakes import Answer, Change, Handler, Request, always, http, in_front_of
from machine import ADMIN_KEY, Machine, wait_until

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


def behind(start: StartFake, tier01: Machine, **changes: Change) -> dict[str, str]:
    """Return the settings for a tier 01 with these servers behind fakes that change responses."""
    urls = {"ISSUER_URL": tier01.issuer, "ADMIN_URL": tier01.admin_url, "MCP_URL": tier01.mcp_url}
    settings: dict[str, str] = {}
    for name, change in changes.items():
        base = urls[name].removesuffix("/mcp")
        settings[name] = start(in_front_of(base, change)).url + urls[name].removeprefix(base)
    return settings


def test_checks_everything_and_leaves_nothing(beside: Machine) -> None:
    before = beside.clients()
    result = beside.verify()
    assert (masked(result.stdout), result.stderr, result.returncode) == (CHECKS, "", 0)
    assert beside.clients() == before
    assert beside.left() == []


def test_reads_settings_from_dotenv_without_executing_it(beside: Machine) -> None:
    settings = {
        "ISSUER_URL": beside.issuer,
        "ADMIN_URL": "http://localhost:1",
        "MCP_URL": beside.mcp_url,
        "AUTHPLANE_ADMIN_API_KEY": f'"{ADMIN_KEY}"  # a comment',
    }
    lines = [f"export {name}={value}\r\n" for name, value in settings.items()]
    text = f"ISSUER_URL=http://first\nX=$(touch ran)\n{''.join(lines)}"
    (beside.clone / ".env").write_text(text)
    assert masked(beside.verify(ADMIN_URL=beside.admin_url).stdout) == CHECKS
    assert not (beside.clone / "ran").exists()
    assert "Failed to connect to localhost port 1" in beside.verify().stderr


def test_two_runs_do_not_disturb_each_other(beside: Machine) -> None:
    before = beside.clients()
    runs = [beside.start("./verify.sh") for _ in range(3)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [(masked(out), err) for out, err in outputs] == [(CHECKS, "")] * 3
    assert beside.clients() == before


def test_colours_only_on_a_terminal(beside: Machine) -> None:
    code = "import os, pty; os._exit(os.waitstatus_to_exitcode(pty.spawn(['./verify.sh'])))"
    coloured, plain = (
        beside.run(beside.python, "-c", code, TERM="xterm", **settings).stdout
        for settings in ({}, {"NO_COLOR": "1"})
    )
    assert "\x1b[32m✓\x1b[0m discovery" in coloured
    assert masked(plain.replace("\r\n", "\n")) == CHECKS


def claims(request: Request) -> dict[str, object]:
    """Return the claims of the access token of a request, unverified."""
    part = request.headers.get("authorization", "..").split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "==") or "{}")


ACCEPTED = http(
    "200 OK", '{"jsonrpc": "2.0", "id": 1, "result": {"serverInfo": {"name": "demo-server"}}}'
)
ISSUED = http("200 OK", '{"access_token": "x.y.z", "token_type": "Bearer", "expires_in": 60}')
RESOURCE = {"id": "the-id", "slug": "demo-mcp", "uri": "http://localhost:8080/mcp"}


def when(condition: Callable[[Request], object], answer: Answer) -> Change:
    return lambda request, forward: answer if condition(request) else forward(request)


def unlike_any_secret(request: Request, forward: Handler) -> Answer:
    """Answer 400 where 401 invalid_client is right."""
    answer = forward(request)
    assert isinstance(answer, bytes)
    return http("400 Bad Request", "{}") if b"invalid_client" in answer else answer


def resource_with(**members: object) -> Change:
    return always("/admin/resources", http("200 OK", json.dumps(RESOURCE | members)))


def for_another_audience(request: Request) -> bool:
    return "/mcp" not in str(claims(request).get("aud", "/mcp"))


BROKEN: dict[str, tuple[str, Change, str]] = {
    "MCP accepts all": ("MCP_URL", always("/", ACCEPTED), "no token: rejected"),
    "MCP 302": ("MCP_URL", always("/", http("302 Found", location="/x")), "no token: rejected"),
    "MCP 401 without metadata": (
        "MCP_URL",
        always("/", http("401 No", www_authenticate="Bearer")),
        "no token: rejected",
    ),
    "MCP 401 with Basic": (
        "MCP_URL",
        always("/", http("401 No", www_authenticate='Basic realm="resource_metadata"')),
        "no token: rejected",
    ),
    "MCP without a response": ("MCP_URL", always("/", b""), "got no response (curl: (52)"),
    "MCP accepts tampered tokens": (
        "MCP_URL",
        when(lambda request: request.headers.get("authorization", "").endswith("AAAA"), ACCEPTED),
        "tampered token: rejected",
    ),
    "MCP accepts all audiences": (
        "MCP_URL",
        when(for_another_audience, ACCEPTED),
        "different audience: rejected",
    ),
    "metadata without issuer": (
        "ISSUER_URL",
        always("/.well-known", http("200 OK", "{}")),
        "has no issuer",
    ),
    "metadata is HTML": ("ISSUER_URL", always("/.well-known", http("200 OK", "<p>")), "no issuer"),
    "issues nothing": ("ISSUER_URL", always("/oauth", http("500 Oops")), "token: issued"),
    "issues for any secret": ("ISSUER_URL", always("/oauth", ISSUED), "wrong secret: rejected"),
    "400 for a wrong secret": ("ISSUER_URL", unlike_any_secret, "wrong secret: rejected"),
    "issues any scope": (
        "ISSUER_URL",
        when(lambda request: b"mcp%3Anot" in request.body, ISSUED),
        "scope not granted: rejected",
    ),
    "issues for any resource": (
        "ISSUER_URL",
        when(lambda request: b"not-registered" in request.body, ISSUED),
        "unknown resource: rejected",
    ),
    "admin 401": (
        "ADMIN_URL",
        always("/", http("401 No", '{"error": "unauthorized"}')),
        "expected 20[01] demo-mcp, got 401: are AUTHPLANE_ADMIN_API_KEY and ADMIN_URL right?",
    ),
    "admin 500": ("ADMIN_URL", always("/", http("500 Oops")), "resource: registered"),
    "admin without a response": ("ADMIN_URL", always("/", b""), "got no response (curl: (52)"),
    "admin 500 for clients": (
        "ADMIN_URL",
        always("/admin/clients", http("500 Oops")),
        "client: registered",
    ),
    "client without an id": (
        "ADMIN_URL",
        always("/admin/clients", http("201 Created", '{"client_id": "../x"}'), "POST"),
        "client: registered: expected 201",
    ),
    "resource with another uri": (
        "ADMIN_URL",
        resource_with(uri="http://other/mcp", scopes=[{"name": "mcp:echo"}]),
        "the-id: http://",
    ),
    "resource without the scope": (
        "ADMIN_URL",
        resource_with(scopes=[]),
        "the-id: http://",
    ),
    "client stays": (
        "ADMIN_URL",
        always("/admin/clients/", http("500 Oops"), "DELETE"),
        "client: deleted",
    ),
    "deleted client still gets tokens": (
        "ADMIN_URL",
        always("/admin/clients/", http("204 No Content"), "DELETE"),
        "deleted client: rejected",
    ),
}


@pytest.mark.parametrize(("server", "change", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_fails_for(
    fake: StartFake, beside: Machine, server: str, change: Change, told: str
) -> None:
    result = beside.verify(**behind(fake, beside, **{server: change}))
    assert result.returncode == 1
    assert "ALL CHECKS PASSED" not in result.stdout
    assert told in result.stderr
    assert re.match(r"verify\.sh: [^\n]+\n", result.stderr)
    if "✗" in result.stdout:
        assert result.stdout.splitlines()[-1].startswith("✗")


def test_fails_when_the_agent_fails(beside: Machine) -> None:
    result = beside.verify(MCP_SERVER_NAME="other")
    assert result.returncode == 1
    assert "✗ agent: accepted" in result.stdout
    assert "no result.serverInfo.name 'other'" in result.stderr


def test_says_that_the_agent_is_not_prepared(new_machine: NewMachine, tier01: Machine) -> None:
    result = new_machine(ports=tier01.ports, prepared=False).verify()
    assert result.returncode == 1
    assert result.stderr == "verify.sh: the agent has no .venv: make run prepares it\n"


@pytest.mark.parametrize("missing", ["curl", "jq"])
def test_says_which_tool_is_missing(machine: Machine, missing: str) -> None:
    (machine.folder / "bin" / missing).unlink()
    result = machine.verify()
    assert result.returncode == 1
    assert result.stderr.startswith(f"verify.sh: {missing} is missing: install it")


@pytest.mark.parametrize(("more", "shown"), [("", ""), ("\x1b[31m\r\nALL", " [31m  ALL")])
def test_does_nothing_that_a_hostile_issuer_says(
    fake: StartFake, beside: Machine, more: str, shown: str
) -> None:
    """It speaks no other protocol, and sends no control character to the terminal."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.1)
        issuer = f"ftp://127.0.0.1:{listener.getsockname()[1]}"
        hostile = http("200 OK", json.dumps({"issuer": f"{issuer}{more}"}))
        settings = behind(fake, beside, ISSUER_URL=always("/.well-known", hostile))
        result = beside.verify(**settings)
        with pytest.raises(TimeoutError):
            listener.accept()
    assert result.returncode == 1
    assert f"the issuer {issuer}{shown} is not reachable from this host" in result.stderr
    assert result.stderr[:-1].isprintable()


def test_endless_response_fills_no_memory_and_no_disk(fake: StartFake, beside: Machine) -> None:
    def endless(_: Request) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
        while True:
            yield b" " * 65536

    result = beside.verify(MCP_URL=fake(endless).url)
    assert result.returncode == 1
    assert "no token: rejected: expected 401 Bearer resource_metadata, got no" in result.stderr
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 500_000


def test_registers_the_resource_if_it_is_absent(fake: StartFake, beside: Machine) -> None:
    created: list[Request] = []

    def absent(request: Request, forward: Handler) -> Answer:
        if not request.path.startswith("/admin/resources"):
            return forward(request)
        if request.method == "GET":
            return http("404 Not Found")
        created.append(request)
        return http("201 Created", request.body)

    result = beside.verify(**behind(fake, beside, ADMIN_URL=absent))
    assert masked(result.stdout) == CHECKS.replace("200 demo-mcp", "201 demo-mcp")
    assert [json.loads(request.body) for request in created] == [
        {
            "slug": "demo-mcp",
            "uri": beside.mcp_url,
            "backend_kind": "mint",
            "display_name": "Demo MCP",
            "scopes": [{"name": "mcp:echo", "description": "echo tool"}],
        }
    ]


def test_looks_again_if_another_run_was_faster(fake: StartFake, beside: Machine) -> None:
    late = [http("404 Not Found"), http("409 Conflict")]

    def raced(request: Request, forward: Handler) -> Answer:
        named = request.path.startswith("/admin/resources")
        return late.pop(0) if named and late else forward(request)

    result = beside.verify(**behind(fake, beside, ADMIN_URL=raced))
    assert masked(result.stdout) == CHECKS


def test_older_servers_answer_invalid_scope(fake: StartFake, beside: Machine) -> None:
    older = http("400 Bad Request", '{"error": "invalid_scope"}')
    change = when(lambda request: b"not-registered" in request.body, older)
    result = beside.verify(**behind(fake, beside, ISSUER_URL=change))
    assert masked(result.stdout) == CHECKS.replace("invalid_target", "invalid_scope")


def test_shows_no_secret(fake: StartFake, beside: Machine) -> None:
    """No secret in the arguments of a process, in the output, or in the agent's environment."""
    answers: list[bytes] = []

    def recorded(request: Request, forward: Handler) -> Answer:
        answer = forward(request)
        assert isinstance(answer, bytes)
        answers.append(answer)
        return answer

    run = beside.start(
        "./verify.sh", **behind(fake, beside, ISSUER_URL=recorded, ADMIN_URL=recorded)
    )
    arguments: set[str] = set()
    environments: list[dict[str, str]] = []
    while run.poll() is None:
        for process in psutil.Process(run.pid).children(recursive=True):
            try:
                arguments.add(command := " ".join(process.cmdline()))
                if command.endswith("agent.py"):
                    environments.append(process.environ())
            except psutil.Error:
                continue
    output, errors = run.communicate()
    assert masked(output) == CHECKS
    said = b"\n".join(answers).decode()
    secrets = re.findall(r'"(?:client_secret|access_token)": ?"([^"]+)"', said)
    [client] = re.findall(r'"client_id": ?"([^"]+)"', said)
    secrets += [ADMIN_KEY, base64.b64encode(f"{client}:{secrets[0]}".encode()).decode()]
    assert len(secrets) == 5
    assert any("curl" in each for each in arguments)
    for secret in secrets:
        assert not any(secret in each for each in arguments)
        assert secret not in output + errors
    assert environments
    for environment in environments:
        assert ADMIN_KEY not in environment.values()


def registering(request: Request) -> bool:
    return (request.method, request.path) == ("POST", "/admin/clients")


def requesting_a_token(request: Request) -> bool:
    return request.path == "/oauth/token"


def calling(request: Request) -> bool:
    return request.path == "/mcp" and "authorization" in request.headers


MOMENTS: list[tuple[str, Callable[[Request], bool]]] = [
    ("ADMIN_URL", registering),
    ("ISSUER_URL", requesting_a_token),
    ("MCP_URL", calling),
]


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(("server", "moment"), MOMENTS, ids=lambda it: getattr(it, "__name__", ""))
def test_cleans_up_when_interrupted(
    fake: StartFake,
    beside: Machine,
    server: str,
    moment: Callable[[Request], bool],
    number: signal.Signals,
) -> None:
    """The signal comes when the server has acted and has not responded yet."""
    reached, go_on = threading.Event(), threading.Event()
    registered: list[str] = []

    def slow(request: Request, forward: Handler) -> Answer:
        answer = forward(request)
        assert isinstance(answer, bytes)
        if registering(request):
            registered.extend(re.findall(r'"client_id": ?"([^"]+)"', answer.decode()))
        if moment(request):
            reached.set()
            go_on.wait(20)
        return answer

    changes: dict[str, Change] = {"ADMIN_URL": slow, server: slow}
    run = beside.start("./verify.sh", **behind(fake, beside, **changes))
    assert reached.wait(20)
    interrupt(run, number)
    if moment is not calling:  # curl is waited for, the agent is ended
        threading.Timer(0.3, go_on.set).start()
    output, errors = run.communicate(timeout=20)
    go_on.set()
    assert run.returncode == 128 + number
    assert "ALL CHECKS PASSED" not in output
    assert errors == ""
    [client] = registered
    assert client not in beside.clients()
    wait_until(lambda: not beside.left(), "the end of every process of the run", 5)


def interrupt(run: subprocess.Popen[str], number: signal.Signals) -> None:
    """Send SIGTERM to the process, and what a terminal sends to its whole process group."""
    if number == signal.SIGTERM:
        run.send_signal(number)
    else:
        os.killpg(run.pid, number)


def test_reports_a_client_that_it_could_not_delete(fake: StartFake, beside: Machine) -> None:
    reject = always("/admin/clients/", http("500 Oops"), "DELETE")
    settings = behind(fake, beside, ADMIN_URL=reject) | {"MCP_SERVER_NAME": "other"}
    errors = beside.verify(**settings).stderr
    [client] = re.findall(r"client (\S+) was not deleted \(500\): delete it manually", errors)
    assert client in beside.clients()
    beside.delete_client(client)
