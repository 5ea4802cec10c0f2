"""Agent and tier 01 in containers: with the stand-in, and with the authserver if it is there."""

import json
import re
import signal
from collections.abc import Iterator

import pytest

from conftest import NewMachine
from machine import ADMIN_KEY, Machine, wait_until
from test_verify import CHECKS, interrupt, masked

pytestmark = pytest.mark.usefixtures("engine")


@pytest.fixture(scope="module")
def containers(stand_in: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which tier 01 is running in containers, and the agent's image is built."""
    machine = Machine(tmp_path_factory.mktemp("containers"), "docker", image=stand_in)
    try:
        assert machine.make("run").returncode == 0
        yield machine
    finally:
        machine.close()


def test_starts_tier01_in_containers(new_machine: NewMachine, authserver_image: str) -> None:
    machine = new_machine("docker", image=authserver_image)
    starting = "starting tier 01 in containers; the image of the MCP server is built first\n"
    running = f"tier 01: {machine.issuer} and {machine.mcp_url}, started by make run\n"
    prepared = f"building the agent's image\n{running}"
    first = machine.make("run")
    assert (first.stdout, first.stderr, first.returncode) == (starting + prepared, "", 0)
    before = machine.docker_objects()
    assert len(before["rm"]) == 2
    reason = "the issuer http://authserver:9000 is not reachable from this host"
    there = f"in network {machine.network}: {reason}"
    checks = CHECKS.replace("on this host: the issuer is http://localhost:PORT", there)
    for status in ("201 demo-mcp", "200 demo-mcp"):
        result = machine.make("verify")
        assert (result.stderr, result.returncode) == ("", 0)
        expected = masked(prepared) + checks.replace("200 demo-mcp", status)
        older = expected.replace("invalid_target", "invalid_scope")  # 0.2.1 and before
        assert masked(result.stdout) in (expected, older)
    assert machine.docker_objects() == before
    assert machine.clients() == []
    logs = machine.make("logs").stdout
    assert "MCP server demo-server" in logs
    assert "\x1b" not in logs
    assert machine.make("clean").returncode == 0
    assert machine.left() == []
    assert machine.docker("image", "inspect", "--format", "here", authserver_image) == "here"


def test_starts_the_stand_in_if_the_image_cannot_be_pulled(new_machine: NewMachine) -> None:
    machine = new_machine("docker")
    failed = machine.make("run", TIER01="docker")
    assert failed.returncode == 2
    told = rf"tier01\.sh: TIER01=docker, but {machine.image} can't be pulled\nmake: [^\n]+\n"
    assert re.fullmatch(told, failed.stderr)
    assert machine.left() == []
    assert machine.make("run").stdout.splitlines() == [
        f"pulling {machine.image}",
        f"{machine.image} can't be pulled: starting the stand-in for tier 01 as a process instead",
        f"tier 01: {machine.issuer} and {machine.mcp_url}, started by make run",
    ]
    assert machine.make("clean").returncode == 0
    assert machine.left() == []


def test_native_is_obeyed(new_machine: NewMachine, stand_in: str) -> None:
    machine = new_machine("docker", image=stand_in)
    assert machine.make("run", TIER01="native").returncode == 0
    assert machine.docker_objects()["rm"] == []


def test_uses_a_native_tier01(new_machine: NewMachine, tier01: Machine) -> None:
    """If Docker is running, too: the issuer decides where the agent runs."""
    result = new_machine("docker", ports=tier01.ports).make("verify")
    assert masked(result.stdout).endswith(CHECKS)


def test_leaves_running_containers(containers: Machine, new_machine: NewMachine) -> None:
    before = containers.docker_objects()
    guest = new_machine("docker", ports=containers.ports)
    guest.network = containers.network
    result = guest.make("verify")
    assert ", already running\n" in result.stdout
    assert result.stdout.endswith("ALL CHECKS PASSED\n")
    assert guest.make("clean").returncode == 0
    assert containers.docker_objects() == before
    assert guest.left() == []


def test_leaves_a_stopped_tier01(new_machine: NewMachine, stand_in: str) -> None:
    """It does not respond, but is not ours: neither started nor removed, nor is its data."""
    machine = new_machine("docker", image=stand_in)
    project = machine.network.removesuffix("_default")
    machine.docker("volume", "create", f"{project}_data")
    result = machine.make("run")
    assert result.returncode == 2
    assert f"the tier 01 in project {project} does not respond" in result.stderr
    assert machine.make("clean").returncode == 0
    assert machine.docker_objects()["volume rm"] == [f"{project}_data"]


def test_says_that_compose_cannot_parse_dotenv(containers: Machine) -> None:
    kept = (containers.clone / ".env").read_text()
    (containers.clone / ".env").write_text(f"{kept}B C\n")
    results = containers.verify(), containers.make("run")
    (containers.clone / ".env").write_text(kept)
    for result in results:
        assert result.returncode in (1, 2)
        assert "docker compose can't parse .env or docker-compose.yml: " in result.stderr


FAILS = {
    "DOCKER_HOST=unix:///nowhere": "http://authserver:9000 is not reachable from this host)",
    "TIER01_NETWORK=not-there": "there is no Docker network not-there",
    "COMPOSE_PROJECT_NAME=not-built": "image is missing: make run builds it",
    "NETWORK_MCP_URL=http://not-there:8080/mcp": "initialize at http://not-there:8080/mcp",
}


@pytest.mark.parametrize(("setting", "told"), FAILS.items(), ids=FAILS)
def test_verify_says_what_to_do(containers: Machine, setting: str, told: str) -> None:
    before = containers.clients()
    name, value = setting.split("=")
    result = containers.verify(**{name: value})
    assert result.returncode == 1
    assert re.fullmatch(r"verify\.sh: [^\n]+\n", result.stderr), result.stderr
    assert told in result.stderr
    assert containers.clients() == before


def test_interrupt_leaves_no_container_and_no_client(containers: Machine) -> None:
    before = containers.clients()
    run = containers.start("./verify.sh")
    agent = ["--quiet", "--filter", f"name=02-agent-{run.pid}-"]
    wait_until(lambda: containers.docker("ps", *agent), "the agent's container")
    interrupt(run, signal.SIGTERM)
    output, errors = run.communicate(timeout=30)
    assert (run.returncode, errors) == (128 + signal.SIGTERM, "")
    assert "ALL CHECKS PASSED" not in output
    assert containers.docker("ps", "--all", *agent) == ""
    assert containers.clients() == before


def test_secrets_stay_out_of_other_containers_and_the_image(containers: Machine) -> None:
    assert ADMIN_KEY in (containers.clone / ".env").read_text()
    authserver = containers.docker("inspect", f"{containers.name}-tier01-authserver-1")
    mcp_server = containers.docker("inspect", f"{containers.name}-tier01-mcp-server-1")
    assert ADMIN_KEY in authserver
    assert ADMIN_KEY not in mcp_server
    assert "CLIENT_SECRET" not in authserver + mcp_server
    saved = containers.folder / "image.tar"  # all layers and their history, not compressed
    containers.docker("save", "--output", str(saved), f"{containers.name}-agent")
    content = saved.read_bytes()
    assert b"authenticated MCP initialize OK" in content
    assert ADMIN_KEY.encode() not in content


def test_image_has_only_what_the_agent_needs(containers: Machine) -> None:
    image = f"{containers.name}-agent"
    sizes = containers.docker("inspect", "--format", "{{.Size}}", image, "python:3.12-slim")
    size, base = map(int, sizes.split())
    assert size - base <= 30_000_000
    listing = (
        "import os, importlib.metadata as m; from pathlib import Path;"
        "print(os.getuid(), *sorted(d.name.lower() for d in m.distributions()));"
        "print(*sorted(p.name for p in Path('/app').iterdir()));"
        "print(len(list(Path('/app/.venv').rglob('authplane/__pycache__/*.pyc'))))"
    )
    options = ["--rm", "--read-only", "--entrypoint", ".venv/bin/python", image, "-c", listing]
    printed = containers.docker("run", *options).splitlines()
    [uid, *packages], files, [compiled] = map(str.split, printed)
    assert uid == "65532"
    assert {"authplane-sdk", "httpx"} <= set(packages)
    assert not {"pip", "setuptools", "uv", "fastmcp", "pytest"} & set(packages)
    assert files == [".venv", "agent.py"]
    assert int(compiled) > 5


def test_changed_agent_keeps_the_dependencies(containers: Machine, new_machine: NewMachine) -> None:
    machine = new_machine("docker")
    with (machine.clone / "agent.py").open("a") as agent:
        agent.write("# changed\n")
    changed = f"{machine.name}-changed"
    machine.docker("build", "--quiet", "--tag", changed, ".")
    names = ["--format", "{{json .RootFS.Layers}}", f"{containers.name}-agent", changed]
    before, after = map(json.loads, machine.docker("inspect", *names).splitlines())
    assert before[:-1] == after[:-1]
    assert before[-1] != after[-1]


def test_agent_can_do_little_and_gets_no_secret_of_the_authserver(new_machine: NewMachine) -> None:
    machine = new_machine("docker")
    names = ("MCP_SERVER_NAME", "AUTHPLANE_ADMIN_API_KEY", "AUTHPLANE_SESSION_SECRET")
    (machine.clone / ".env").write_text("".join(f"{name}=x\n" for name in names))
    config = ["compose", "--profile", "manual", "config", "--format", "json"]
    [agent] = json.loads(machine.docker(*config))["services"].values()
    expected = {"profiles": ["manual"], "restart": "no", "read_only": True, "cap_drop": ["ALL"]}
    assert agent.items() >= expected.items()
    assert agent["security_opt"] == ["no-new-privileges:true"]
    assert agent["environment"] == dict(zip(names, ("x", "", ""), strict=True))
    assert "ports" not in agent


def test_tier01_is_published_on_loopback_only(containers: Machine) -> None:
    named = ["--filter", f"name={containers.name}", "--format", "{{.Ports}}"]
    addresses = re.findall(r"(\S+):\d+->", containers.docker("ps", *named))
    assert addresses == ["127.0.0.1"] * 3
