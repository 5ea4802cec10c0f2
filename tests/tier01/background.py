"""Run serve.py in the background: `start` returns when it is ready, `stop` when it has ended.

The file that has its log is locked as long as it runs. So no other process is taken for it, and
one that has ended leaves nothing to clear.
"""

import os
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from fcntl import LOCK_EX, LOCK_NB, flock
from pathlib import Path
from typing import IO
from urllib.parse import urlsplit

LOG = Path(__file__).parents[2] / ".started"


def settings() -> dict[str, str]:
    """Return the environment of serve.py: no proxy, since all calls are on this host."""

    def address(name: str) -> str:
        return f":{urlsplit(os.environ[name]).port or 80}"

    own = ("AUTHPLANE_ADMIN_API_KEY", "RESOURCE_URI", "MCP_SERVER_NAME", "TOKEN_SECONDS")
    return {name: os.environ[name] for name in own if name in os.environ} | {
        "AUTHPLANE_SERVER_ISSUER": os.environ["AUTHSERVER_URL"],
        "AUTHPLANE_SERVER_ADDRESS": address("AUTHSERVER_URL"),
        "AUTHPLANE_ADMIN_ADDRESS": address("ADMIN_URL"),
        "AUTHPLANE_ISSUER": os.environ["AUTHSERVER_URL"],
        "AUTHPLANE_DEV_MODE": "true",
        "MCP_ADDRESS": address("MCP_URL"),
        "NO_PROXY": "*",
    }


def is_running(log: IO[str]) -> bool:
    """Return whether serve.py holds the lock. If not, the caller does, until it closes the log."""
    try:
        flock(log, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return True
    return False


def start() -> None:
    """Return when it is ready. If it is interrupted, or fails, nothing of it is left."""
    interrupted: list[int] = []
    signal.signal(signal.SIGINT, lambda number, _: interrupted.append(number))
    with LOG.open("a") as log:
        if not is_running(log):
            log.truncate(0)
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("serve.py")],
                env=settings(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=lambda: print("process", os.getpid(), file=log, flush=True),
            )
    running = True
    while running and not interrupted and LOG.read_text().count(", ready\n") < 2:
        time.sleep(0.05)
        with LOG.open() as log:
            running = is_running(log)
    if interrupted:
        stop()
        sys.exit(130)
    if not running:
        end = LOG.read_text().splitlines()[-1]
        stop()
        sys.exit(f"tier 01 did not start: {end}")


def stop() -> None:
    with suppress(FileNotFoundError), LOG.open("r+") as log:
        if is_running(log):
            [pid] = re.findall(r"(?m)^process (\d+)$", log.read())
            os.kill(int(pid), signal.SIGKILL)  # it has nothing to save
            flock(log, LOCK_EX)  # when it has ended
        LOG.unlink()


if __name__ == "__main__":
    try:
        {"start": start, "stop": stop}[sys.argv[1]]()
    except FileNotFoundError:  # LOG
        sys.exit("tier 01 was stopped while it was starting")
