"""The Makefile on a machine without Docker: what it starts, installs, says and leaves alone."""

import os
import re
from pathlib import Path

import pytest

from authserver_client import ADMIN_KEY, status_of
from sandbox import PYTHON, Sandbox, wait_until

RUNNING = "tier 01 is running: {0.issuer} (a stand-in: see Run it in README.md) and {0.mcp_url}\n"
OLD_PYTHON = f"{PYTHON} -I -c 'import sys; sys.version_info = (3, 11); '\"$3\""  # $3: after -I -c
INSTALLING = "installing tests/requirements/agent.txt into .venv\n"


def test_run_starts_a_stand_in(sandbox: Sandbox) -> None:
    """The stand-in inherits no pipe, terminal, proxy or secret, and listens on loopback only."""
    foreign = {"CLIENT_SECRET": "x", "SSL_CERT_FILE": "/nowhere", "ALL_PROXY": "socks5://there:1"}
    own = {
        "AUTHPLANE_ADMIN_API_KEY": ADMIN_KEY,
        "TOKEN_SECONDS": "60",
        "MCP_SERVER_NAME": "caf\udce9",  # not UTF-8
        "LD_LIBRARY_PATH": "/nowhere",
    }
    first = sandbox.run("bash", "-c", "make run 3>&1 9>&2", **foreign, **own)
    assert (first.stdout, first.stderr) == (RUNNING.format(sandbox), "")
    [server] = sandbox.processes()
    assert os.getsid(server.pid) == server.pid  # no Ctrl-C, no SIGHUP of the terminal reaches it
    assert server.environ().keys() & {*own, *foreign, "HOME"} == {*own, "HOME"}
    listening = [each.laddr.ip for each in server.net_connections() if each.status == "LISTEN"]
    assert listening == ["127.0.0.1"] * 3
    token = sandbox.authserver.request_token(sandbox.authserver.register_client()).json()
    assert token["expires_in"] == 60
    for name in (".env", ".stand-in.log"):  # nobody else can read them
        assert not (sandbox.project / name).stat().st_mode & 0o077


def test_run_keeps_what_is_running(sandbox: Sandbox) -> None:
    """A second run uses the stand-in, and leaves it when it fails. If it was killed, it starts."""
    assert sandbox.make("run").stdout == RUNNING.format(sandbox)
    [server] = sandbox.processes()
    assert sandbox.make("run").stdout == RUNNING.format(sandbox)
    other = sandbox.make("run", AUTHSERVER_URL="http://localhost:1")
    assert "if you changed .env, run make clean first" in other.stderr
    assert sandbox.make("run", MCP_URL="http://localhost:1/mcp").returncode != 0
    assert sandbox.processes() == [server]
    server.kill()
    server.wait(10)
    assert sandbox.make("run").stdout == RUNNING.format(sandbox)


def test_runs_at_the_same_time_start_one(sandbox: Sandbox) -> None:
    for run in [sandbox.start("make", "run") for _ in range(3)]:
        assert run.communicate(timeout=60) == (RUNNING.format(sandbox), "")
    assert len(sandbox.processes()) == 1


@pytest.mark.parametrize(
    ("change", "folder"),
    [
        ("kill -STOP $(sed -n 's/^process //p' .stand-in.log)", "project"),
        ("rm tests/.venv", "project"),  # its Python has gone
        ("mv ../project ../moved", "moved"),
        ("ln -s project ../link", "link"),
    ],
)
def test_clean(sandbox: Sandbox, change: str, folder: str) -> None:
    assert sandbox.make("run").stdout == RUNNING.format(sandbox)
    sandbox.run("sh", "-c", change)
    sandbox.project = sandbox.folder / folder
    assert sandbox.make("clean", PWD=str(sandbox.project)).returncode == 0
    assert sandbox.leftovers() == []
    assert [*sandbox.project.rglob(".venv"), *sandbox.project.glob(".env")] == []


@pytest.mark.parametrize("end", ["kill $0", "kill -INT -- -$0", "kill -QUIT -- -$0", "make clean"])
def test_a_run_that_is_ended_leaves_nothing(sandbox: Sandbox, end: str) -> None:
    run = sandbox.start("make", "run")
    log = sandbox.project / ".stand-in.log"
    wait_until(lambda: log.exists() and "process" in log.read_text(), "the start of tier 01")
    sandbox.run("bash", "-c", end, str(run.pid))
    output, errors = run.communicate(timeout=20)
    assert "tier 01 is running" not in output
    assert "Traceback" not in errors
    assert sandbox.leftovers() == []


def test_a_tool_is_missing(sandbox: Sandbox) -> None:
    sandbox.make_tool("jq", "exit 127")
    assert "start.sh: jq is missing: install it" in sandbox.make("run").stderr


def test_python_is_too_old(sandbox: Sandbox) -> None:
    (sandbox.project / "tests/.venv").unlink()
    sandbox.make_tool("python3", OLD_PYTHON)
    assert "no Python 3.12 or newer: install one" in sandbox.make("run").stderr


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("ADMIN_URL", "{0.issuer}", ": Address already in use. If a tier 01 is starting there, "),
        ("ADMIN_URL", "http://localhost:99999", "ADMIN_URL=http://localhost:99999: "),
        ("AUTHSERVER_URL", "http://localhost.invalid", "=http://localhost.invalid (no response, "),
        ("AUTHSERVER_URL", "localhost", "AUTHSERVER_URL=localhost: it must be an http"),
        ("RESOURCE_URI", 'http://a/"', 'RESOURCE_URI=http://a/": it must be an http'),
        (
            "RESOURCE_URI",
            "{0.issuer}/other",
            "is not a protected MCP server (expected 401, got 404)",
        ),
        ("TOKEN_SECONDS", "x", "tier 01 did not start: ValueError: invalid literal for int()"),
    ],
)
def test_wrong_settings_are_reported(sandbox: Sandbox, name: str, value: str, message: str) -> None:
    assert message in sandbox.make("run", **{name: value.format(sandbox)}).stderr
    assert sandbox.leftovers() == []


def test_keeps_what_it_did_not_make(guest: Sandbox) -> None:
    """An edited .env, a tier 01, and the process that a stale .stand-in.log names stay."""
    other = guest.start("sleep", "60")
    (guest.project / ".env").write_text("CLIENT_ID=mine\n")
    (guest.project / ".stand-in.log").write_text(f"process {other.pid}\n")
    assert guest.make("run").stdout == RUNNING.format(guest)
    wrong = guest.make("run", MCP_URL="http://localhost:1/mcp")
    assert "http://localhost:1/mcp is not a protected MCP server" in wrong.stderr
    assert guest.make("clean").returncode == 0
    assert status_of(guest.mcp_url) == 401
    assert other.poll() is None
    assert (guest.project / ".env").read_text() == "CLIENT_ID=mine\n"


def test_installs_the_pinned_packages(guest: Sandbox) -> None:
    """The user's settings of pip, Python and the locale are ignored, and an old environment."""
    constraint = guest.folder / "constraint.txt"
    constraint.write_text("h11==0.0.1\n")
    hostile_settings = {"PIP_USER": "1", "PIP_TARGET": "there", "PIP_CONSTRAINT": str(constraint)}
    hostile_settings |= {"PIP_DRY_RUN": "1", "PIP_PREFIX": "there", "PIP_ROOT": "there"}
    hostile_settings |= {"PYTHONHOME": "/nowhere", "LC_ALL": "none"}
    make_old_environment(guest.project / ".venv")
    requirements = guest.project / "tests/requirements/agent.txt"
    pinned = re.findall(r"(?ms)^(?:h11|idna)==.*?[^\\]$", requirements.read_text())
    requirements.write_text(pinned[0])
    assert guest.make("run", PIP_NO_INDEX="1", **hostile_settings).returncode != 0
    for count, printed in ((1, INSTALLING), (2, INSTALLING), (2, "")):
        requirements.write_text("\n".join(pinned[:count]))
        result = guest.make("run", **hostile_settings)
        expected = printed + RUNNING.format(guest)
        assert (result.stdout, result.stderr) == (expected, "")
    installed = guest.project.glob(".venv/lib/*/*/*.dist-info")
    assert {path.name.split("-")[0] for path in installed} == {"h11", "idna", "pip"}
    assert guest.make("run", PY="python3.99").returncode != 0  # there is none
    assert guest.make("run").stdout == RUNNING.format(guest)  # the environment is still there


def make_old_environment(folder: Path) -> None:
    """Make an environment whose Python is too old."""
    folder.unlink()
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").write_text(f"#!/bin/sh\n{OLD_PYTHON}\n")
    (folder / "bin/python").chmod(0o755)
