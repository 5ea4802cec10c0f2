"""Agent and tier 01 in containers: with the stand-in, and with the authserver if it is there."""

import json
import os
import re
import signal
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from authserver_client import ADMIN_KEY
from conftest import NewSandbox
from sandbox import Sandbox, wait_until
from test_verify import AGENT_SETTINGS, CHECKS, interrupt, masked

pytestmark = pytest.mark.usefixtures("engine")
DOCKER_CONFIG = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker")


@pytest.fixture(scope="module")
def containers(stand_in: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox in which tier 01 is running in containers, and the agent's image is built."""
    folder = tmp_path_factory.mktemp("containers")
    with closing(Sandbox(folder, "docker", image=stand_in)) as sandbox:
        result = sandbox.make("run")
        assert result.returncode == 0, result.stderr
        yield sandbox


def project(sandbox: Sandbox) -> str:
    return (sandbox.clone / ".started/project").read_text().strip()


def test_runs_tier01_in_containers(new_sandbox: NewSandbox, image: str, stand_in: str) -> None:
    """It does so in a clone that only its owner can read."""
    sandbox = new_sandbox("docker", image=image)
    for path in sandbox.clone.rglob("*.py"):
        path.chmod(0o600)
    first = sandbox.make("run")
    starting = "starting tier 01 in containers; the image of the MCP server is built first\n"
    prepared = "building the agent's image\n"
    prepared += f"tier 01 is running: {sandbox.issuer} and {sandbox.mcp_url}\n"
    assert (first.stdout, first.stderr, first.returncode) == (starting + prepared, "", 0)
    before = sandbox.docker_objects()
    assert len(before["rm"]) == 2
    ports = sandbox.docker("ps", "--filter", f"name={sandbox.name}", "--format", "{{.Ports}}")
    assert re.findall(r"(\S+):\d+->", ports) == ["127.0.0.1"] * 3
    there = f"in network {project(sandbox)}_default: the issuer http://authserver:9000 is not "
    there += "reachable from this host"
    checks = CHECKS.replace("on this host: the issuer is http://localhost:PORT", there)
    for status in ("201", "409"):
        result = sandbox.make("verify")
        assert (result.stderr, result.returncode) == ("", 0)
        expected = masked(prepared) + checks.replace("409", status)
        if image != stand_in and "invalid_target" not in result.stdout:  # 0.2.1 and before
            expected = expected.replace("invalid_target", "invalid_scope")
        assert masked(result.stdout) == expected
    assert sandbox.docker_objects() == before
    assert sandbox.authserver.clients() == []
    assert "MCP server demo-server" in sandbox.make("logs").stdout
    failed = sandbox.make("clean", DOCKER_HOST="unix:///nowhere")
    assert failed.returncode == 2
    assert "can't be removed: is Docker running? Then make clean" in failed.stderr
    assert sandbox.make("clean").returncode == 0
    assert sandbox.left() == []
    assert sandbox.docker("image", "inspect", "--format", "here", image) == "here"


def test_needs_no_proxy_in_the_network(new_sandbox: NewSandbox, stand_in: str) -> None:
    """Docker is configured with one that is down. The images are built already, without it."""
    sandbox = new_sandbox("docker", image=stand_in)
    proxies = {"httpProxy": "http://127.0.0.1:1", "allProxy": "http://127.0.0.1:1"}
    plugins = [str(DOCKER_CONFIG / "cli-plugins")]
    config = {"proxies": {"default": proxies}, "cliPluginsExtraDirs": plugins}
    (sandbox.folder / "config.json").write_text(json.dumps(config))
    host = sandbox.docker("context", "inspect", "--format", "{{.Endpoints.docker.Host}}")
    result = sandbox.make("verify", DOCKER_CONFIG=str(sandbox.folder), DOCKER_HOST=host)
    assert result.stdout.endswith("ALL CHECKS PASSED\n"), result


def test_starts_the_stand_in_if_the_image_cannot_be_pulled(new_sandbox: NewSandbox) -> None:
    """The reason that Docker gives is shown."""
    sandbox = new_sandbox("docker")
    image = f"localhost:1/{sandbox.name}"
    why = f"{image} can't be pulled"
    failed = sandbox.make("run", TIER01_RUNTIME="docker")
    *reason, message, _ = failed.stderr.splitlines()
    assert (failed.returncode, message) == (2, f"tier01.sh: TIER01_RUNTIME=docker, but {why}")
    assert "localhost:1" in "".join(reason)
    result = sandbox.make("run")
    assert f"starting a stand-in for tier 01 as a process: {why}\n" in result.stdout
    assert "localhost:1" in result.stderr
    assert sandbox.make("clean").returncode == 0
    assert sandbox.left() == []


@pytest.mark.parametrize("dockerfile", ["tests/tier01/Dockerfile", "Dockerfile"])
def test_shows_why_an_image_is_not_built(
    new_sandbox: NewSandbox, stand_in: str, dockerfile: str
) -> None:
    sandbox = new_sandbox("docker", image=stand_in)
    (sandbox.clone / dockerfile).write_text("FROM python:3.12-slim\nRUN echo why; false\n")
    result = sandbox.make("run")
    assert result.returncode == 2
    assert "the end of the log is above" in result.stderr
    assert re.search("(?m)(^| )why$", result.stderr), result.stderr
    assert sandbox.left() == []


def test_native_is_obeyed(new_sandbox: NewSandbox, stand_in: str) -> None:
    sandbox = new_sandbox("docker", image=stand_in)
    assert sandbox.make("run", TIER01_RUNTIME="native").returncode == 0
    assert sandbox.docker_objects()["rm"] == []


def test_leaves_running_containers(containers: Sandbox, new_sandbox: NewSandbox) -> None:
    """Those of another folder: they are used, and make clean does not touch them.

    Also if they were started when those that make run had started here had been removed by hand.
    """
    before = containers.docker_objects()
    guest = new_sandbox("docker", ports=containers.ports)
    (guest.clone / ".started").mkdir()
    (guest.clone / ".started/project").write_text(f"{guest.name}-tier01-removed")
    result = guest.make("verify")
    assert result.stdout.endswith("ALL CHECKS PASSED\n"), result.stderr
    assert guest.make("clean").returncode == 0
    assert containers.docker_objects() == before
    assert guest.left() == []


FAILS = {
    "DOCKER_HOST=unix:///nowhere": "start Docker, or set TIER01_NETWORK",
    "TIER01_NETWORK=not-there": "agent: accepted: ",
    "NETWORK_MCP_URL=http://not-there:8080/mcp": "initialize at http://not-there:8080/mcp",
}


@pytest.mark.parametrize(("setting", "message"), FAILS.items(), ids=FAILS)
def test_verify_says_what_to_do(containers: Sandbox, setting: str, message: str) -> None:
    before = containers.authserver.clients()
    name, value = setting.split("=")
    result = containers.verify(**{name: value})
    assert result.returncode == 1
    assert re.fullmatch(r"verify\.sh: [^\n]+\n", result.stderr), result.stderr
    assert message in result.stderr
    assert containers.authserver.clients() == before


def test_interrupt_leaves_no_container_and_no_client(containers: Sandbox) -> None:
    before = containers.authserver.clients()
    run = containers.start("./verify.sh")
    agent = ["--quiet", "--filter", f"name=02-agent-{run.pid}-"]
    wait_until(lambda: containers.docker("ps", *agent), "the agent's container")
    interrupt(run, signal.SIGTERM)
    output, errors = run.communicate(timeout=30)
    assert (run.returncode, errors) == (128 + signal.SIGTERM, "")
    assert "ALL CHECKS PASSED" not in output
    assert containers.docker("ps", "--all", *agent) == ""
    assert containers.authserver.clients() == before


def test_secrets_stay_out_of_other_containers_and_the_image(containers: Sandbox) -> None:
    assert ADMIN_KEY in (containers.clone / ".env").read_text()
    authserver = containers.docker("inspect", f"{project(containers)}-authserver-1")
    mcp_server = containers.docker("inspect", f"{project(containers)}-mcp-server-1")
    assert ADMIN_KEY in authserver
    assert ADMIN_KEY not in mcp_server
    assert "CLIENT_SECRET" not in authserver + mcp_server
    saved = containers.folder / "image.tar"  # all layers and their history, not compressed
    containers.docker("save", "--output", str(saved), f"{containers.name}-agent")
    content = saved.read_bytes()
    assert b"authenticated MCP initialize OK" in content
    assert ADMIN_KEY.encode() not in content


def test_the_container_of_the_agent(containers: Sandbox) -> None:
    """It gets its own settings only, whatever is in .env or the environment of Compose.

    It runs as nobody, without a tool that installs packages.
    """
    (containers.clone / ".env").write_text("AUTHPLANE_ADMIN_API_KEY=x\nOTHER=x\n")
    settings = dict.fromkeys(AGENT_SETTINGS, "x") | {"AUTHPLANE_SESSION_SECRET": "x"}
    compose = ["docker", "compose", "--profile", "manual", "run", "--rm", "--no-TTY"]
    shown = "id -u; .venv/bin/python -c 'import httpx, pip' 2>&1 | tail -n 1; env"
    network = f"{project(containers)}_default"
    command = [*compose, "--entrypoint", "sh", "agent", "-c", shown]
    result = containers.run(*command, TIER01_NETWORK=network, **settings)
    (containers.clone / ".env").unlink()
    uid, no_pip, *environment = result.stdout.splitlines()
    assert (uid, "'pip'" in no_pip) == ("65532", True)
    names = {line.split("=")[0] for line in environment}
    assert names >= AGENT_SETTINGS
    assert not names & {"AUTHPLANE_ADMIN_API_KEY", "AUTHPLANE_SESSION_SECRET", "OTHER"}
