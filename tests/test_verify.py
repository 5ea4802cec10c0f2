"""verify.sh as a program: green only for a tier 01 as it should be, and nothing stays behind."""

import base64
import json
import re
import resource
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from conftest import (
    KEY,
    RESOURCE,
    Answer,
    Handler,
    Request,
    Result,
    StartFake,
    Tier01,
    http,
    interrupt,
    plain_environment,
    start_verify,
    wait_until,
)

type Change = Callable[[Request, Handler], Answer]

PROOFS = """\
✓ discovery                      200
  agent on this host: the issuer is http://localhost:PORT
✓ no token: refused              401 Bearer resource_metadata
✓ resource: registered           200 demo-mcp
✓ client: registered             201
✓ agent: let in                  0 authenticated MCP initialize OK
✓ right credentials: minted      200
✓ wrong secret: refused          401 invalid_client
✓ scope not granted: refused     400 invalid_scope
✓ unknown resource: refused      400 invalid_target
✓ tampered token: refused        401 Bearer invalid_token resource_metadata
✓ other audience: minted         200
✓ other audience: refused        401 Bearer invalid_token resource_metadata
✓ client: deleted                204
✓ deleted client: refused        401 invalid_client
ALL CHECKS PASSED
"""


@pytest.fixture
def place(prepared: Path) -> Path:
    """A clone in which `make run` has prepared the agent, with a folder for temporary files."""
    (prepared / "tmp").mkdir()
    return prepared


def in_place(place: Path, settings: dict[str, str]) -> dict[str, str]:
    return settings | {"TMPDIR": str(place / "tmp")}


def verify(place: Path, settings: dict[str, str]) -> Result:
    run = start_verify(place, in_place(place, settings))
    output, errors = run.communicate(timeout=60)
    return Result([], run.returncode, output, errors)


def masked(output: str) -> str:
    """Return the output with the ports of this run replaced."""
    return re.sub(r"localhost:\d+", "localhost:PORT", output)


def in_front_of(base: str, change: Change) -> Handler:
    """Return a handler that asks the server at base, unless change answers something else."""

    def forward(request: Request) -> Answer:
        headers = {name: request.headers[name] for name in request.headers.keys() - {"host"}}
        with httpx.Client(base_url=base, trust_env=False, timeout=10) as client:
            answer = client.request(
                request.method, request.path, headers=headers, content=request.body
            )
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


def as_it_is(request: Request, forward: Handler) -> Answer:
    return forward(request)


def behind(start: StartFake, tier01: Tier01, server: str, change: Change) -> dict[str, str]:
    """Return the settings for a tier 01 with one server behind a fake that changes answers."""
    base = tier01.settings[server].removesuffix("/mcp")
    path = tier01.settings[server].removeprefix(base)
    return tier01.settings | {server: start(in_front_of(base, change)).url + path}


def test_proves_everything_and_leaves_nothing(place: Path, tier01: Tier01) -> None:
    before = tier01.clients()
    result = verify(place, tier01.settings)
    assert (masked(result.stdout), result.stderr, result.returncode) == (PROOFS, "", 0)
    assert set(tier01.clients()) <= set(before) or len(tier01.clients()) <= len(before)
    assert [one["slug"] for one in tier01.admin("GET", "resources").json()] == ["demo-mcp"]
    assert list((place / "tmp").iterdir()) == []


def test_reads_settings_from_dotenv_without_running_it(place: Path, tier01: Tier01) -> None:
    settings = tier01.settings | {"AUTHPLANE_ADMIN_API_KEY": f'"{KEY}"  # a comment'}
    lines = [f"export {name}={value}\r\n" for name, value in settings.items()]
    (place / ".env").write_text(
        f"ISSUER_URL=http://first\nX=$(touch {place}/ran)\n{''.join(lines)}"
    )
    result = verify(place, {"ADMIN_URL": tier01.admin_url})
    assert masked(result.stdout) == PROOFS
    assert not (place / "ran").exists()


def test_environment_wins_over_dotenv(place: Path, tier01: Tier01) -> None:
    (place / ".env").write_text("AUTHPLANE_ADMIN_API_KEY=wrong\nMCP_URL=http://localhost:1\n")
    assert verify(place, tier01.settings).stdout.count("✓") == 14


def test_two_runs_do_not_disturb_each_other(place: Path, tier01: Tier01) -> None:
    runs = [start_verify(place, in_place(place, tier01.settings)) for _ in range(3)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [(masked(out), err) for out, err in outputs] == [(PROOFS, "")] * 3


def test_colours_only_on_a_terminal(place: Path, tier01: Tier01) -> None:
    terminal = ["script", "-qec", str(place / "verify.sh"), "/dev/null"]
    coloured, plain = (
        subprocess.run(
            terminal,
            env=plain_environment(**in_place(place, tier01.settings), TERM="xterm") | more,
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
        ).stdout
        for more in ({}, {"NO_COLOR": "1"})
    )
    assert "\x1b[32m✓\x1b[0m discovery" in coloured
    assert masked(plain.replace("\r\n", "\n")) == PROOFS


def form(request: Request) -> str:
    return request.body.decode()


def claims(request: Request) -> dict[str, object]:
    """Return the claims of the bearer token of a request, unverified."""
    part = request.headers.get("authorization", "..").split(".")[1]
    return json.loads(base64.urlsafe_b64decode(part + "==") or "{}")


LET_IN = http(
    "200 OK", '{"jsonrpc": "2.0", "id": 1, "result": {"serverInfo": {"name": "demo-server"}}}'
)
MINTED = http("200 OK", '{"access_token": "x.y.z", "token_type": "Bearer", "expires_in": 60}')


def mints_for_any_secret(request: Request, forward: Handler) -> Answer:
    return MINTED if request.path == "/oauth/token" else forward(request)


def mints_any_scope(request: Request, forward: Handler) -> Answer:
    return MINTED if "mcp%3Anot" in form(request) else forward(request)


def mints_for_any_resource(request: Request, forward: Handler) -> Answer:
    return MINTED if "not-registered" in form(request) else forward(request)


def knows_no_invalid_client(request: Request, forward: Handler) -> Answer:
    answer = forward(request)
    return http("400 Bad Request", "{}") if b"invalid_client" in bytes(answer or b"") else answer  # type: ignore[arg-type]


def takes_tampered_tokens(request: Request, forward: Handler) -> Answer:
    tampered = request.headers.get("authorization", "").endswith("AAAAAAAAAA")
    return LET_IN if tampered else forward(request)


def takes_tokens_for_others(request: Request, forward: Handler) -> Answer:
    audience = claims(request).get("aud", [""])
    return LET_IN if "/mcp" not in str(audience) and audience != [""] else forward(request)


def resource_with(**members: object) -> Change:
    body = json.dumps(RESOURCE | {"id": "the-id", "uri": "http://localhost:8080/mcp"} | members)
    return always("/admin/resources", http("200 OK", body))


BROKEN: dict[str, tuple[str, Change, str]] = {
    "MCP lets anybody in": ("MCP_URL", always("/", LET_IN), "no token: refused"),
    "MCP 405": ("MCP_URL", always("/", http("405 No")), "no token: refused"),
    "MCP 302": ("MCP_URL", always("/", http("302 Found", location="/x")), "no token: refused"),
    "MCP 500": ("MCP_URL", always("/", http("500 Oops")), "no token: refused"),
    "MCP 401 without metadata": (
        "MCP_URL",
        always("/", http("401 No", www_authenticate="Bearer")),
        "no token: refused",
    ),
    "MCP 401 with Basic": (
        "MCP_URL",
        always("/", http("401 No", www_authenticate='Basic realm="resource_metadata"')),
        "no token: refused",
    ),
    "MCP silent": ("MCP_URL", always("/", b""), "no token: refused"),
    "MCP takes tampered tokens": ("MCP_URL", takes_tampered_tokens, "tampered token: refused"),
    "MCP takes tokens for others": ("MCP_URL", takes_tokens_for_others, "other audience: refused"),
    "metadata without issuer": (
        "ISSUER_URL",
        always("/.well-known", http("200 OK", "{}")),
        "names no issuer",
    ),
    "metadata is HTML": ("ISSUER_URL", always("/.well-known", http("200 OK", "<p>")), "no issuer"),
    "mints nothing": (
        "ISSUER_URL",
        always("/oauth", http("500 Oops")),
        "right credentials: minted",
    ),
    "mints for a wrong secret": ("ISSUER_URL", mints_for_any_secret, "wrong secret: refused"),
    "400 for a wrong secret": (
        "ISSUER_URL",
        knows_no_invalid_client,
        "wrong secret: refused",
    ),
    "mints any scope": ("ISSUER_URL", mints_any_scope, "scope not granted: refused"),
    "mints for any resource": (
        "ISSUER_URL",
        mints_for_any_resource,
        "unknown resource: refused",
    ),
    "admin 401": (
        "ADMIN_URL",
        always("/", http("401 No", '{"error": "unauthorized"}')),
        "expected 20[01] demo-mcp, got 401: AUTHPLANE_ADMIN_API_KEY is not",
    ),
    "admin 500": ("ADMIN_URL", always("/", http("500 Oops")), "resource: registered"),
    "admin silent": ("ADMIN_URL", always("/", b""), "does not answer at ADMIN_URL"),
    "admin 500 for clients": (
        "ADMIN_URL",
        always("/admin/clients", http("500 Oops")),
        "client: registered",
    ),
    "resource with another uri": (
        "ADMIN_URL",
        resource_with(uri="http://other/mcp"),
        "/admin/resources/the-id",
    ),
    "resource without the scope": (
        "ADMIN_URL",
        resource_with(scopes=[]),
        "/admin/resources/the-id",
    ),
    "client stays": (
        "ADMIN_URL",
        always("/admin/clients/", http("500 Oops"), "DELETE"),
        "client: deleted",
    ),
    "deleted client still mints": (
        "ADMIN_URL",
        always("/admin/clients/", http("204 No Content"), "DELETE"),
        "deleted client: refused",
    ),
}


@pytest.mark.parametrize(("more", "shown"), [("", ""), ("\x1b[31m\r\nALL", " [31m  ALL")])
def test_does_nothing_that_a_hostile_issuer_says(
    fake: StartFake, place: Path, tier01: Tier01, more: str, shown: str
) -> None:
    """No other scheme is spoken, and nothing is sent to the terminal."""
    with socket.create_server(("127.0.0.2", 0)) as listener:
        listener.settimeout(0.1)
        issuer = f"ftp://127.0.0.2:{listener.getsockname()[1]}"
        hostile = http("200 OK", json.dumps({"issuer": f"{issuer}{more}"}))
        settings = behind(fake, tier01, "ISSUER_URL", always("/.well-known", hostile))
        result = verify(place, settings | {"DOCKER_HOST": "unix:///nowhere"})
        with pytest.raises(TimeoutError):
            listener.accept()
    assert result.returncode == 1
    assert f"the issuer {issuer}{shown} is out of reach here" in result.stderr
    assert result.stderr[:-1].isprintable()


def test_endless_answer_does_not_fill_the_memory(
    fake: StartFake, place: Path, tier01: Tier01
) -> None:
    def endless(_: Request) -> Iterator[bytes]:
        yield b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n"
        while True:
            yield b" " * 65536

    server = fake(endless)
    run = start_verify(place, in_place(place, tier01.settings | {"ISSUER_URL": server.url}))
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 1
    assert "discovery: expected 200, got no answer" in errors
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 500_000


def test_agent_gets_its_own_credentials_only(place: Path, tier01: Tier01) -> None:
    (place / ".venv").unlink()
    (place / ".venv/bin").mkdir(parents=True)
    (place / ".venv/bin/python").write_text(f"#!/bin/sh\nenv >{place}/agents\n")
    (place / ".venv/bin/python").chmod(0o755)
    assert verify(place, tier01.settings).returncode == 1
    environment = (place / "agents").read_text()
    assert "CLIENT_SECRET=" in environment
    assert KEY not in environment


def test_does_not_mind_a_curlrc(place: Path, tier01: Tier01) -> None:
    (place / "home").mkdir()
    (place / "home/.curlrc").write_text("head\n")
    settings = tier01.settings | {"HOME": f"{place}/home"}
    assert masked(verify(place, settings).stdout) == PROOFS


@pytest.mark.parametrize(("server", "change", "told"), BROKEN.values(), ids=BROKEN.keys())
def test_turns_red(
    fake: StartFake, place: Path, tier01: Tier01, server: str, change: Change, told: str
) -> None:
    result = verify(place, behind(fake, tier01, server, change))
    assert result.returncode == 1
    assert "ALL CHECKS PASSED" not in result.stdout
    assert told in result.stderr
    assert re.match(r"verify\.sh: [^\n]+\n", result.stderr)
    if "✗" in result.stdout:
        assert result.stdout.splitlines()[-1].startswith("✗")


def test_turns_red_when_the_agent_is_not_let_in(place: Path, tier01: Tier01) -> None:
    result = verify(place, tier01.settings | {"MCP_SERVER_NAME": "other"})
    assert result.returncode == 1
    assert "✗ agent: let in" in result.stdout
    assert "no result.serverInfo.name 'other'" in result.stderr


def test_says_that_the_agent_is_not_prepared(checkout: Path, tier01: Tier01) -> None:
    (checkout / "tmp").mkdir()
    result = verify(checkout, tier01.settings)
    assert result.returncode == 1
    assert result.stderr == "verify.sh: the agent has no .venv: make run prepares it\n"


@pytest.mark.parametrize("missing", ["curl", "jq"])
def test_says_which_tool_is_missing(checkout: Path, tmp_path: Path, missing: str) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for tool in {"bash", "dirname", "env", "sed", "tail", "curl", "jq"} - {missing}:
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    result = subprocess.run(
        [checkout / "verify.sh"], env={"PATH": str(tools)}, capture_output=True, text=True
    )
    assert result.returncode == 1
    assert result.stderr.startswith(f"verify.sh: {missing} is missing: install it")


def test_registers_the_resource_when_it_is_absent(
    fake: StartFake, place: Path, tier01: Tier01
) -> None:
    created: list[Request] = []

    def absent(request: Request, forward: Handler) -> Answer:
        if request.path.startswith("/admin/resources"):
            if request.method == "GET":
                return http("404 Not Found")
            created.append(request)
            return http("201 Created", request.body)
        return forward(request)

    result = verify(place, behind(fake, tier01, "ADMIN_URL", absent))
    assert masked(result.stdout) == PROOFS.replace("200 demo-mcp", "201 demo-mcp")
    assert [json.loads(request.body) for request in created] == [RESOURCE | {"uri": tier01.mcp_url}]


def test_looks_again_after_a_lost_race(fake: StartFake, place: Path, tier01: Tier01) -> None:
    def late(request: Request, forward: Handler) -> Answer:
        if request.path.startswith("/admin/resources") and not late_answers:
            return forward(request)
        return late_answers.pop(0) if "/admin/resources" in request.path else forward(request)

    late_answers = [http("404 Not Found"), http("409 Conflict")]
    result = verify(place, behind(fake, tier01, "ADMIN_URL", late))
    assert masked(result.stdout) == PROOFS


def test_older_servers_say_invalid_scope(fake: StartFake, place: Path, tier01: Tier01) -> None:
    def older(request: Request, forward: Handler) -> Answer:
        if "not-registered" in form(request):
            return http("400 Bad Request", '{"error": "invalid_scope"}')
        return forward(request)

    result = verify(place, behind(fake, tier01, "ISSUER_URL", older))
    assert masked(result.stdout) == PROOFS.replace("invalid_target", "invalid_scope")


def test_shows_no_secret(fake: StartFake, place: Path, tier01: Tier01) -> None:
    """No secret in the arguments of any process, in the output or in a file that stays."""
    answers: list[bytes] = []

    def recorded(request: Request, forward: Handler) -> Answer:
        answer = forward(request)
        assert isinstance(answer, bytes)
        answers.append(answer)
        return answer

    settings = behind(fake, tier01, "ISSUER_URL", recorded)
    settings["ADMIN_URL"] = behind(fake, tier01, "ADMIN_URL", recorded)["ADMIN_URL"]
    seen: set[bytes] = set()
    done = threading.Event()

    def sample() -> None:
        while not done.is_set():
            for entry in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    seen.add(entry.read_bytes())
                except OSError:
                    continue

    sampler = threading.Thread(target=sample)
    sampler.start()
    result = verify(place, settings)
    done.set()
    sampler.join()
    assert masked(result.stdout) == PROOFS
    said = b"\n".join(answers).decode()
    secrets = re.findall(r'"(?:client_secret|access_token)": ?"([^"]+)"', said)
    [(client, secret)] = re.findall(r'"client_id":"([^"]+)","client_secret":"([^"]+)"', said)
    secrets += [KEY, base64.b64encode(f"{client}:{secret}".encode()).decode()]
    assert len(secrets) == 5
    assert any(b"agent.py" in arguments for arguments in seen)
    assert any(b"curl" in arguments for arguments in seen)
    for hidden in secrets:
        assert not any(hidden.encode() in arguments for arguments in seen)
        assert hidden not in result.stdout + result.stderr
    assert list((place / "tmp").iterdir()) == []


def registering(request: Request) -> bool:
    return (request.method, request.path) == ("POST", "/admin/clients")


def minting(request: Request) -> bool:
    return request.path == "/oauth/token"


def calling(request: Request) -> bool:
    return "bearer" in request.headers.get("authorization", "").lower()


@pytest.mark.parametrize("signal_number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize(
    ("server", "moment"),
    [("ADMIN_URL", registering), ("ISSUER_URL", minting), ("MCP_URL", calling)],
    ids=["while registering the client", "while minting", "while the agent calls"],
)
def test_cleans_up_when_interrupted(
    fake: StartFake,
    place: Path,
    tier01: Tier01,
    server: str,
    moment: Callable[[Request], bool],
    signal_number: signal.Signals,
) -> None:
    """The signal comes when the server has acted and has not answered yet."""
    reached, go_on = threading.Event(), threading.Event()
    registered: list[str] = []

    def slow(request: Request, forward: Handler) -> Answer:
        answer = forward(request)
        if moment(request):
            reached.set()
            go_on.wait(20)
        return answer

    def watched(request: Request, forward: Handler) -> Answer:
        answer = slow(request, forward) if server == "ADMIN_URL" else forward(request)
        if registering(request):
            assert isinstance(answer, bytes)
            registered.extend(re.findall(r'"client_id":"([^"]+)"', answer.decode()))
        return answer

    settings = behind(fake, tier01, "ADMIN_URL", watched)
    if server != "ADMIN_URL":
        settings[server] = behind(fake, tier01, server, slow)[server]
    run = start_verify(place, in_place(place, settings))
    assert reached.wait(20)
    interrupt(run, signal_number)
    if moment is not calling:  # curl is waited for, the agent is ended
        threading.Timer(0.3, go_on.set).start()
    output, errors = run.communicate(timeout=20)
    assert run.returncode == 128 + signal_number
    assert "ALL CHECKS PASSED" not in output
    assert errors == ""
    [client] = registered
    assert client not in tier01.clients()
    wait_until(lambda: not group_members(run.pid), "the end of every process of the run", 5)
    go_on.set()
    assert list((place / "tmp").iterdir()) == []


def group_members(group: int) -> list[str]:
    """Return the processes of a process group that have not ended."""
    listed = subprocess.run(["ps", "-eo", "pgid=,stat=,args="], capture_output=True, text=True)
    rows = [line.split(None, 2) for line in listed.stdout.splitlines()]
    return [row[2] for row in rows if row[0] == str(group) and not row[1].startswith("Z")]


def test_reports_a_client_that_it_could_not_delete(
    fake: StartFake, place: Path, tier01: Tier01
) -> None:
    refuse = always("/admin/clients/", http("500 Oops"), "DELETE")
    settings = behind(fake, tier01, "ADMIN_URL", refuse) | {"MCP_SERVER_NAME": "other"}
    result = verify(place, settings)
    [client] = re.findall(r"client (\S+) stays: DELETE was answered 500", result.stderr)
    assert client in tier01.clients()
    tier01.admin("DELETE", f"clients/{client}", params={"force": "true"})
