"""What a test may use: a clone, tools, ports and names of its own; what it starts is ended."""

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
from itertools import chain
from pathlib import Path

import psutil

from authserver_client import ADMIN_KEY, Authserver

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / "tests/.venv/bin/python"
# What README.md names, and what every Unix has.
TOOLS = """
    bash make curl jq
    awk base64 cat chmod cmp cp cut date diff dirname env find grep head ln ls mkdir mktemp mv nohup
    ps readlink rm sed sh sleep sort tail tee touch tr uname wc
""".split()  # noqa: SIM905
# What of the user's environment reaches the programs: how to reach Docker and a package index.
PASSED_ON = re.compile(
    r"HOME|LANG|XDG_C.*_HOME|DOCKER_HOST|DOCKER_CONFIG|(PIP|UV|SSL_CERT|REQUESTS_CA)_.*"
)


class Sandbox:
    """A clean clone, with the tools that README.md names, whose defaults are its own.

    The defaults are in its .env.example: ports, and an image that can't be pulled. The Docker
    objects that it makes are named after it. `docker` and `uv` are there only if they are named.
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
        self.folder = folder / self.name
        self.clone = self.folder / "clone"
        self.log = self.folder / "servers.log"
        self.tools = tools
        self.reservations: list[socket.socket] = []
        if ports is None:
            self.reservations = [reserve_port() for _ in range(3)]
            ports = [each.getsockname()[1] for each in self.reservations]
        self.ports = ports
        self.issuer, admin_url, mcp_server = (f"http://localhost:{port}" for port in self.ports)
        self.mcp_url = f"{mcp_server}/mcp"
        self.authserver = Authserver(self.issuer, admin_url)
        self.started: list[subprocess.Popen[str]] = []
        # what a clone has, uncommitted changes included; ROOT need not be a git clone
        ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split()]
        shutil.copytree(ROOT, self.clone, ignore=shutil.ignore_patterns(".git", *ignored))
        self.change_defaults(
            AUTHPLANE_ISSUER=self.issuer,
            AUTHSERVER_URL=self.issuer,
            ADMIN_URL=admin_url,
            MCP_URL=self.mcp_url,
            RESOURCE_URI=self.mcp_url,
            AUTHSERVER_IMAGE=image or f"localhost:1/{self.name}",
        )
        self.make_tools()
        if prepared:
            for name in (".venv", "tests/.venv"):
                (self.clone / name).symlink_to(ROOT / name)

    def change_defaults(self, **settings: str) -> None:
        """Change settings in .env.example."""
        path = self.clone / ".env.example"
        text = path.read_text()
        for name, value in settings.items():
            text, count = re.subn(rf"(?m)^((?:# )?{name}=).*", rf"\g<1>{value}", text)
            assert count == 1, name
        path.write_text(text)

    def make_tools(self) -> None:
        """Make PATH: links to the tools, and a `python3` that has no packages."""
        for name in ("bin", "tmp"):
            (self.folder / name).mkdir()
        (self.folder / ".curlrc").touch()  # so that nobody's own is read
        for tool in (*TOOLS, *self.tools):
            path = shutil.which(tool) or shutil.which(tool, path=PYTHON.parent)
            if path:
                (self.folder / "bin" / tool).symlink_to(path)
        python = self.folder / "bin/python3"
        python.write_text(f'#!/bin/sh\nexec {Path(sys.base_prefix) / "bin/python3"} "$@"\n')
        python.chmod(0o755)

    def environment(self, **settings: str) -> dict[str, str]:
        """Return the environment of a program: these settings, and none of the user's."""
        kept = {name: value for name, value in os.environ.items() if PASSED_ON.fullmatch(name)}
        own = {
            "PATH": str(self.folder / "bin"),
            "TMPDIR": str(self.folder / "tmp"),
            "CURL_HOME": str(self.folder),
            "COMPOSE_PROJECT_NAME": self.name,
            "NO_PROXY": "localhost,127.0.0.1",  # a system can have a proxy for all addresses
        }
        return kept | own | settings

    def popen(
        self, command: Sequence[str | Path], settings: Mapping[str, str], log: Path | None = None
    ) -> subprocess.Popen[str]:
        """Start a program in the clone, in a session of its own, by which it is found."""
        with log.open("w") if log else nullcontext() as output:
            process = subprocess.Popen(
                command,
                cwd=self.clone,
                env=self.environment(**settings),
                stdin=subprocess.DEVNULL,
                stdout=output or subprocess.PIPE,
                stderr=subprocess.STDOUT if output else subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def start(self, *command: str | Path, **settings: str) -> subprocess.Popen[str]:
        return self.popen(command, settings)

    def run(self, *command: str | Path, **settings: str) -> subprocess.CompletedProcess[str]:
        """Run a program in the clone; return its exit status and what it printed."""
        process = self.start(*command, **settings)
        output, errors = process.communicate(timeout=300)
        return subprocess.CompletedProcess(list(command), process.returncode, output, errors)

    def make(self, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
        return self.run("make", *arguments, **settings)

    def verify(self, **settings: str) -> subprocess.CompletedProcess[str]:
        return self.run("./verify.sh", **settings)

    def docker(self, *arguments: str) -> str:
        """Return what docker prints; fail with its errors when it fails."""
        result = self.run("docker", *arguments)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def serve(self, *part: str, **settings: str) -> subprocess.Popen[str]:
        """Start the stand-in for tier 01, or a part of it; its log is `self.log`."""
        public, admin, mcp = self.ports
        defaults = {
            "AUTHPLANE_SERVER_ISSUER": self.issuer,
            "AUTHPLANE_ISSUER": self.issuer,
            "AUTHPLANE_ADMIN_API_KEY": ADMIN_KEY,
            "AUTHPLANE_DEV_MODE": "true",
            "RESOURCE_URI": self.mcp_url,
            "AUTHPLANE_SERVER_ADDRESS": f":{public}",
            "AUTHPLANE_ADMIN_ADDRESS": f":{admin}",
            "MCP_ADDRESS": f":{mcp}",
        }
        program = [PYTHON, "tests/tier01/serve.py", *part]
        return self.popen(program, defaults | settings, self.log)

    def processes(self) -> list[psutil.Process]:
        """Return the processes that were started here, and theirs, and have not ended."""
        sessions = {process.pid for process in self.started}
        found: list[psutil.Process] = []
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                is_ours = os.getsid(process.pid) in sessions
                if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def docker_objects(self) -> dict[str, list[str]]:
        """Return the containers, networks, volumes and images that are named after the sandbox."""
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

    def left(self) -> list[object]:
        """Return what is left of what was started: processes, files, Docker objects."""
        files = [*(self.folder / "tmp").iterdir(), *self.clone.glob(".started*")]
        return [*self.processes(), *files, *chain(*self.docker_objects().values())]

    def close(self) -> None:
        """End every process, and remove every Docker object, that was started here."""
        processes = self.processes()
        for process in processes:
            with suppress(psutil.Error):
                process.kill()
        psutil.wait_procs(processes, timeout=10)
        for reservation in self.reservations:
            reservation.close()
        for process in self.started:
            process.communicate()  # closes its pipes
        for command, names in self.docker_objects().items():
            for name in names:
                self.docker(*command.split(), "--force", name)


def reserve_port() -> socket.socket:
    """Return a UDP socket whose port number is free for TCP, and nobody else's while it is open.

    It is below the ports that the system gives to others.
    """
    while True:
        port = random.randrange(20_000, 32_000)  # noqa: S311
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
