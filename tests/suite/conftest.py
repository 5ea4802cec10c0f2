"""Fixtures: machines to run programs on, a running tier 01, and fake servers."""

import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from fakes import Fake, Handler
from machine import DEFAULT_IMAGE, Machine, forbid_the_rest, status_of, wait_until

REAL_IMAGE = os.environ.get("AUTHSERVER_IMAGE") or DEFAULT_IMAGE

type NewMachine = Callable[..., Machine]
type StartFake = Callable[[Handler], Fake]


@pytest.fixture(scope="session", autouse=True)
def nothing_else() -> None:
    """Tests start programs on machines only, and call only what is on this one."""
    for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
        del os.environ[variable]
    forbid_the_rest()


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def new_machine(tmp_path: Path) -> Iterator[NewMachine]:
    """Make machines; they, and all that was started on them, end with the test."""
    made: list[Machine] = []

    def make(*tools: str, **options: object) -> Machine:
        made.append(Machine(tmp_path, *tools, **options))  # type: ignore[arg-type]
        return made[-1]

    yield make
    for machine in made:
        machine.close()


@pytest.fixture
def machine(new_machine: NewMachine) -> Machine:
    """A machine without Docker, on which the virtual environments are installed already."""
    return new_machine()


@pytest.fixture(scope="session")
def tier01(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine on which tier 01 is running, as the stand-in, with the resource registered."""
    running = Machine(tmp_path_factory.mktemp("tier01"))
    try:
        running.serve()
        wait_until(lambda: status_of("POST", running.mcp_url) == 401, f"tier 01: {running.log}")
        running.register_resource()
        yield running
    finally:
        running.close()


@pytest.fixture
def beside(new_machine: NewMachine, tier01: Machine) -> Machine:
    """A machine on which that tier 01 is already running."""
    return new_machine(ports=tier01.ports)


@pytest.fixture
def credentials(tier01: Machine) -> Iterator[tuple[str, str]]:
    """A client of tier 01 with the scope `mcp:echo`."""
    client = tier01.register_client()
    yield client
    tier01.delete_client(client[0])


@pytest.fixture
def agent_settings(tier01: Machine, credentials: tuple[str, str]) -> dict[str, str]:
    """The settings with which tier 01 accepts the agent."""
    return {
        "AUTHPLANE_ISSUER": tier01.issuer,
        "CLIENT_ID": credentials[0],
        "CLIENT_SECRET": credentials[1],
        "RESOURCE_URI": tier01.mcp_url,
        "MCP_URL": tier01.mcp_url,
        "AUTHPLANE_DEV_MODE": "true",
    }


@pytest.fixture(scope="session")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A machine with Docker; skips the test, but not in CI, where no engine is running."""
    machine = Machine(tmp_path_factory.mktemp("engine"), *["docker"] * bool(shutil.which("docker")))
    if not machine.tools or machine.run("docker", "info").returncode:
        assert "CI" not in os.environ, "no Docker Engine is running"
        pytest.skip("no Docker Engine is running")
    yield machine
    machine.close()


@pytest.fixture(scope="session")
def stand_in(engine: Machine) -> str:
    """The image of the stand-in, built under a name of its own."""
    tag = f"{engine.name}-authserver"
    engine.docker("build", "--quiet", "--file", "tests/tier01/Dockerfile", "--tag", tag, ".")
    return tag


def need_image(request: pytest.FixtureRequest) -> str:
    """Return the name of the authserver's image; skip the test unless this engine has it."""
    engine: Machine = request.getfixturevalue("engine")
    if engine.run("docker", "image", "inspect", REAL_IMAGE).returncode:
        pytest.skip(f"{REAL_IMAGE} is not here: pull it, to compare the stand-in with it")
    return REAL_IMAGE


@pytest.fixture(scope="session", params=["stand-in", REAL_IMAGE])
def authserver_image(request: pytest.FixtureRequest) -> str:
    """The image of the stand-in, and the authserver's if this engine has it."""
    in_turn = request.getfixturevalue
    return in_turn("stand_in") if request.param == "stand-in" else need_image(request)


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
