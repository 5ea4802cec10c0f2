"""The Makefile on a machine without Docker: what it starts, installs, says and leaves alone."""

import os
import re

import pytest

from authserver_client import status_of
from sandbox import Sandbox, wait_until

RUNNING = "tier 01 is running: {0.issuer} (a stand-in: see Run it in README.md) and {0.mcp_url}\n"
INSTALLING = "installing tests/requirements/agent.txt into .venv\n"
INSTALL = "PY=py bash tests/harness/install.sh .venv agent"
BEFORE_CLEAN = {  # and the folder in which it is run
    "kill -STOP $(sed -n 's/^process //p' .started)": "clone",
    "mv ../clone ../moved": "moved",
    "ln -s clone ../link": "link",
}
BROKEN_CURL = """echo 'echo "curl: (23) full"; exit 1'"""
WRONG = {
    "run.sh: jq is missing: install it": "rm ../bin/jq",
    "no Python 3.12 or newer: install one": "rm tests/.venv; echo 'exit 1' >../bin/python3",
    "curl: (23) full": f"rm ../bin/curl; {BROKEN_CURL} >../bin/curl; chmod +x ../bin/curl",
    "Set another port in .env": "echo ADMIN_URL=http://localhost:$AUTHSERVER_PORT >.env",
    "AUTHSERVER_URL=http://127.0.0.2:1 (no": "echo AUTHSERVER_URL=http://127.0.0.2:1 >.env",
}
DAMAGE = [
    "mv .venv/lib/python3* .venv/lib/python3.1",  # as after an upgrade of Python
    "touch ../newer",  # PY is another one
]


def test_run_starts_a_stand_in(sandbox: Sandbox) -> None:
    """It holds no pipe, terminal, proxy and secret of what started it; a second run finds it."""
    foreign = {"CLIENT_SECRET": "x", "SSL_CERT_FILE": "/nowhere", "ALL_PROXY": "socks5://there:1"}
    first = sandbox.run("bash", "-c", "make run 3>&1 9>&2", TOKEN_SECONDS="60", **foreign)
    assert (first.stdout, first.stderr) == (RUNNING.format(sandbox), "")
    [server] = sandbox.processes()
    assert os.getsid(server.pid) == server.pid  # no Ctrl-C, no SIGHUP of the terminal reaches it
    own = {"AUTHPLANE_ADMIN_API_KEY", "TOKEN_SECONDS"}
    assert server.environ().keys() & {*own, *foreign} == own
    for name in (".env", ".started"):  # nobody else can read them
        assert not (sandbox.clone / name).stat().st_mode & 0o077
    assert sandbox.make("run").stdout == RUNNING.format(sandbox)
    assert sandbox.processes() == [server]
    server.kill()
    assert sandbox.make("run").stdout == RUNNING.format(sandbox)


def test_eight_runs_at_once(sandbox: Sandbox) -> None:
    for run in [sandbox.start("make", "run") for _ in range(8)]:
        assert run.communicate(timeout=60) == (RUNNING.format(sandbox), "")
    assert len(sandbox.processes()) == 1


@pytest.mark.parametrize(("change", "folder"), BEFORE_CLEAN.items())
def test_clean(sandbox: Sandbox, change: str, folder: str) -> None:
    sandbox.run("sh", "-c", f"make run; {change}")
    sandbox.clone = sandbox.folder / folder
    assert sandbox.make("clean", PWD=str(sandbox.clone)).returncode == 0
    assert [*sandbox.left(), *sandbox.clone.rglob(".venv"), *sandbox.clone.glob(".env")] == []


@pytest.mark.parametrize("end", ["kill -INT -- -$0", "make clean"])
def test_a_run_that_is_ended_leaves_nothing(sandbox: Sandbox, end: str) -> None:
    run = sandbox.start("make", "run")
    wait_until((sandbox.clone / ".started").exists, "the start of tier 01")
    sandbox.run("bash", "-c", end, str(run.pid))
    output, errors = run.communicate(timeout=20)
    assert "tier 01 is running" not in output
    assert "Traceback" not in errors
    assert sandbox.left() == []


@pytest.mark.parametrize("message", WRONG)
def test_says_what_to_do(sandbox: Sandbox, message: str) -> None:
    sandbox.run("sh", "-c", WRONG[message])
    assert message in sandbox.make("run").stderr
    assert sandbox.left() == []


def test_what_others_have_made_is_left_alone(beside_servers: Sandbox) -> None:
    """That is an edited .env, a tier 01, and a process with the number of a server that ended."""
    other = beside_servers.start("sleep", "60")
    (beside_servers.clone / ".env").write_text("CLIENT_ID=mine\n")
    (beside_servers.clone / ".started").write_text(f"process {other.pid}\n")
    assert beside_servers.make("run").stdout == RUNNING.format(beside_servers)
    wrong = beside_servers.make("run", MCP_URL="http://localhost:1/mcp")
    assert "http://localhost:1/mcp is no protected MCP server" in wrong.stderr
    assert beside_servers.make("clean").returncode == 0
    assert status_of(beside_servers.mcp_url) == 401
    assert other.poll() is None
    assert (beside_servers.clone / ".env").read_text() == "CLIENT_ID=mine\n"


def test_installs_the_pinned_packages(beside_servers: Sandbox) -> None:
    """It does so whatever pip, Python and the locale are configured to do elsewhere."""
    elsewhere = {"PIP_USER": "1", "PIP_TARGET": "there", "PYTHONHOME": "/nowhere", "LC_ALL": "none"}
    (beside_servers.clone / ".venv").unlink()
    requirements = beside_servers.clone / "tests/requirements/agent.txt"
    pinned = re.findall(r"(?ms)^(?:h11|idna)==.*?[^\\]$", requirements.read_text())
    for count, printed in ((1, INSTALLING), (2, INSTALLING), (2, "")):
        requirements.write_text("\n".join(pinned[:count]))
        result = beside_servers.make("run", **elsewhere)
        assert (result.stdout, result.stderr) == (printed + RUNNING.format(beside_servers), "")
    installed = beside_servers.clone.glob(".venv/lib/*/*/*.dist-info")
    assert {path.name.split("-")[0] for path in installed} == {"h11", "idna", "pip"}


def test_makes_an_environment_anew(sandbox: Sandbox) -> None:
    newer = 'if [ "$2" = -c ] && [ -e ../newer ]; then echo 3.99; else exec python3 "$@"; fi'
    sandbox.make_tool("py", newer)
    (sandbox.clone / "tests/requirements/agent.txt").write_text("")
    sandbox.run("sh", "-c", f"rm .venv; {INSTALL}")
    assert sandbox.run("sh", "-c", INSTALL).stdout == ""
    for damage in DAMAGE:
        assert sandbox.run("sh", "-c", f"{damage}; {INSTALL}").stdout == INSTALLING
