"""The Makefile, in clean clones: what it makes, what it says, and what it leaves alone."""

import os
import re
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import (
    ROOT,
    StartFake,
    Tier01,
    http,
    make,
    plain_environment,
    settings_for_free_ports,
    status_of,
    wait_until,
)


@pytest.fixture
def ports() -> dict[str, str]:
    """Settings for a tier 01 where none is, on a machine without Docker."""
    return settings_for_free_ports() | {"DOCKER_HOST": "unix:///nowhere"}


@pytest.fixture(autouse=True)
def ended(checkout: Path, ports: dict[str, str]) -> Iterator[None]:
    """What a test started ends with it."""
    yield
    make(checkout, ports, "clean")


def test_pip_prepares_what_uv_prepares(
    checkout: Path, prepared: Path, ports: dict[str, str]
) -> None:
    """The README's test runs all of `make verify` with uv; here pip makes the agent's part."""
    (checkout / ".venv").unlink()
    (checkout / ".venv/bin").mkdir(parents=True)  # what an interrupted run has left
    (checkout / ".venv/bin/pip").touch()
    result = make(prepared, ports, "verify", "UV=")
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"tier 01: {ports['ISSUER_URL']} and {ports['MCP_URL']}")
    assert result.stdout.endswith("ALL CHECKS PASSED\n")
    command = (
        "from importlib.metadata import distributions as d; print(*(each.name for each in d()))"
    )
    python = [checkout / ".venv/bin/python", "-c", command]
    packages = subprocess.run(python, capture_output=True, text=True).stdout.lower().split()
    assert {"authplane-sdk", "httpx", "pip"} <= set(packages)
    assert "fastmcp" not in packages


def test_life_of_what_run_starts(prepared: Path, ports: dict[str, str]) -> None:
    """One start for all: a second run, what it is like, and its end."""
    first = make(prepared, ports, "run")
    assert first.stdout.splitlines() == [
        f"tier 01: {ports['ISSUER_URL']} and {ports['MCP_URL']}, started by make run",
        f"agent: on this host, since the issuer is {ports['ISSUER_URL']}",
    ]
    made = [prepared / ".env", *(prepared / ".tier01").iterdir()]
    assert {path.name for path in made[1:]} == {
        f"{name}.{kind}" for name in ("authserver", "mcp-server") for kind in ("pid", "log")
    }
    assert [path.stat().st_mode & 0o077 for path in made] == [0] * 5

    pids = {path: path.read_text() for path in made if path.suffix == ".pid"}
    assert make(prepared, ports, "run").stdout == first.stdout
    assert {path: path.read_text() for path in pids} == pids
    for pid in map(int, pids.values()):
        assert os.getpgid(pid) == pid  # so the terminal's Ctrl-C does not reach it

    log = make(prepared, ports, "logs").stdout
    assert "stand-in for the Authplane authserver" in log
    assert "MCP server demo-server" in log
    running = make(prepared, ports, "status").stdout
    assert "authserver: started by make run\nmcp-server: started by make run\n" in running
    assert f"{ports['MCP_URL']}: 401\n" in running

    for _ in range(2):
        assert make(prepared, ports, "clean").returncode == 0
        assert status_of("GET", ports["ISSUER_URL"]) == status_of("GET", ports["MCP_URL"]) == 0
        assert not {path.name for path in prepared.iterdir()} & {".env", ".venv", ".tier01"}
        assert not (prepared / "tests/.venv").exists()

    ended = make(prepared, ports, "status").stdout
    assert "authserver: not started by make run\n" in ended
    assert f"{ports['ISSUER_URL']}: no answer\n" in ended
    logs = make(prepared, ports, "logs")
    assert (logs.returncode, logs.stdout) == (2, "")
    assert "nothing that is still there" in logs.stderr


def test_an_edited_dotenv_stays(prepared: Path, tier01: Tier01) -> None:
    (prepared / ".env").write_text("CLIENT_ID=mine\n")
    assert make(prepared, tier01.settings, "verify").returncode == 0
    assert make(prepared, tier01.settings, "clean").returncode == 0
    assert (prepared / ".env").read_text() == "CLIENT_ID=mine\n"


def test_a_copied_dotenv_works(prepared: Path, tier01: Tier01) -> None:
    example = (prepared / ".env.example").read_text()
    for name, value in tier01.settings.items():
        example = re.sub(f"(?m)^{name}=.*", f"{name}={value}", example)
    (prepared / ".env").write_text(example)
    assert make(prepared, {}, "run").returncode == 0
    assert make(prepared, {}, "verify").stdout.endswith("ALL CHECKS PASSED\n")


def test_uses_and_leaves_a_tier01_of_somebody_else(prepared: Path, tier01: Tier01) -> None:
    assert "started by someone else" in make(prepared, tier01.settings, "run").stdout
    assert not (prepared / ".tier01").exists()
    make(prepared, tier01.settings, "clean")
    assert status_of("POST", tier01.mcp_url) == 401


@pytest.mark.parametrize("taken", ["ISSUER_URL", "ADMIN_URL", "MCP_URL"])
def test_names_a_port_that_is_taken(
    fake: StartFake, prepared: Path, ports: dict[str, str], taken: str
) -> None:
    ports[taken] = fake(lambda _: http("404 Not Found")).url + "/mcp"[: 4 * (taken == "MCP_URL")]
    [port] = re.findall(r":(\d+)", ports[taken])
    result = make(prepared, ports, "run")
    assert result.returncode == 2
    assert f"can't listen on :{port}: Address already in use" in result.stderr
    assert "its log ends above" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (prepared / ".tier01").exists()
    for name in {"ISSUER_URL", "ADMIN_URL", "MCP_URL"} - {taken}:
        assert status_of("GET", ports[name]) == 0


def test_says_that_half_of_a_tier01_is_not_enough(prepared: Path, tier01: Tier01) -> None:
    result = make(prepared, tier01.settings | {"MCP_URL": "http://localhost:1/mcp"}, "run")
    assert result.returncode == 2
    assert "http://localhost:1/mcp answers nothing instead of 401" in result.stderr


def test_does_without_a_too_old_python(checkout: Path, tmp_path: Path) -> None:
    old = tmp_path / "python3.11"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = make(checkout, {}, "run", f"PY={old}")
    assert result.returncode == 2
    assert "no Python 3.12 or newer" in result.stderr
    assert not (checkout / ".venv").exists()


def test_interrupted_run_leaves_nothing(prepared: Path, ports: dict[str, str]) -> None:
    with subprocess.Popen(
        ["make", "run"],
        cwd=prepared,
        env=plain_environment(**ports),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    ) as run:
        wait_until((prepared / ".tier01/mcp-server.pid").exists, "the start of the MCP server")
        os.killpg(run.pid, signal.SIGINT)
        run.communicate(timeout=20)
    wait_until(lambda: not (prepared / ".tier01").exists(), "the removal of .tier01")
    assert status_of("GET", ports["ISSUER_URL"]) == 0
    assert status_of("GET", ports["MCP_URL"]) == 0


def test_help_names_every_target() -> None:
    printed = make(ROOT, {}).stdout
    [phony] = re.findall(r"(?m)^\.PHONY: (.*)$", (ROOT / "Makefile").read_text())
    assert re.findall(r"(?m)^make (\S+) +\S", printed) == phony.split()
    assert len(printed.splitlines()) < 24
    assert all(len(line) <= 80 for line in printed.splitlines())
