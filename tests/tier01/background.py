"""Run serve.py in the background: `start` returns when it is ready, `stop` when it has ended.

`start` locks the log file. serve.py inherits the lock with its standard output, and keeps it until
it ends, even if it is killed. So a file without a lock is stale, and harmless.
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

LOG = Path(__file__).parents[2] / ".stand-in.log"
PASSED_ON = (
    "AUTHPLANE_ADMIN_API_KEY",
    "RESOURCE_URI",
    "MCP_SERVER_NAME",
    "TOKEN_SECONDS",
    "HOME",  # FastMCP looks for it
    "LD_LIBRARY_PATH",  # of a Python that isn't the system's
)


def environment() -> dict[str, str]:
    """Return the environment of serve.py: no proxy, because all calls are on this host."""
    return {name: os.environ[name] for name in PASSED_ON if name in os.environ} | {
        "AUTHPLANE_SERVER_ISSUER": os.environ["AUTHSERVER_URL"],
        "AUTHPLANE_SERVER_ADDRESS": address("AUTHSERVER_URL"),
        "AUTHPLANE_ADMIN_ADDRESS": address("ADMIN_URL"),
        "AUTHPLANE_ISSUER": os.environ["AUTHSERVER_URL"],
        "AUTHPLANE_DEV_MODE": "true",
        "MCP_ADDRESS": address("MCP_URL"),
        "NO_PROXY": "*",
    }


def address(name: str) -> str:
    """Return the address on which the server of this URL listens. Exit if the port is invalid."""
    url = os.environ[name]
    try:
        return f":{urlsplit(url).port or 80}"
    except ValueError as error:
        sys.exit(f"{name}={url}: {error}")


def try_lock(log: IO[str]) -> bool:
    """Take the lock until the log is closed. Return False if another process has it."""
    try:
        flock(log, LOCK_EX | LOCK_NB)
    except BlockingIOError:
        return False
    return True


def read_log() -> str:
    return LOG.read_text(errors="replace")  # a setting can have any bytes


def start() -> None:
    """Start serve.py unless it is running, and return when it is ready. Exit if it ends.

    If this is interrupted, the caller has to call `stop`.
    """
    server_environment = environment()
    with LOG.open("a") as log:
        if try_lock(log):
            if not os.path.samestat(os.fstat(log.fileno()), LOG.stat()):
                raise FileNotFoundError(LOG)  # stop has removed the file that is locked here
            log.truncate(0)
            print("started by", os.getppid(), file=log, flush=True)  # cleanup.sh reads it
            subprocess.Popen(
                [sys.executable, Path(__file__).with_name("serve.py")],
                env=server_environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
    ended = False
    while not ended and "\nready\n" not in read_log():
        time.sleep(0.05)
        with LOG.open() as log:
            ended = try_lock(log)
    if ended:
        lines = re.findall(r"\w.*", read_log())  # a traceback can end with dashes
        sys.exit(f"tier 01 did not start: {lines[-1]}")


def stop() -> None:
    """Kill serve.py, and return when it has ended."""
    with suppress(FileNotFoundError), LOG.open() as log:
        while not try_lock(log):
            if started := re.search(r"(?m)^process (\d+)$", read_log()):
                with suppress(ProcessLookupError):
                    os.kill(int(started[1]), signal.SIGKILL)  # it has nothing to save
            time.sleep(0.05)
        LOG.unlink()


if __name__ == "__main__":
    try:
        if sys.argv[1] == "start":
            start()
        else:
            stop()
    except FileNotFoundError:  # LOG
        sys.exit("tier 01 was stopped while it was starting")
