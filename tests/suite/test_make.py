"""The Makefile on a machine without Docker: what it starts, makes, says and leaves alone."""

import os
import re
import signal
from pathlib import Path

import pytest

from conftest import NewMachine, StartFake
from fakes import http
from machine import Machine, status_of, wait_until


def running(machine: Machine) -> str:
    """Return the last line of `make run` when it has started the tier 01 at the machine's ports."""
    return f"tier 01: {machine.issuer} and {machine.mcp_url}, started by make run"


def fails(machine: Machine, told: str, *arguments: str, **settings: str) -> str:
    """Run make; check that it fails with one line of its own that contains what is told."""
    result = machine.make(*(arguments or ["run"]), **settings)
    assert result.returncode == 2
    own = [line for line in result.stderr.splitlines() if ": *** " not in line]
    assert [line for line in own if told in line] == own[-1:], result.stderr
    assert "Traceback" not in result.stderr
    assert machine.left() == []
    return own[-1]


def packages(machine: Machine) -> set[str]:
    """Return the packages in the agent's virtual environment."""
    code = "from importlib.metadata import *; print(*(each.name for each in distributions()))"
    return set(machine.run(".venv/bin/python", "-c", code).stdout.lower().replace("_", "-").split())


@pytest.mark.parametrize("tools", [[], ["uv"]], ids=["pip", "uv"])
def test_installs_the_pinned_packages(new_machine: NewMachine, tools: list[str]) -> None:
    machine = new_machine(*tools, prepared=False)
    (machine.clone / ".venv/bin").mkdir(parents=True)  # left by an interrupted run
    (machine.clone / ".venv/bin/pip").touch()
    requirements = machine.clone / "tests/requirements/agent.txt"
    if not tools:  # pip is slow: two packages show that it is used as it should be
        chosen = re.findall(r"(?ms)^(?:h11|idna)==.*?[^\\]$", requirements.read_text())
        requirements.write_text("\n".join(chosen))
    result = machine.make(".venv/ready")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "installing tests/requirements/agent.txt into .venv\n"
    pinned = re.findall(r"(?m)^([\w.-]+)==", requirements.read_text())
    installed = packages(machine) - {"pip"}
    assert {"h11", "idna"} <= installed <= {name.lower() for name in pinned}
    assert machine.make("-q", ".venv/ready").returncode == 0


def test_life_of_what_run_starts(machine: Machine) -> None:
    first = machine.make("run")
    assert (first.stdout, first.stderr) == (running(machine) + "\n", "")
    made = [machine.clone / name for name in (".env", ".tier01/log", ".tier01/pid")]
    assert [path.stat().st_mode & 0o077 for path in made] == [0, 0, 0]
    [server] = machine.processes()
    assert os.getpgid(server.pid) == server.pid  # so the terminal's Ctrl-C does not reach it
    assert machine.make("run").stdout == first.stdout
    assert machine.processes() == [server]
    assert "MCP server demo-server" in machine.make("logs").stdout
    for _ in range(2):
        assert machine.make("clean").returncode == 0
        assert machine.left() == []
        assert not {path.name for path in machine.clone.iterdir()} & {".env", ".venv"}
        assert not (machine.clone / "tests/.venv").exists()
    fails(machine, "make run has started nothing", "logs")


def test_deleting_the_folder_ends_it_too(machine: Machine) -> None:
    machine.make("run")
    machine.run("rm", "-r", ".tier01")
    wait_until(lambda: not machine.left(), "the end of the stand-in")


def test_two_runs_at_once(machine: Machine) -> None:
    runs = [machine.start("make", "verify") for _ in range(2)]
    outputs = [run.communicate(timeout=60) for run in runs]
    assert [run.returncode for run in runs] == [0, 0], outputs
    assert all("ALL CHECKS PASSED\n" in output for output, _ in outputs)
    assert sum("waiting for process" in output for output, _ in outputs) == 1
    assert len(machine.processes()) == 1


def test_edited_dotenv_stays(beside: Machine) -> None:
    (beside.clone / ".env").write_text("CLIENT_ID=mine\n")
    assert beside.make("verify").returncode == 0
    assert beside.make("clean").returncode == 0
    assert (beside.clone / ".env").read_text() == "CLIENT_ID=mine\n"


def test_uses_and_leaves_what_is_already_running(beside: Machine) -> None:
    assert beside.make("run").stdout.endswith(", already running\n")
    assert beside.make("clean").returncode == 0
    assert status_of("POST", beside.mcp_url) == 401


@pytest.mark.parametrize("names", [["MCP_URL"], ["ISSUER_URL", "ADMIN_URL"]])
def test_says_which_command_works_when_ports_are_taken(
    fake: StartFake, machine: Machine, names: list[str]
) -> None:
    other = {name: fake(lambda _: http("404 Not Found")).url for name in names}
    settings = {name: url + "/mcp" * (name == "MCP_URL") for name, url in other.items()}
    line = fails(machine, "another program is listening on that port", **settings)
    command = line.split("use another one: ")[1]
    assert command.endswith(" make verify")
    result = machine.run("bash", "-c", command, **settings)
    assert result.stdout.endswith("ALL CHECKS PASSED\n"), result


def test_audience_with_another_path(machine: Machine) -> None:
    api = machine.mcp_url.replace("/mcp", "/api")
    fails(machine, "set MCP_URL to the same path", RESOURCE_URI=api)
    result = machine.make("verify", RESOURCE_URI=api, MCP_URL=api)
    assert result.stdout.endswith("ALL CHECKS PASSED\n"), result


def test_starts_nothing_elsewhere(machine: Machine) -> None:
    told = "no authorization server at https://auth.invalid"
    fails(machine, told, ISSUER_URL="https://auth.invalid")


def test_half_of_a_tier01_is_not_enough(beside: Machine) -> None:
    told = "the response of http://localhost:1/mcp is missing instead of 401"
    fails(beside, told, MCP_URL="http://localhost:1/mcp")


@pytest.mark.parametrize("python", ["false", "not-there"])
def test_too_old_python(new_machine: NewMachine, python: str) -> None:
    fails(new_machine(prepared=False), "no Python 3.12 or newer", "run", f"PY={python}")


def test_python_without_venv(new_machine: NewMachine) -> None:
    machine = new_machine(prepared=False)
    (machine.folder / "sitecustomize.py").write_text("import sys; sys.modules['ensurepip'] = None")
    fails(machine, "on Debian and Ubuntu python3.", PYTHONPATH=str(machine.folder))


def test_interrupted_run_leaves_nothing(machine: Machine) -> None:
    run = machine.start("make", "run")
    wait_until((machine.clone / ".tier01/pid").exists, "the start of tier 01")
    os.killpg(run.pid, signal.SIGINT)
    run.communicate(timeout=20)
    assert run.returncode != 0
    wait_until(lambda: not machine.left(), "the end of what was started")


def test_help_names_every_target(machine: Machine) -> None:
    printed = machine.make().stdout
    [phony] = re.findall(r"(?m)^\.PHONY: (.*)$", Path(machine.clone / "Makefile").read_text())
    assert re.findall(r"(?m)^make (\S+) +\S", printed) == phony.split()
    assert all(len(line) <= 80 for line in printed.splitlines())


def test_settings_outside_the_choice(machine: Machine) -> None:
    fails(machine, "TIER01=podman: it can be native or docker", TIER01="podman")
    fails(machine, "no Docker Engine with Compose v2 is running", TIER01="docker")
