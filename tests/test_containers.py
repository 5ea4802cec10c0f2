"""Agent and tier 01 in containers, on a real engine; the stand-in takes the real image's place."""

import json
import re
import signal
import subprocess
import tarfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import (
    KEY,
    ROOT,
    Tier01,
    interrupt,
    make,
    needs_engine,
    plain_environment,
    settings_for_free_ports,
    start_verify,
    status_of,
    wait_until,
)

pytestmark = [pytest.mark.xdist_group("docker"), needs_engine]
NO_ENGINE = {"DOCKER_HOST": "unix:///nowhere"}
NO_IMAGE = {"AUTHSERVER_IMAGE": "localhost:1/not-there:0"}


def docker(*arguments: str, **settings: str) -> str:
    """Return what docker prints; raise CalledProcessError when it fails."""
    return subprocess.run(
        ["docker", *arguments],
        env=plain_environment(**settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def project(settings: dict[str, str]) -> str:
    return settings["TIER01_NETWORK"].removesuffix("_default")


def agent_image(settings: dict[str, str]) -> str:
    return docker("compose", "--profile", "manual", "config", "--images", **settings)


def left(settings: dict[str, str]) -> list[str]:
    """Return the containers, networks, volumes and images that tier 01 and the agent have left."""
    kinds = (["ps", "--all"], ["network", "ls"], ["volume", "ls"])
    named = ["--quiet", "--filter", f"name={project(settings)}"]
    images = ["image", "ls", "--quiet", "--filter", f"reference=*:{project(settings)}*"]
    found = [docker(*kind, *named) for kind in kinds] + [docker(*images)]
    return " ".join(found).split()


@pytest.fixture(scope="module")
def stand_in() -> Iterator[str]:
    """The image of the stand-in authserver, as the README builds it."""
    tag = f"stand-in-{uuid.uuid4().hex[:8]}"
    docker("build", "--quiet", "--file", "tests/tier01/Dockerfile", "--tag", tag, ".")
    yield tag
    docker("image", "rm", "--force", tag)


def settings_for_containers(image: str) -> dict[str, str]:
    """Return settings under which tier 01 and the agent meet nothing else on this engine."""
    name = f"test-{uuid.uuid4().hex[:8]}"
    return settings_for_free_ports() | {
        "AUTHSERVER_IMAGE": image,
        "TIER01_NETWORK": f"{name}_default",
        "COMPOSE_PROJECT_NAME": f"{name}-agent",
    }


@pytest.fixture
def settings(stand_in: str, prepared: Path) -> Iterator[dict[str, str]]:
    """Settings of a tier 01 that make may start in containers; what it made ends with the test."""
    settings = settings_for_containers(stand_in)
    yield settings
    assert make(prepared, settings, "clean").returncode == 0
    assert left(settings) == []
    assert docker("image", "ls", "--quiet", agent_image(settings)) == ""


@pytest.fixture(scope="module")
def others(stand_in: str) -> Iterator[dict[str, str]]:
    """Settings of a tier 01 that somebody else has started in containers."""
    settings = settings_for_containers(stand_in)
    names = {"ISSUER_PORT": "ISSUER_URL", "ADMIN_PORT": "ADMIN_URL", "MCP_PORT": "MCP_URL"}
    ports = {port: re.sub(r"\D", "", settings[url]) for port, url in names.items()}
    more = settings | ports | {"RESOURCE_BASE_URL": settings["MCP_URL"].removesuffix("/mcp")}
    compose = ["compose", "-p", project(settings), "-f", "tests/tier01/docker-compose.yml"]
    docker(*compose, "up", "--detach", "--build", **more)
    wait_until(lambda: status_of("POST", settings["MCP_URL"]) == 401, "tier 01 in containers")
    docker("compose", "--profile", "manual", "build", "--quiet", **settings)
    yield settings
    images = docker(*compose, "config", "--images", "mcp-server", **more), agent_image(settings)
    docker(*compose, "down", "--volumes", **more)
    docker("image", "rm", "--force", *images)
    assert left(settings) == []


def clients(settings: dict[str, str]) -> list[str]:
    return Tier01(settings["ISSUER_URL"], settings["ADMIN_URL"], "", ROOT).clients()


# One rule for where the agent runs


def test_starts_tier01_in_containers(prepared: Path, settings: dict[str, str]) -> None:
    first = make(prepared, settings, "run")
    assert first.stdout.splitlines() == [
        f"tier 01: {settings['ISSUER_URL']} and {settings['MCP_URL']}, started by make run",
        f"agent: in network {settings['TIER01_NETWORK']}, since the issuer http://authserver:9000"
        " is out of reach here",
    ]
    containers = docker("ps", "--quiet", "--filter", f"name={project(settings)}")
    second = make(prepared, settings, "verify")
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout.startswith(first.stdout)
    assert second.stdout.endswith("ALL CHECKS PASSED\n")
    assert docker("ps", "--quiet", "--filter", f"name={project(settings)}") == containers
    assert clients(settings) == []
    assert (
        "authserver: started by make run\nmcp-server: started"
        in make(prepared, settings, "status").stdout
    )
    logs = make(prepared, settings, "logs").stdout
    assert "stand-in for the Authplane authserver" in logs
    assert "MCP server demo-server" in logs
    assert "\x1b" not in logs


def test_starts_processes_when_the_image_cannot_be_pulled(
    prepared: Path, settings: dict[str, str]
) -> None:
    result = make(prepared, settings | NO_IMAGE, "verify")
    said = result.stdout.splitlines()
    assert said[0] == (
        "localhost:1/not-there:0 can't be pulled: "
        "starting the stand-in for tier 01 as processes instead"
    )
    assert said[2] == f"agent: on this host, since the issuer is {settings['ISSUER_URL']}"
    assert said[-1] == "ALL CHECKS PASSED"
    assert left(settings) == []


def test_native_is_obeyed(prepared: Path, settings: dict[str, str]) -> None:
    result = make(prepared, settings | {"TIER01": "native"}, "run")
    assert result.stdout.endswith("agent: on this host, since TIER01=native\n")
    assert left(settings) == []


def test_uses_and_leaves_containers_of_somebody_else(
    prepared: Path, others: dict[str, str]
) -> None:
    mine = others | {"COMPOSE_PROJECT_NAME": f"{others['COMPOSE_PROJECT_NAME']}-2"}
    result = make(prepared, mine, "verify")
    assert "started by someone else\n" in result.stdout
    assert result.stdout.endswith("ALL CHECKS PASSED\n")
    before = left(others)
    assert make(prepared, mine, "clean").returncode == 0
    assert left(others) == before
    assert docker("image", "ls", "--quiet", agent_image(mine)) == ""


def test_uses_a_native_tier01_of_somebody_else(prepared: Path, tier01: Tier01) -> None:
    """With an engine at hand too: the issuer decides."""
    result = make(prepared, tier01.settings, "verify")
    assert f"agent: on this host, since the issuer is {tier01.issuer}\n" in result.stdout
    assert result.stdout.endswith("ALL CHECKS PASSED\n")


def test_default_network_is_tier01s_own() -> None:
    agent = json.loads(docker("compose", "--profile", "manual", "config", "--format", "json"))
    tier01 = ["compose", "-f", "tests/tier01/docker-compose.yml", "config", "--format", "json"]
    networks = json.loads(docker(*tier01))["networks"]
    assert agent["networks"]["tier01"]["name"] == "01-mcp-server-basic_default"
    assert networks["default"]["name"] == "01-mcp-server-basic_default"


MAKE_REFUSES = {
    "docker without the image": (
        {"TIER01": "docker"} | NO_IMAGE,
        "localhost:1/not-there:0 can't be pulled: set AUTHSERVER_IMAGE",
    ),
    "docker without an engine": ({"TIER01": "docker"} | NO_ENGINE, "no Docker engine"),
    "neither": ({"TIER01": "podman"}, "TIER01=podman: it can be native or docker"),
}


@pytest.mark.parametrize(("more", "told"), MAKE_REFUSES.values(), ids=MAKE_REFUSES.keys())
def test_make_says_what_to_do(
    prepared: Path, settings: dict[str, str], more: dict[str, str], told: str
) -> None:
    result = make(prepared, settings | more, "run")
    assert result.returncode == 2
    assert re.fullmatch(r"tier01\.sh: [^\n]+\nmake: [^\n]+\n", result.stderr)
    assert told in result.stderr


def test_make_names_a_port_that_is_taken(
    prepared: Path, settings: dict[str, str], others: dict[str, str]
) -> None:
    result = make(prepared, settings | {"MCP_URL": others["MCP_URL"]}, "run")
    assert result.returncode == 2
    assert re.search(
        rf":{re.sub(r'\D', '', others['MCP_URL'])}\D.*(allocated|in use)", result.stderr
    )
    assert left(settings) == []


def test_leaves_a_stopped_tier01_of_somebody_else(prepared: Path, settings: dict[str, str]) -> None:
    """It does not answer, but it is theirs: neither started nor removed, nor is its data."""
    file = ["compose", "-p", project(settings), "-f", "tests/tier01/docker-compose.yml"]
    docker(*file, "create", "authserver", **settings)
    before = left(settings)
    try:
        result = make(prepared, settings, "run")
        assert result.returncode == 2
        assert f"there is a tier 01 in project {project(settings)}" in result.stderr
        assert make(prepared, settings, "clean").returncode == 0
        assert left(settings) == before != []
    finally:
        docker(*file, "down", "--volumes", **settings)


VERIFY_REFUSES = {
    "no engine": (NO_ENGINE, "the issuer http://authserver:9000 is out of reach here): start"),
    "no network": ({"TIER01_NETWORK": "not-there"}, "there is no Docker network not-there"),
    "no image": ({"COMPOSE_PROJECT_NAME": "not-built"}, "image is missing: make run builds it"),
    "no such MCP server": (
        {"NETWORK_MCP_URL": "http://not-there:8080/mcp"},
        "initialize at http://not-there:8080/mcp",
    ),
}


@pytest.mark.parametrize(("more", "told"), VERIFY_REFUSES.values(), ids=VERIFY_REFUSES.keys())
def test_verify_says_what_to_do(
    prepared: Path, others: dict[str, str], more: dict[str, str], told: str
) -> None:
    run = start_verify(prepared, others | more)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert re.fullmatch(r"verify\.sh: [^\n]+\n", errors), errors
    assert told in errors
    assert clients(others) == []


# Nothing left, nothing shown


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_leaves_no_container_and_no_client(
    prepared: Path, others: dict[str, str], signal_number: signal.Signals
) -> None:
    silent = f"{project(others)}-silent"
    listen = "import socket, time; s = socket.create_server(('', 8080)); time.sleep(60)"
    network = ["--network", others["TIER01_NETWORK"], "--name", silent]
    docker("run", "--detach", "--rm", *network, "python:3.12-slim", "python", "-c", listen)
    try:
        run = start_verify(prepared, others | {"NETWORK_MCP_URL": f"http://{silent}:8080/mcp"})
        named = f"name=02-agent-{run.pid}-"
        wait_until(lambda: docker("ps", "--quiet", "--filter", named), "the agent's container")
        [registered] = clients(others)
        time.sleep(0.5)
        interrupt(run, signal_number)
        output, errors = run.communicate(timeout=30)
    finally:
        docker("rm", "--force", silent)
    assert (run.returncode, errors) == (128 + signal_number, "")
    assert "ALL CHECKS PASSED" not in output
    assert docker("ps", "--all", "--quiet", "--filter", named) == ""
    assert registered not in clients(others)


def test_secrets_stay_out_of_what_stays(
    prepared: Path, settings: dict[str, str], tmp_path: Path
) -> None:
    """Neither in the image nor in the recorded configuration of a container is there any secret."""
    (prepared / ".env").write_text("CLIENT_SECRET=from-dotenv\n")
    assert make(prepared, settings, "verify").returncode == 0
    containers = docker("ps", "--all", "--quiet", "--filter", f"name={project(settings)}").split()
    recorded = {
        each["Config"]["Labels"]["com.docker.compose.service"]: json.dumps(each)
        for each in json.loads(docker("inspect", *containers))
    }
    assert recorded.keys() == {"authserver", "mcp-server"}
    assert KEY in recorded["authserver"]
    assert KEY not in recorded["mcp-server"]
    assert "CLIENT_SECRET" not in "".join(recorded.values())
    image = agent_image(settings)
    history = docker("history", "--no-trunc", image) + docker("inspect", image)
    docker("save", "--output", f"{tmp_path}/image.tar", image)
    for hidden in (KEY, "from-dotenv"):
        assert hidden not in history
        with tarfile.open(tmp_path / "image.tar") as layers:
            for member in filter(tarfile.TarInfo.isfile, layers):
                content = layers.extractfile(member)
                assert content
                assert hidden.encode() not in content.read()


# The image and the compose files


def test_image_is_small_and_has_only_what_the_agent_needs(others: dict[str, str]) -> None:
    image = agent_image(others)
    size, base = (
        json.loads(docker("inspect", name))[0]["Size"] for name in (image, "python:3.12-slim")
    )
    assert size - base <= 30_000_000
    listing = (
        "import os, sys, importlib.metadata as m; from pathlib import Path;"
        "print(os.getuid(), *sorted(d.name.lower() for d in m.distributions()));"
        "print(*sorted(p.name for p in Path('/app').iterdir()));"
        "print(len(list(Path('/app/.venv').rglob('authplane/__pycache__/*.pyc'))))"
    )
    options = ["--rm", "--read-only", "--entrypoint", ".venv/bin/python", image, "-c", listing]
    (uid, *packages), files, [compiled] = map(str.split, docker("run", *options).splitlines())
    assert uid == "65532"
    assert {"authplane-sdk", "httpx"} <= set(packages)
    assert not {"pip", "setuptools", "uv", "fastmcp", "pytest"} & set(packages)
    assert files == [".venv", "agent.py"]
    assert int(compiled) > 5
    assert json.loads(docker("inspect", image))[0]["Config"]["User"] == "65532:65532"


def test_changed_agent_keeps_the_dependencies(prepared: Path, others: dict[str, str]) -> None:
    tag = f"{project(others)}-changed"
    with (prepared / "agent.py").open("a") as agent:
        agent.write("# changed\n")
    started = time.monotonic()
    docker("build", "--quiet", "--tag", tag, str(prepared))
    took = time.monotonic() - started
    layers, changed = (
        json.loads(docker("inspect", image))[0]["RootFS"]["Layers"]
        for image in (agent_image(others), tag)
    )
    docker("image", "rm", "--force", tag)
    assert layers[:-1] == changed[:-1]
    assert layers[-1] != changed[-1]
    assert took < 5


def test_compose_file_of_the_agent() -> None:
    config = json.loads(docker("compose", "--profile", "manual", "config", "--format", "json"))
    [(name, agent)] = config["services"].items()
    assert name == "agent"
    assert agent["profiles"] == ["manual"]
    assert agent["restart"] == "no"
    assert agent["read_only"] is True
    assert agent["cap_drop"] == ["ALL"]
    assert agent["security_opt"] == ["no-new-privileges:true"]
    assert "ports" not in agent
    assert config["networks"]["tier01"]["external"] is True
    assert (
        "services" not in json.loads(docker("compose", "config", "--format", "json"))
        or not (json.loads(docker("compose", "config", "--format", "json"))["services"])
    )


def test_agent_never_gets_the_authservers_secrets(prepared: Path, others: dict[str, str]) -> None:
    names = ("MCP_SERVER_NAME", "AUTHPLANE_ADMIN_API_KEY", "AUTHPLANE_SESSION_SECRET")
    (prepared / ".env").write_text("".join(f"{name}=x\n" for name in names))
    file = f"{prepared}/docker-compose.yml"
    print_them = f"import os; print([os.environ[name] for name in {names}])"
    options = ["--rm", "--no-TTY", "--entrypoint", ".venv/bin/python", "agent", "-c", print_them]
    assert docker("compose", "-f", file, "run", *options, **others) == "['x', '', '']"


def test_tier01_is_published_on_loopback_only() -> None:
    config = ["compose", "-f", "tests/tier01/docker-compose.yml", "config", "--format", "json"]
    services = json.loads(docker(*config))["services"]
    ports = [port for service in services.values() for port in service["ports"]]
    assert {(port["host_ip"], port["published"]) for port in ports} == {
        ("127.0.0.1", "9000"),
        ("127.0.0.1", "9001"),
        ("127.0.0.1", "8080"),
    }
    assert services["authserver"]["image"] == "authplane/authserver:0.2.2"
    environment = services["authserver"]["environment"]
    assert environment["AUTHPLANE_SERVER_ISSUER"] == "http://authserver:9000"
    assert environment["AUTHPLANE_CLIENT_CREDENTIALS_ENABLED"] == "true"
    assert environment["AUTHPLANE_SESSION_SECURE"] == "true"
    assert len(environment["AUTHPLANE_ADMIN_API_KEY"]) >= 16
    assert len(environment["AUTHPLANE_SESSION_SECRET"]) >= 16
