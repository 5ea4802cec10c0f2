"""Production: https, development mode off, and the SDK's guards on."""

import os
import sys

import pytest

from conftest import NewMachine
from machine import ROOT

NAMESPACES = ["--net", "--mount", *([] if os.geteuid() == 0 else ["--user", "--map-root-user"])]


def skip_or_fail_in_ci(reason: str) -> None:
    (pytest.fail if os.environ.get("CI") else pytest.skip)(f"no network namespace: {reason}")


def test_production(new_machine: NewMachine) -> None:
    """Run production.py in a network namespace, with a hosts file that it writes itself."""
    if sys.platform != "linux":
        skip_or_fail_in_ci(f"this is {sys.platform}")
    machine = new_machine("git", "mount", "unshare")
    (hosts := machine.folder / "hosts").touch()
    tried = machine.run("unshare", *NAMESPACES, "mount", "--bind", hosts, "/etc/hosts")
    if tried.returncode != 0:
        skip_or_fail_in_ci(tried.stderr.strip())
    mount = ["sh", "-c", 'mount --bind "$3" /etc/hosts && exec "$@"', "sh"]
    program = [sys.executable, ROOT / "tests/suite/production.py", hosts]
    result = machine.run("unshare", *NAMESPACES, *mount, *program)
    assert result.returncode == 0, result.stderr
