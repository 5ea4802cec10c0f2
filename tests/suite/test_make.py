"""The Makefile on a machine without Docker: what it starts, makes, says and leaves alone."""

import os
import re
import signal
import time

import pytest

from authserver_client import status_of
from conftest import NewSandbox, StartFake
from fakes import http_response
from sandbox import Sandbox, wait_until

INSTALL = ["tests/harness/install.sh", ".venv", "agent"]


def assert_fails(sandbox: Sandbox, message: str, **settings: str) -> str:
    """Check that `make run` fails, leaves nothing, and tells that in its last line; return all."""
    result = sandbox.make("run", **settings)
    *_, last = [line for line in result.stderr.splitlines() if ": *** " not in line]
    assert (result.returncode, sandbox.left()) == (2, [])
    assert message in last
    assert "Traceback" not in result.stderr
    return result.stderr


FAILS = {
    "MCP_URL=http://: it must begin with http:// or https:// and a host": {"MCP_URL": "http://"},
    "TIER01_RUNTIME=podman: it can be native or docker": {"TIER01_RUNTIME": "podman"},
    "no Docker Engine with Compose v2 is running": {"TIER01_RUNTIME": "docker"},
    "no authorization server at https://auth.invalid": {"AUTHSERVER_URL": "https://auth.invalid"},
    "set MCP_URL to the same path": {"RESOURCE_URI": "http://localhost/api"},
    "no Python 3.12 or newer": {"PY": "python3", "PYTHONPATH": "old"},
    "on Debian and Ubuntu the package python3.": {"PYTHONPATH": "without-venv"},
}
PYTHONS = {"old": "sys.version_info = (3, 11)", "without-venv": "sys.modules['ensurepip'] = None"}


@pytest.mark.parametrize(("message", "settings"), FAILS.items(), ids=FAILS.keys())
def test_says_what_to_do(new_sandbox: NewSandbox, message: str, settings: dict[str, str]) -> None:
    sandbox = new_sandbox(prepared=False)
    for folder, code in PYTHONS.items():
        (sandbox.clone / folder).mkdir()
        (sandbox.clone / folder / "sitecustomize.py").write_text(f"import sys; {code}")
    assert_fails(sandbox, message, **settings)


def test_shows_the_log_of_a_server_that_did_not_start(sandbox: Sandbox) -> None:
    message = "tier 01 did not start: the end of the log is above"
    started = time.monotonic()
    shown = assert_fails(sandbox, message, ADMIN_URL=sandbox.issuer)
    assert f"serve.py: can't listen on :{sandbox.ports[0]}: " in shown
    assert time.monotonic() - started < 20  # it is not waited for any more


def test_says_which_port_is_taken(fake: StartFake, sandbox: Sandbox) -> None:
    issuer = fake(lambda _: http_response("404 Not Found")).url
    port = issuer.split(":")[2]
    message = f"listening on port {port}: set AUTHSERVER_URL to another port"
    assert_fails(sandbox, message, AUTHSERVER_URL=issuer)


@pytest.mark.parametrize("tool", ["uv", "pip"])
def test_installs_the_pinned_packages(new_sandbox: NewSandbox, tool: str) -> None:
    """Two of them, because pip is slow."""
    sandbox = new_sandbox("uv", prepared=False)
    requirements = sandbox.clone / "tests/requirements/agent.txt"
    chosen = re.findall(r"(?ms)^(?:h11|idna)==.*?[^\\]$", requirements.read_text())
    requirements.write_text("\n".join(chosen))
    uv = str(sandbox.folder / "bin/uv") if tool == "uv" else ""
    message = "installing tests/requirements/agent.txt into .venv\n"
    result = sandbox.run(*INSTALL, UV=uv)
    assert (result.stdout, result.stderr) == (message, "")
    installed = sandbox.clone.glob(".venv/lib/*/site-packages/*.dist-info")
    names = {path.name.split("-")[0] for path in installed}
    assert names == ({"h11", "idna"} if tool == "uv" else {"h11", "idna", "pip"})
    assert sandbox.run(*INSTALL, UV=uv).stdout == ""
    requirements.write_text(chosen[0])
    assert sandbox.run(*INSTALL, UV=uv).stdout == message


def test_mends_an_environment(new_sandbox: NewSandbox) -> None:
    """One whose Python was upgraded or removed, one that was left half-made, and another PY."""
    sandbox = new_sandbox("uv", prepared=False)
    requirements = sandbox.clone / "tests/requirements/agent.txt"
    requirements.write_text("")
    uv = str(sandbox.folder / "bin/uv")
    other = sandbox.folder / "bin/python3-other"
    other.write_text('#!/bin/sh\n[ "$2" ] && echo 3.99\n')
    other.chmod(0o755)
    venv = sandbox.clone / ".venv"

    def assert_installs(**settings: str) -> None:
        assert "installing" in sandbox.run(*INSTALL, UV=uv, **settings).stdout

    assert_installs()
    (venv / "bin/python").unlink()
    assert_installs()
    (venv / "complete").write_text("3.11")
    assert_installs()
    requirements.write_text("./not-there")
    assert_installs()
    requirements.write_text("")
    assert_installs()
    assert_installs(PY=str(other))
    assert_installs()
    assert sandbox.run(*INSTALL, UV=uv).stdout == ""
    assert "no Python 3.12 or newer" in sandbox.run(*INSTALL, UV=uv, PY="not-there").stderr


def test_life_of_what_run_starts(sandbox: Sandbox) -> None:
    """It is started once, holds nothing of what started it, and is ended by clean."""
    environment = {"TOKEN_SECONDS": "60", "AWS_SECRET": "x", "ALL_PROXY": "socks5://localhost:1"}
    elsewhere = sandbox.folder / "elsewhere"
    (elsewhere / "tests/harness").mkdir(parents=True)
    environment |= {"SSL_CERT_FILE": "/nowhere", "CDPATH": str(elsewhere)}
    inheriting = ["bash", "-c", "make run 3>&1 9>&2"]  # it ends when these pipes do
    printed = sandbox.run(*inheriting, **environment).stdout
    running = f"tier 01 is running: {sandbox.issuer} (a stand-in) and {sandbox.mcp_url}\n"
    reason = "no Docker Engine with Compose v2 is running"
    assert printed == f"starting a stand-in for tier 01 as a process: {reason}\n{running}"
    private = [sandbox.clone / name for name in (".env", ".started/log", ".started/pid")]
    assert [path.stat().st_mode & 0o077 for path in private] == [0, 0, 0]
    [server] = sandbox.processes()
    names = server.environ().keys()
    assert names & environment.keys() == {"TOKEN_SECONDS"}
    assert names >= {"AUTHPLANE_ADMIN_API_KEY", "NO_PROXY"}
    assert os.getpgid(server.pid) == server.pid  # so that Ctrl-C in the terminal does not reach it
    server.send_signal(signal.SIGHUP)
    assert sandbox.make("run").stdout == running
    assert sandbox.processes() == [server]
    server.kill()
    assert sandbox.make("run").stdout.endswith(running)
    assert "MCP server demo-server" in sandbox.make("logs", TIER01_RUNTIME="podman").stdout
    [server] = sandbox.processes()
    server.suspend()
    for _ in range(2):
        assert sandbox.make("clean", AUTHSERVER_URL="x", TIER01_RUNTIME="podman").returncode == 0
        assert sandbox.left() == []
        made = (".env", ".venv", "tests/.venv")
        assert not any((sandbox.clone / name).exists() for name in made)
    assert "make run has started nothing from this folder" in sandbox.make("logs").stderr


def test_clean_fails_if_the_server_does_not_end(sandbox: Sandbox) -> None:
    """As if the system did not end it: `kill` does nothing."""
    sandbox.make("run")
    [server] = sandbox.processes()
    failed = sandbox.make("clean", **{"BASH_FUNC_kill%%": "() { :; }"})
    assert failed.returncode == 2
    assert f"process {server.pid} does not end" in failed.stderr
    assert sandbox.make("clean").returncode == 0
    assert sandbox.left() == []


def test_clean_ends_no_other_program_of_that_number(sandbox: Sandbox) -> None:
    other = sandbox.start("sleep", "60")
    (sandbox.clone / ".started").mkdir()
    (sandbox.clone / ".started/pid").write_text(str(other.pid))
    (sandbox.clone / ".started/log").touch()
    assert sandbox.make("clean").returncode == 0
    assert other.poll() is None
    assert not (sandbox.clone / ".started").exists()


def test_many_runs_at_once(sandbox: Sandbox) -> None:
    """One starts the servers, and the others say what to do; a lock that was left, too."""
    runs = [sandbox.start("make", "run") for _ in range(12)]
    message: list[str] = []
    for run in runs:
        _, errors = run.communicate(timeout=60)
        message += [errors] if run.returncode else []
    assert 1 <= len(message) < 12
    assert all("is running in this folder: wait for its end" in each for each in message)
    assert len(sandbox.processes()) == 1
    (sandbox.clone / ".started.lock").symlink_to("123456789")  # of a process that was killed
    assert "if it was killed, make clean" in sandbox.make("run").stderr
    assert sandbox.make("clean").returncode == 0
    assert sandbox.left() == []


@pytest.mark.parametrize("waited_for", [".started.lock", ".started/pid"])
def test_interrupted_run_leaves_nothing(sandbox: Sandbox, waited_for: str) -> None:
    run = sandbox.start("make", "run")
    path = sandbox.clone / waited_for
    wait_until(lambda: path.is_symlink() or path.exists(), "the start of tier 01")
    os.killpg(run.pid, signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode != 0
    wait_until(lambda: not sandbox.left(), "the end of what was started", 10)


def test_leaves_what_it_has_not_made(served: Sandbox) -> None:
    """That is a tier 01 that is already running, all of it, and an edited .env."""
    message = "http://localhost:1/mcp is no protected MCP server (expected 401, got no response)"
    assert_fails(served, message, MCP_URL="http://localhost:1/mcp")
    (served.clone / ".env").write_text("CLIENT_ID=mine\n")
    message = f"tier 01 is running: {served.issuer} and {served.mcp_url}\n"
    assert served.make("run").stdout == message
    assert served.make("clean").returncode == 0
    assert status_of("POST", served.mcp_url) == 401
    assert (served.clone / ".env").read_text() == "CLIENT_ID=mine\n"
