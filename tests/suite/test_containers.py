"""Agent and tier 01 in containers: with the stand-in, and with the authserver if it is there."""

import json
import re
import signal
import tarfile
import time
from collections.abc import Iterator

import pytest

from conftest import NewMachine
from machine import ADMIN_KEY, Machine, wait_until
from test_verify import CHECKS, interrupt, masked

pytestmark = pytest.mark.usefixtures("engine")
NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere"}


@pytest.fixture(scope="module")
def others(stand_in: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which tier 01 is running in containers."""
    machine = Machine(tmp_path_factory.mktemp("others"), "docker", image=stand_in)
    try:
        assert machine.make("run").returncode == 0
        yield machine
    finally:
        machine.close()


@pytest.fixture
def guest(others: Machine, new_machine: NewMachine) -> Machine:
    """Another clone beside that tier 01, in which the agent's image is built."""
    guest = new_machine("docker", ports=others.ports)
    guest.network = others.network
    assert guest.make("run").stdout.endswith(", already running\n")
    return guest


def checks(machine: Machine, status: int) -> str:
    """Return what verify.sh prints for a tier 01 in the containers of the machine."""
    there = f"in network {machine.network}: the issuer http://authserver:9000 is not reachable from"
    here = "on this host: the issuer is http://localhost:PORT"
    return CHECKS.replace(here, f"{there} this host").replace("200 demo", f"{status} demo")


def test_starts_tier01_in_containers(new_machine: NewMachine, authserver_image: str) -> None:
    machine = new_machine("docker", image=authserver_image)
    first = machine.make("run")
    running = f"tier 01: {machine.issuer} and {machine.mcp_url}, started by make run\n"
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == (
        "starting tier 01 in containers; the image of the MCP server is built first\n"
        f"building the agent's image\n{running}"
    )
    before = machine.docker_objects()
    assert len(before["rm"]) == 2
    for status in (201, 200):
        result = machine.make("verify")
        printed = f"building the agent's image\n{running}"
        assert result.stdout.startswith(printed)
        assert masked(result.stdout.removeprefix(printed)) in (
            checks(machine, status),
            checks(machine, status).replace("invalid_target", "invalid_scope"),  # 0.2.1 and older
        )
        assert (result.returncode, result.stderr) == (0, "")
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
    result = machine.make("verify")
    assert result.stdout.splitlines()[:2] == [
        f"pulling {machine.image}",
        f"{machine.image} can't be pulled: starting the stand-in for tier 01 as a process instead",
    ]
    assert masked(result.stdout).endswith(CHECKS.replace("200 demo", "201 demo"))
    assert machine.make("clean").returncode == 0
    assert machine.left() == []


def test_native_is_obeyed(new_machine: NewMachine, stand_in: str) -> None:
    machine = new_machine("docker", image=stand_in)
    assert machine.make("run", TIER01="native").returncode == 0
    assert "the agent runs on this host: TIER01=native" in machine.verify(TIER01="native").stdout
    assert machine.docker_objects()["rm"] == []


def test_uses_and_leaves_containers_that_are_already_running(
    guest: Machine, others: Machine
) -> None:
    before = others.docker_objects()
    result = guest.make("verify")
    assert ", already running\n" in result.stdout
    assert result.stdout.endswith("ALL CHECKS PASSED\n")
    assert guest.make("clean").returncode == 0
    assert others.docker_objects() == before
    assert guest.left() == []


def test_uses_a_native_tier01(new_machine: NewMachine, tier01: Machine) -> None:
    """If Docker is running, too: the issuer decides where the agent runs."""
    result = new_machine("docker", ports=tier01.ports).make("verify")
    assert masked(result.stdout).endswith(CHECKS)


MAKE_FAILS = {
    "docker without the image": ({"TIER01": "docker"}, "can't be pulled"),
    "docker without an engine": ({"TIER01": "docker"} | NO_ENGINE, "no Docker Engine"),
}


@pytest.mark.parametrize(("settings", "told"), MAKE_FAILS.values(), ids=MAKE_FAILS.keys())
def test_make_says_what_to_do(new_machine: NewMachine, settings: dict[str, str], told: str) -> None:
    machine = new_machine("docker")
    result = machine.make("run", **settings)
    assert result.returncode == 2
    assert re.fullmatch(r"tier01\.sh: [^\n]+\nmake: [^\n]+\n", result.stderr)
    assert told in result.stderr
    assert machine.left() == []


def test_says_that_compose_cannot_parse_dotenv(guest: Machine) -> None:
    (guest.clone / ".env").write_text("A=1\nB C\n")
    for result in (guest.make("run"), guest.verify()):
        assert result.returncode in (1, 2)
        assert "docker compose can't parse .env or docker-compose.yml: " in result.stderr


def test_leaves_a_stopped_tier01(new_machine: NewMachine, stand_in: str) -> None:
    """It does not respond, but is not ours: neither started nor removed, nor is its data."""
    machine = new_machine("docker", image=stand_in)
    network = machine.network.removesuffix("_default")
    machine.docker("volume", "create", f"{network}_data")
    result = machine.make("run")
    assert result.returncode == 2
    assert f"the tier 01 in project {network} does not respond" in result.stderr
    assert machine.make("clean").returncode == 0
    assert machine.docker_objects()["volume rm"] == [f"{network}_data"]


VERIFY_FAILS = {
    "no engine": (NO_ENGINE, "the issuer http://authserver:9000 is not reachable from this host)"),
    "no network": ({"TIER01_NETWORK": "not-there"}, "there is no Docker network not-there"),
    "no image": ({"COMPOSE_PROJECT_NAME": "not-built"}, "image is missing: make run builds it"),
    "no such MCP server": (
        {"NETWORK_MCP_URL": "http://not-there:8080/mcp"},
        "initialize at http://not-there:8080/mcp",
    ),
}


@pytest.mark.parametrize(("settings", "told"), VERIFY_FAILS.values(), ids=VERIFY_FAILS.keys())
def test_verify_says_what_to_do(guest: Machine, settings: dict[str, str], told: str) -> None:
    before = guest.clients()
    result = guest.verify(**settings)
    assert result.returncode == 1
    assert re.fullmatch(r"verify\.sh: [^\n]+\n", result.stderr), result.stderr
    assert told in result.stderr
    assert guest.clients() == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_container_and_no_client(
    guest: Machine, others: Machine, number: signal.Signals
) -> None:
    silent, before = f"{guest.name}-silent", guest.clients()
    listen = "import socket, time; s = socket.create_server(('', 8080)); time.sleep(60)"
    network = ["--network", others.network, "--name", silent]
    guest.docker("run", "--detach", "--rm", *network, "python:3.12-slim", "python", "-c", listen)
    run = guest.start("./verify.sh", NETWORK_MCP_URL=f"http://{silent}:8080/mcp")
    named = f"name=02-agent-{run.pid}-"
    wait_until(lambda: guest.docker("ps", "--quiet", "--filter", named), "the agent's container")
    time.sleep(0.5)
    interrupt(run, number)
    output, errors = run.communicate(timeout=30)
    assert (run.returncode, errors) == (128 + number, "")
    assert "ALL CHECKS PASSED" not in output
    assert guest.docker("ps", "--all", "--quiet", "--filter", named) == ""
    assert guest.clients() == before


def test_secrets_stay_out_of_images_and_other_containers(guest: Machine, others: Machine) -> None:
    (guest.clone / ".env").write_text("CLIENT_SECRET=from-dotenv\n")
    assert guest.make("verify").returncode == 0
    recorded = {
        each["Config"]["Labels"]["com.docker.compose.service"]: json.dumps(each)
        for each in json.loads(others.docker("inspect", *others.docker_objects()["rm"]))
    }
    assert recorded.keys() == {"authserver", "mcp-server"}
    assert ADMIN_KEY in recorded["authserver"]
    assert ADMIN_KEY not in recorded["mcp-server"]
    assert "CLIENT_SECRET" not in "".join(recorded.values())
    image, file = f"{guest.name}-agent", guest.folder / "image.tar"
    history = guest.docker("history", "--no-trunc", image) + guest.docker("inspect", image)
    guest.docker("save", "--output", str(file), image)
    for hidden in (ADMIN_KEY, "from-dotenv"):
        assert hidden not in history
        with tarfile.open(file) as layers:
            for member in filter(tarfile.TarInfo.isfile, layers):
                content = layers.extractfile(member)
                assert content
                assert hidden.encode() not in content.read()


def test_image_has_only_what_the_agent_needs(guest: Machine) -> None:
    image = f"{guest.name}-agent"
    size, base = (
        json.loads(guest.docker("inspect", name))[0]["Size"] for name in (image, "python:3.12-slim")
    )
    assert size - base <= 30_000_000
    listing = (
        "import os, importlib.metadata as m; from pathlib import Path;"
        "print(os.getuid(), *sorted(d.name.lower() for d in m.distributions()));"
        "print(*sorted(p.name for p in Path('/app').iterdir()));"
        "print(len(list(Path('/app/.venv').rglob('authplane/__pycache__/*.pyc'))))"
    )
    options = ["--rm", "--read-only", "--entrypoint", ".venv/bin/python", image, "-c", listing]
    [uid, *packages], files, [compiled] = map(str.split, guest.docker("run", *options).splitlines())
    assert uid == "65532"
    assert {"authplane-sdk", "httpx"} <= set(packages)
    assert not {"pip", "setuptools", "uv", "fastmcp", "pytest"} & set(packages)
    assert files == [".venv", "agent.py"]
    assert int(compiled) > 5


def test_changed_agent_keeps_the_dependencies(guest: Machine) -> None:
    with (guest.clone / "agent.py").open("a") as agent:
        agent.write("# changed\n")
    tag = f"{guest.name}-changed"
    guest.docker("build", "--quiet", "--tag", tag, ".")
    layers, changed = (
        json.loads(guest.docker("inspect", image))[0]["RootFS"]["Layers"]
        for image in (f"{guest.name}-agent", tag)
    )
    assert layers[:-1] == changed[:-1]
    assert layers[-1] != changed[-1]


def test_agent_can_do_little(engine: Machine) -> None:
    config = ["compose", "--profile", "manual", "config", "--format", "json"]
    [agent] = json.loads(engine.docker(*config))["services"].values()
    expected = {"profiles": ["manual"], "restart": "no", "read_only": True, "cap_drop": ["ALL"]}
    assert agent.items() >= expected.items()
    assert agent["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in agent


def test_agent_never_gets_the_secrets_of_the_authserver(guest: Machine) -> None:
    names = ("MCP_SERVER_NAME", "AUTHPLANE_ADMIN_API_KEY", "AUTHPLANE_SESSION_SECRET")
    (guest.clone / ".env").write_text("".join(f"{name}=x\n" for name in names))
    print_them = f"import os; print([os.environ[name] for name in {names}])"
    options = ["--rm", "--no-TTY", "--entrypoint", ".venv/bin/python", "agent", "-c", print_them]
    assert guest.docker("compose", "run", *options) == "['x', '', '']"


def test_tier01_is_published_on_loopback_only(others: Machine) -> None:
    containers = json.loads(others.docker("inspect", *others.docker_objects()["rm"]))
    ports = [each["NetworkSettings"]["Ports"] for each in containers]
    published = [
        binding for each in ports for bindings in each.values() for binding in bindings or ()
    ]
    assert {binding["HostIp"] for binding in published} == {"127.0.0.1"}
    assert len(published) == 3
