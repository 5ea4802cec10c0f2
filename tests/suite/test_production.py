"""Production: https, development mode off, a private address, and an unknown certificate."""

import sys
from pathlib import Path

from sandbox import NewSandbox, skip_or_fail

# when unshare ends, so does all that was started there
NAMESPACE = ["unshare", "--map-root-user", "--net", "--pid", "--kill-child", "--mount-proc"]


def test_production(new_sandbox: NewSandbox) -> None:
    """Run production.py in a network of its own, where this machine has a private address."""
    sandbox = new_sandbox("unshare")
    if sys.platform != "linux" or sandbox.run(*NAMESPACE, "sh", "-c", "true").returncode != 0:
        skip_or_fail("there is no network namespace")
    program = Path(__file__).with_name("production.py")
    result = sandbox.run(*NAMESPACE, sys.executable, program, sandbox.folder)
    assert result.returncode == 0, result.stderr
