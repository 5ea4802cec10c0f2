"""What a test may use: a clone, tools, ports and names of its own, and an end for what it starts.

A test can't start a program, or connect to a default port, in another way: see `forbid_the_rest`.
"""

import os
import random
import re
import shutil
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import httpx
import psutil

ROOT = Path(__file__).parents[2]
AGENT_PYTHON = os.environ.get("AGENT_PYTHON") or str(ROOT / ".venv/bin/python")
MARK = "TEST_MACHINE"  # in the environment of every program that a test starts
DEFAULT_PORTS = {9000, 9001, 8080}
ADMIN_KEY = "dev-admin-key-change-me"
TOOLS = """
    bash make curl jq
    awk base64 cat chmod cmp cp cut date diff dirname env find grep head ln ls mkdir mktemp mv nohup
    readlink rm sed sh sleep sort tail tee touch tr uname wc
""".split()  # noqa: SIM905 - what README.md asks for, and what every Unix has
DEFAULT_IMAGE = re.findall(r"AUTHSERVER_IMAGE=(.*)", (ROOT / ".env.example").read_text())[0]
PASSED_ON = re.compile(
    r"HOME|LANG|XDG_C.*_HOME|DOCKER_HOST|DOCKER_CONFIG|(PIP|UV|SSL_CERT|REQUESTS_CA)_.*"
)

PLAIN: dict[str, Any] = {"trust_env": False, "verify": False}  # loads no certificates: all is http

Result = subprocess.CompletedProcess[str]


def forbid_the_rest() -> None:
    """Make it an error, for the life of this process, to start a program without a `Machine`."""

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if event in {"os.system", "os.exec", "os.posix_spawn", "pty.spawn"} or (
            event == "subprocess.Popen" and MARK not in (arguments[3] or {})
        ):
            raise RuntimeError(f"{event}: use Machine.run or Machine.start")
        if event == "socket.connect" and arguments[1][1] in DEFAULT_PORTS:
            raise RuntimeError(f"{event}: use the ports of the Machine")

    sys.addaudithook(audit)


def reserve_port() -> socket.socket:
    """Return a UDP socket whose port number is free for TCP, and nobody else's while it is open.

    It is below the ports that the system gives to others.
    """
    while True:
        port = random.randrange(10_000, 30_000)  # noqa: S311
        reservation = socket.socket(type=socket.SOCK_DGRAM)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            reservation.bind(("127.0.0.1", port))
            return reservation
        reservation.close()


def wait_until(condition: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Poll until the condition holds; fail with what was awaited."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} s for {what}"
        time.sleep(0.02)


def status_of(method: str, url: str) -> int:
    """Return the HTTP status, 0 when nothing responds."""
    try:
        return httpx.request(method, url, **PLAIN).status_code
    except httpx.TransportError:
        return 0


class Machine:
    """A clean clone whose defaults are its own, and the tools that README.md asks for.

    Ports, image, project and network have other names in the clone than in the repository, so
    that a test that forgets a setting still meets nothing of the user's. `docker` and `uv` are
    there only if they are named.
    """

    def __init__(
        self,
        folder: Path,
        *tools: str,
        ports: list[int] | None = None,
        image: str = "",
        prepared: bool = True,
    ) -> None:
        self.name = f"test-{uuid.uuid4().hex[:8]}"
        self.folder, self.tools = folder / self.name, tools
        self.clone = self.folder / "clone"
        self.reservations = [] if ports else [reserve_port() for _ in range(3)]
        self.ports = ports or [each.getsockname()[1] for each in self.reservations]
        self.issuer, self.admin_url, mcp = (f"http://localhost:{port}" for port in self.ports)
        self.mcp_url = f"{mcp}/mcp"
        self.image = image or f"localhost:1/{self.name}:none"  # which can't be pulled, at once
        self.network = f"{self.name}-tier01_default"
        self.started: list[subprocess.Popen[str]] = []
        for name in ("bin", "tmp"):
            (self.folder / name).mkdir(parents=True)
        (self.folder / ".curlrc").touch()  # so that nobody's own is read
        for tool in (*TOOLS, *tools):
            path = shutil.which(tool) or shutil.which(tool, path=Path(sys.executable).parent)
            assert path, f"{tool} is missing: install it"
            (self.folder / "bin" / tool).symlink_to(path)
        python = self.folder / "bin/python3"
        python.write_text(f'#!/bin/sh\nexec {sys._base_executable} "$@"\n')  # type: ignore[attr-defined]
        python.chmod(0o755)
        self.copy_repository()
        if prepared:
            for name in (".venv", "tests/.venv"):
                (self.clone / name).symlink_to(ROOT / name)
            for requirements in self.clone.glob("tests/requirements/*.txt"):
                os.utime(requirements, (0, 0))  # so that make never installs into those

    @cached_property
    def own(self) -> dict[str, str]:
        """What stands in the clone, by what stands in the repository."""
        ports = dict(zip((9000, 9001, 8080), self.ports, strict=True))
        urls = {f"localhost:{port}": f"localhost:{own}" for port, own in ports.items()}
        addresses = {f'":{port}"': f'":{own}"' for port, own in ports.items()}
        network = {"01-mcp-server-basic": self.network.removesuffix("_default")}
        names = {"02-calling-another-resource": self.name, DEFAULT_IMAGE: self.image}
        return urls | addresses | network | names

    def rewrite(self, text: str) -> str:
        """Return text of the repository as it stands in the clone."""
        for default, own in self.own.items():
            text = text.replace(default, own)
        return text

    def copy_repository(self) -> None:
        """Copy what a clone has, uncommitted changes included, with the machine's own defaults."""
        listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        marked = os.environ | {MARK: self.name}
        listed = subprocess.run(listing, cwd=ROOT, env=marked, capture_output=True, text=True)
        for name in filter(lambda name: (ROOT / name).is_file(), listed.stdout.splitlines()):
            (self.clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, self.clone / name)
            text = (ROOT / name).read_text()
            if (rewritten := self.rewrite(text)) != text:
                (self.clone / name).write_text(rewritten)

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of a program: these settings, and none of the user's."""
        kept = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        own = {
            MARK: self.name,
            "PATH": str(self.folder / "bin"),
            "TMPDIR": str(self.folder / "tmp"),
            "CURL_HOME": str(self.folder),
        }
        if not self.network.startswith(self.name):  # that of another machine
            own["TIER01_NETWORK"] = self.network
        return kept | own | settings

    def popen(
        self,
        command: Sequence[str | Path],
        settings: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        log: Path | None = None,
    ) -> subprocess.Popen[str]:
        """Start a program in the clone, in a process group of its own, as a terminal does."""
        with log.open("w") if log else nullcontext() as output:
            process = subprocess.Popen(
                command,
                cwd=self.clone,
                env=self.environment(**settings),
                stdin=stdin,
                stdout=output or subprocess.PIPE,
                stderr=subprocess.STDOUT if output else subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def start(self, *command: str | Path, **settings: str) -> subprocess.Popen[str]:
        return self.popen(command, settings)

    def run(self, *command: str | Path, **settings: str) -> Result:
        """Run a program in the clone; return its exit status and what it printed."""
        process = self.start(*command, **settings)
        output, errors = process.communicate(timeout=300)
        return Result(list(command), process.returncode, output, errors)

    def make(self, *arguments: str, **settings: str) -> Result:
        return self.run("make", *arguments, **settings)

    def verify(self, **settings: str) -> Result:
        return self.run("./verify.sh", **settings)

    def docker(self, *arguments: str) -> str:
        """Return what docker prints; fail with its errors when it fails."""
        result = self.run("docker", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def serve(self, *part: str, **settings: str) -> subprocess.Popen[str]:
        """Start the stand-in for tier 01, or a part of it; its log is `self.log`."""
        defaults = {
            "AUTHPLANE_SERVER_ISSUER": self.issuer,
            "AUTHPLANE_ADMIN_API_KEY": ADMIN_KEY,
            "AUTHPLANE_DEV_MODE": "true",
        }
        program = [self.python, "tests/tier01/serve.py", *part]
        return self.popen(program, defaults | settings, log=self.log)

    python = sys.executable  # of tests/.venv

    @property
    def log(self) -> Path:
        return self.folder / "tier01.log"

    def admin(self, method: str, path: str, **options: Any) -> httpx.Response:
        """Send a request to the admin API of the tier 01 at the machine's ports."""
        url, headers = f"{self.admin_url}/admin/{path}", {"Authorization": f"Bearer {ADMIN_KEY}"}
        return httpx.request(method, url, headers=headers, **PLAIN, **options)

    def register_resource(
        self, slug: str = "demo-mcp", uri: str = "", scope: str = "mcp:echo"
    ) -> None:
        resource = {
            "slug": slug,
            "uri": uri or self.mcp_url,
            "backend_kind": "mint",
            "display_name": "Demo MCP",
            "scopes": [{"name": scope, "description": "echo tool"}],
        }
        assert self.admin("POST", "resources", json=resource).status_code == 201

    def register_client(self, scope: str = "mcp:echo") -> tuple[str, str]:
        """Return the id and the secret of a new client."""
        client = {
            "client_name": "demo-agent-client",
            "grant_types": ["client_credentials"],
            "token_endpoint_auth_method": "client_secret_basic",
            "scope": scope,
        }
        view = self.admin("POST", "clients", json=client).json()
        return view["client_id"], view["client_secret"]

    def delete_client(self, client_id: str) -> None:
        self.admin("DELETE", f"clients/{client_id}", params={"force": "true"})

    def clients(self) -> list[str]:
        """Return the ids of the registered clients."""
        return [client["id"] for client in self.admin("GET", "clients").json()]

    def token(self, credentials: tuple[str, str], **form: str) -> str:
        """Return an access token for these credentials."""
        data = {"grant_type": "client_credentials"} | form
        url = f"{self.issuer}/oauth/token"
        return httpx.post(url, auth=credentials, data=data, **PLAIN).json()["access_token"]

    def processes(self) -> list[psutil.Process]:
        """Return the processes that were started here, and theirs, and have not ended."""
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == self.name:
                    found.append(process)
        return found

    def docker_objects(self) -> dict[str, list[str]]:
        """Return the containers, networks, volumes and images that are named after the machine."""
        if "docker" not in self.tools:
            return {}
        named = ["--quiet", "--filter", f"name={self.name}"]
        images = ["--format", "{{.Repository}}:{{.Tag}}", "--filter", f"reference=*{self.name}*"]
        return {
            "rm": self.docker("ps", "--all", *named).split(),
            "network rm": self.docker("network", "ls", *named).split(),
            "volume rm": self.docker("volume", "ls", *named).split(),
            "image rm": self.docker("image", "ls", *images).split(),
        }

    def left(self) -> list[Any]:
        """Return what is left of what was started: processes, temporary files, Docker objects."""
        files = [*(self.folder / "tmp").iterdir(), *self.clone.glob(".tier01*")]
        return [*self.processes(), *files, *chain(*self.docker_objects().values())]

    def close(self) -> None:
        """End every process, and remove every Docker object, that was started here."""
        for process in (processes := self.processes()):
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=5)
        for reservation in self.reservations:
            reservation.close()
        for process in self.started:
            process.communicate()  # closes its pipes
        for command, names in self.docker_objects().items():
            for name in names:
                self.docker(*command.split(), "--force", name)
