"""Shared fixtures: a tier 01 on ports of its own, fake servers, and the programs under test."""

import contextlib
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parent.parent
AGENT_PYTHON = os.environ.get("AGENT_PYTHON") or str(ROOT / ".venv/bin/python")
KEY = "test-admin-key-0123456789"
ENGINE = subprocess.run(["docker", "info"], capture_output=True).returncode == 0
needs_engine = pytest.mark.skipif(  # in CI these tests fail without one
    not ENGINE and "CI" not in os.environ, reason="no Docker engine answers"
)
RESOURCE = {
    "slug": "demo-mcp",
    "backend_kind": "mint",
    "display_name": "Demo MCP",
    "scopes": [{"name": "mcp:echo", "description": "echo tool"}],
}
CLIENT = {
    "client_name": "demo-agent-client",
    "grant_types": ["client_credentials"],
    "token_endpoint_auth_method": "client_secret_basic",
    "scope": "mcp:echo",
}

Result = subprocess.CompletedProcess[str]


for variable in [name for name in os.environ if name.lower().endswith("_proxy")]:
    del os.environ[variable]  # all that the tests call is on this machine


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Give the tests that share a tier 01 to one worker, so that only one is started."""
    for item in items:
        shares = "tier01" in getattr(item, "fixturenames", ())
        if shares and not item.get_closest_marker("xdist_group"):
            item.add_marker(pytest.mark.xdist_group("tier01"))


SOMEBODYS = re.compile(
    r"(?i)(.*_proxy|python.*|make.*|mflags|py|uv|no_color|tier01.*|authplane_.*|authserver_.*"
    r"|client_(id|secret)|resource_uri|(network_)?(mcp|issuer|admin)_url|mcp_server_name|compose_.*)"
)


def plain_environment(**settings: str) -> dict[str, str]:
    """Return the environment without proxies and without what somebody's shell or make has set."""
    kept = {name: value for name, value in os.environ.items() if not SOMEBODYS.fullmatch(name)}
    return kept | settings


def free_ports(count: int) -> list[int]:
    """Return free ports of loopback, from below those that the system gives to others meanwhile."""
    ports: set[int] = set()
    while len(ports) < count:
        port = random.randrange(10_000, 30_000)  # noqa: S311
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            ports.add(port)
    return list(ports)


def wait_until(condition: Callable[[], object], what: str, seconds: float = 20) -> None:
    """Poll until the condition holds; fail with what was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def status_of(method: str, url: str) -> int:
    """Return the HTTP status, 0 when nothing answers."""
    try:
        return httpx.request(method, url, trust_env=False).status_code
    except httpx.TransportError:
        return 0


@dataclass(frozen=True)
class Tier01:
    """The addresses of a running tier 01, and its admin API."""

    issuer: str
    admin_url: str
    mcp_url: str
    logs: Path

    @property
    def settings(self) -> dict[str, str]:
        """The settings that `verify.sh` and `make` need to find it."""
        return {
            "ISSUER_URL": self.issuer,
            "ADMIN_URL": self.admin_url,
            "MCP_URL": self.mcp_url,
            "RESOURCE_URI": self.mcp_url,
            "AUTHPLANE_ADMIN_API_KEY": KEY,
        }

    def admin(self, method: str, path: str, **options: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {KEY}"}
        return httpx.request(
            method, f"{self.admin_url}/admin/{path}", headers=headers, trust_env=False, **options
        )

    def clients(self) -> list[str]:
        return [client["id"] for client in self.admin("GET", "clients").json()]

    def token(self, credentials: tuple[str, str], **form: str) -> httpx.Response:
        data = {"grant_type": "client_credentials"} | form
        return httpx.post(
            f"{self.issuer}/oauth/token", auth=credentials, data=data, trust_env=False
        )


@contextlib.contextmanager
def program(name: str, log: Path, **settings: str) -> Generator[subprocess.Popen[bytes]]:
    """Run tests/tier01/NAME.py, from another folder; end it with SIGTERM."""
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, ROOT / "tests/tier01" / name],
            cwd="/",
            env=plain_environment(**settings),
            stdout=output,
            stderr=subprocess.STDOUT,
        )
        try:
            yield process
        finally:
            process.terminate()
            process.wait(10)


@contextlib.contextmanager
def running_tier01(logs: Path) -> Generator[Tier01]:
    """Run both programs of tests/tier01 on free ports."""
    public, admin, mcp = free_ports(3)
    issuer, mcp_base = f"http://localhost:{public}", f"http://localhost:{mcp}"
    tier01 = Tier01(issuer, f"http://localhost:{admin}", f"{mcp_base}/mcp", logs)
    authserver = program(
        "authserver.py",
        logs / "authserver.log",
        AUTHPLANE_SERVER_ISSUER=issuer,
        AUTHPLANE_SERVER_ADDRESS=f":{public}",
        AUTHPLANE_ADMIN_ADDRESS=f":{admin}",
        AUTHPLANE_ADMIN_API_KEY=KEY,
    )
    mcp_server = program(
        "mcp_server.py",
        logs / "mcp_server.log",
        AUTHPLANE_ISSUER=issuer,
        AUTHPLANE_BASE_URL=mcp_base,
        PORT=str(mcp),
    )
    with authserver, mcp_server:
        wait_until(lambda: status_of("POST", tier01.mcp_url) == 401, f"tier 01, see {logs}")
        yield tier01


@pytest.fixture(scope="session")
def tier01(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tier01]:
    """A tier 01 with the resource `demo-mcp`."""
    with running_tier01(tmp_path_factory.mktemp("tier01")) as running:
        running.admin("POST", "resources", json=RESOURCE | {"uri": running.mcp_url})
        yield running


@pytest.fixture
def credentials(tier01: Tier01) -> Iterator[tuple[str, str]]:
    """A client of tier 01 that may have `mcp:echo`."""
    client = tier01.admin("POST", "clients", json=CLIENT).json()
    yield client["client_id"], client["client_secret"]
    tier01.admin("DELETE", f"clients/{client['client_id']}", params={"force": "true"})


@pytest.fixture
def agent_settings(tier01: Tier01, credentials: tuple[str, str]) -> dict[str, str]:
    """What the agent needs to be let in by tier 01."""
    return {
        "AUTHPLANE_ISSUER": tier01.issuer,
        "CLIENT_ID": credentials[0],
        "CLIENT_SECRET": credentials[1],
        "RESOURCE_URI": tier01.mcp_url,
        "MCP_URL": tier01.mcp_url,
        "AUTHPLANE_DEV_MODE": "true",
    }


def run_agent(settings: dict[str, str], program: Path = ROOT / "agent.py") -> Result:
    """Run the agent, or another client, as a program."""
    return subprocess.run(
        [AGENT_PYTHON, program],
        env=plain_environment(**settings),
        capture_output=True,
        text=True,
        timeout=60,
    )


@dataclass(frozen=True)
class Request:
    """A request as a fake server saw it; the names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


type Answer = bytes | Iterable[bytes] | None
type Handler = Callable[[Request], Answer]


@dataclass
class Fake:
    """A server that answers what a real one can't be made to: any bytes, or nothing at all."""

    handler: Handler
    requests: list[Request] = field(default_factory=list[Request])
    closing: threading.Event = field(default_factory=threading.Event)
    listener: socket.socket = field(
        default_factory=lambda: socket.create_server(("127.0.0.1", 0), backlog=64)
    )

    @property
    def url(self) -> str:
        return f"http://localhost:{self.listener.getsockname()[1]}"

    def serve(self) -> None:
        while not self.closing.is_set():
            try:
                connection = self.listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=self.answer, args=(connection,), daemon=True).start()

    def answer(self, connection: socket.socket) -> None:
        """Answer one request, then close; with None as the answer, keep the connection open."""
        with connection, connection.makefile("rb") as incoming:
            method, path, _ = incoming.readline().decode().split(" ", 2)
            headers: dict[str, str] = {}
            while line := incoming.readline().decode().strip():
                name, _, value = line.partition(":")
                headers[name.lower()] = value.strip()
            body = incoming.read(int(headers.get("content-length", "0")))
            request = Request(method, path, headers, body)
            self.requests.append(request)
            answer = self.handler(request)
            try:
                for part in [answer] if isinstance(answer, bytes) else answer or []:
                    connection.sendall(part)
            except OSError:
                return
            if answer is None:
                self.closing.wait(60)

    def close(self) -> None:
        self.closing.set()
        self.listener.shutdown(socket.SHUT_RDWR)
        self.listener.close()


type StartFake = Callable[[Handler], Fake]


@pytest.fixture
def fake() -> Iterator[StartFake]:
    """Start fake servers; they end with the test."""
    started: list[Fake] = []

    def start(handler: Handler) -> Fake:
        server = Fake(handler)
        started.append(server)
        threading.Thread(target=server.serve, daemon=True).start()
        return server

    yield start
    for server in started:
        server.close()


def http(status: str, body: str | bytes = b"", **headers: str) -> bytes:
    """Return the bytes of an HTTP response; in header names, _ stands for -."""
    content = body.encode() if isinstance(body, str) else body
    fields = {"content_length": str(len(content)), "connection": "close"} | headers
    lines = [f"{name.replace('_', '-')}: {value}" for name, value in fields.items()]
    return "\r\n".join([f"HTTP/1.1 {status}", *lines, "", ""]).encode() + content


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the repository as a clone would have it, uncommitted changes included."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path / "checkout"
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name)
    return copy


@pytest.fixture
def prepared(checkout: Path) -> Path:
    """A clone that has its virtual environments already."""
    for name in (".venv", "tests/.venv"):
        (checkout / name).symlink_to(ROOT / name)
    return checkout


def make(place: Path, settings: dict[str, str], *arguments: str) -> Result:
    """Run make, as a person with these settings would."""
    return subprocess.run(
        ["make", *arguments],
        cwd=place,
        env=plain_environment(**settings),
        capture_output=True,
        text=True,
        timeout=240,
    )


def settings_for_free_ports() -> dict[str, str]:
    """Return the settings of a tier 01 where none is."""
    public, admin, mcp = free_ports(3)
    return {
        "ISSUER_URL": f"http://localhost:{public}",
        "ADMIN_URL": f"http://localhost:{admin}",
        "MCP_URL": f"http://localhost:{mcp}/mcp",
        "RESOURCE_URI": f"http://localhost:{mcp}/mcp",
        "AUTHPLANE_ADMIN_API_KEY": KEY,
    }


def start_verify(place: Path, settings: dict[str, str]) -> subprocess.Popen[str]:
    """Start verify.sh in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [place / "verify.sh"],
        env=plain_environment(**settings),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def interrupt(run: subprocess.Popen[str], signal_number: signal.Signals) -> None:
    """Send SIGTERM to the process, what a terminal sends to the whole process group."""
    if signal_number != signal.SIGTERM:
        os.killpg(run.pid, signal_number)
    else:
        run.send_signal(signal_number)
