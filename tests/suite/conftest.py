"""Fixtures: sandboxes to run programs in, running servers, Docker, and fake servers."""

import os
import re
import shutil
import signal
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

os.environ["FASTMCP_ENV_FILE"] = os.devnull  # otherwise FastMCP reads ./.env
with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    import authplane  # noqa: F401 # pyright: ignore[reportUnusedImport]

from authserver_client import Credentials, status_of
from fakes import Fake, Handler
from sandbox import ROOT, Sandbox, wait_until

type NewSandbox = Callable[..., Sandbox]
type StartFake = Callable[[Handler], Fake]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print each reason for which tests were skipped."""
    skipped = terminalreporter.stats.get("skipped", [])
    for reason, count in Counter(report.longrepr[2] for report in skipped).items():
        terminalreporter.write_line(f"{count} skipped: {reason.removeprefix('Skipped: ')}")


def skip(reason: str) -> None:
    """Skip the test; fail it in CI, where nothing is skipped for want of a tool."""
    assert not os.environ.get("CI"), reason
    pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def defaults() -> None:
    """Undo what this process has inherited: proxies, and signals that `nohup` or `&` ignore."""
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[variable]
    for number in (signal.SIGHUP, signal.SIGQUIT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def new_sandbox(tmp_path: Path) -> Iterator[NewSandbox]:
    """Make sandboxes; they, and all that was started in them, end with the test."""
    made: list[Sandbox] = []

    def make(*tools: str, **options: object) -> Sandbox:
        made.append(Sandbox(tmp_path, *tools, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for sandbox in made:
        sandbox.close()


@pytest.fixture
def sandbox(new_sandbox: NewSandbox) -> Sandbox:
    """A sandbox without Docker, in which the virtual environments are installed already."""
    return new_sandbox()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox in which the stand-in and the MCP server are running, the resource registered."""
    with closing(Sandbox(tmp_path_factory.mktemp("servers"))) as running:
        running.serve()
        wait_until(lambda: status_of("POST", running.mcp_url) == 401, f"servers: {running.log}")
        running.authserver.register_resource("demo-mcp", running.mcp_url, "mcp:echo")
        yield running


@pytest.fixture
def served(new_sandbox: NewSandbox, servers: Sandbox) -> Sandbox:
    """A sandbox for which those servers are already running."""
    return new_sandbox(ports=servers.ports)


@pytest.fixture
def credentials(servers: Sandbox) -> Iterator[Credentials]:
    """A client with the scope `mcp:echo`."""
    client = servers.authserver.register_client()
    yield client
    servers.authserver.delete_client(client[0])


@pytest.fixture
def agent_settings(servers: Sandbox, credentials: Credentials) -> dict[str, str]:
    """The settings with which the servers accept the agent."""
    return {
        "AUTHPLANE_ISSUER": servers.issuer,
        "CLIENT_ID": credentials[0],
        "CLIENT_SECRET": credentials[1],
        "RESOURCE_URI": servers.mcp_url,
        "MCP_URL": servers.mcp_url,
        "AUTHPLANE_DEV_MODE": "true",
    }


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sandbox]:
    """A sandbox with Docker; skips the test if none is running."""
    if not shutil.which("docker"):
        skip("Docker is not installed")
    with closing(Sandbox(tmp_path_factory.mktemp("engine"), "docker")) as sandbox:
        if sandbox.run("docker", "info").returncode:
            skip("no Docker Engine is running")
        yield sandbox


@pytest.fixture(scope="session")
def stand_in(engine: Sandbox) -> str:
    """The image of the stand-in, built under a name of its own."""
    tag = f"{engine.name}-authserver"
    engine.docker("build", "--quiet", "--file", "tests/tier01/Dockerfile", "--tag", tag, ".")
    return tag


def authserver_image(engine: Sandbox) -> str:
    """Return the name of the authserver's image; skip the test unless this engine has it."""
    default = re.findall("AUTHSERVER_IMAGE=(.*)", (ROOT / ".env.example").read_text())
    image = os.environ.get("AUTHSERVER_IMAGE") or default[0]
    if engine.run("docker", "image", "inspect", image).returncode:
        pytest.skip(f"{image} is not here: pull it, to compare the stand-in with it")
    return image


@pytest.fixture(scope="session", params=["stand-in", "authserver"])
def image(request: pytest.FixtureRequest, engine: Sandbox) -> str:
    """The image of the stand-in, and the authserver's if this engine has it."""
    if request.param == "stand-in":
        return request.getfixturevalue("stand_in")
    return authserver_image(engine)


@pytest.fixture
def fake() -> Iterator[StartFake]:
    """Start fake servers; they end with the test."""
    started: list[Fake] = []

    def start(handler: Handler) -> Fake:
        started.append(Fake(handler))
        threading.Thread(target=started[-1].serve, daemon=True).start()
        return started[-1]

    yield start
    for server in started:
        server.close()
