"""The Makefile on a machine without Docker: what it starts, makes, says and leaves alone."""

import os
import re
import signal

import pytest

from conftest import NewMachine, StartFake
from fakes import http
from machine import Machine, status_of, wait_until


def fails(machine: Machine, told: str, **settings: str) -> str:
    """Check that `make run` fails, leaves nothing, and tells that in its last line; return all."""
    result = machine.make("run", **settings)
    *_, last = [line for line in result.stderr.splitlines() if ": *** " not in line]
    assert (result.returncode, machine.left()) == (2, [])
    assert told in last
    assert "Traceback" not in result.stderr
    return result.stderr


FAILS = {
    "TIER01=podman: it can be native or docker": {"TIER01": "podman"},
    "no Docker Engine with Compose v2 is running": {"TIER01": "docker"},
    "no authorization server at https://auth.invalid": {"ISSUER_URL": "https://auth.invalid"},
    "set MCP_URL to the same path": {"RESOURCE_URI": "http://localhost/api"},
    "no Python 3.12 or newer": {"PY": "not-there python3", "PYTHONPATH": "old"},
    "on Debian and Ubuntu python3.": {"PYTHONPATH": "without-venv"},
}
PYTHONS = {"old": "sys.version_info = (3, 11)", "without-venv": "sys.modules['ensurepip'] = None"}


@pytest.mark.parametrize(("told", "settings"), FAILS.items(), ids=FAILS.keys())
def test_says_what_to_do(new_machine: NewMachine, told: str, settings: dict[str, str]) -> None:
    machine = new_machine(prepared=False)
    for folder, code in PYTHONS.items():
        (machine.clone / folder).mkdir()
        (machine.clone / folder / "sitecustomize.py").write_text(f"import sys; {code}")
    fails(machine, told, **settings)


def test_shows_the_log_of_a_server_that_did_not_start(machine: Machine) -> None:
    told = "tier 01 did not start: its log ends above"
    shown = fails(machine, told, ADMIN_URL=machine.issuer)
    assert f"serve.py: can't listen on :{machine.ports[0]}: Address already in use\n" in shown


def test_suggests_ports_that_are_free(fake: StartFake, machine: Machine) -> None:
    """The suggested command works as it stands, also for a resource with another path."""
    issuer, mcp = (fake(lambda _: http("404 Not Found")).url for _ in range(2))
    settings = {"ISSUER_URL": issuer, "MCP_URL": f"{mcp}/api", "RESOURCE_URI": f"{mcp}/api"}
    ports = f"{issuer.split(':')[2]} {mcp.split(':')[2]}"
    shown = fails(machine, f"another program is listening on port {ports}; ", **settings)
    [command] = re.findall(r", or: (ISSUER_URL=\S+ MCP_URL=\S+ make verify)\n", shown)
    result = machine.run("bash", "-c", command, **settings)
    assert result.stdout.endswith("ALL CHECKS PASSED\n"), result


@pytest.mark.parametrize("arguments", [[], ["UV="]], ids=["uv", "pip"])
def test_installs_the_pinned_packages(new_machine: NewMachine, arguments: list[str]) -> None:
    machine = new_machine("uv", prepared=False)
    half = machine.clone / ".venv/lib/python3/site-packages/half-1.dist-info"
    half.mkdir(parents=True)  # left by an interrupted run
    requirements = machine.clone / "tests/requirements/agent.txt"
    if arguments:  # pip is slow: two packages show that it is used as it should be
        chosen = re.findall(r"(?ms)^(?:h11|idna)==.*?[^\\]$", requirements.read_text())
        requirements.write_text("\n".join(chosen))
    result = machine.make(".venv/ready", *arguments)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "installing tests/requirements/agent.txt into .venv\n"
    found = machine.clone.glob(".venv/lib/*/site-packages/*.dist-info")
    installed = {path.name.split("-")[0].replace("_", "-").lower() for path in found}
    pinned = set(re.findall(r"(?m)^([\w.-]+)==", requirements.read_text().lower()))
    assert {"h11", "idna"} <= installed - {"pip"} <= pinned
    assert ("pip" in installed) == bool(arguments)
    assert machine.make("-q", ".venv/ready").returncode == 0


def test_life_of_what_run_starts(machine: Machine) -> None:
    """Two runs at once start one tier 01, a third finds it, and clean ends it."""
    runs = [machine.start("make", "run") for _ in range(2)]
    printed = "".join(sorted(run.communicate(timeout=60)[0] for run in runs))
    running = f"tier 01: {machine.issuer} and {machine.mcp_url}, started by make run\n"
    waiting = r"waiting for process \d+, which starts or stops tier 01 in this folder\n"
    assert re.fullmatch(f"{running}{waiting}{running}", printed), printed
    made = [machine.clone / name for name in (".env", ".tier01/log", ".tier01/pid")]
    assert [path.stat().st_mode & 0o077 for path in made] == [0, 0, 0]
    [server] = machine.processes()
    assert os.getpgid(server.pid) == server.pid  # so the terminal's Ctrl-C does not reach it
    assert machine.make("run").stdout == running
    assert machine.processes() == [server]
    assert "MCP server demo-server" in machine.make("logs").stdout
    for _ in range(2):
        assert machine.make("clean").returncode == 0
        assert machine.left() == []
        assert not any((machine.clone / name).exists() for name in (".env", ".venv", "tests/.venv"))
    assert "make run has started nothing from this folder" in machine.make("logs").stderr


def test_interrupted_run_leaves_nothing(machine: Machine) -> None:
    (machine.clone / ".tier01.lock").symlink_to("123456789")  # of a process that was killed
    run = machine.start("make", "run")
    wait_until((machine.clone / ".tier01/pid").exists, "the start of tier 01")
    os.killpg(run.pid, signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode != 0
    wait_until(lambda: not machine.left(), "the end of what was started")


def test_leaves_what_it_has_not_made(beside: Machine) -> None:
    """That is a tier 01 that is already running, all of it, and an edited .env."""
    told = "the response of http://localhost:1/mcp is missing instead of 401"
    fails(beside, told, MCP_URL="http://localhost:1/mcp")
    (beside.clone / ".env").write_text("CLIENT_ID=mine\n")
    assert beside.make("run").stdout.endswith(", already running\n")
    assert beside.make("clean").returncode == 0
    assert status_of("POST", beside.mcp_url) == 401
    assert (beside.clone / ".env").read_text() == "CLIENT_ID=mine\n"
