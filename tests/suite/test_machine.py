"""What a test can't do by forgetting something: reach the ports, names and tools of the user."""

import socket
import subprocess

import pytest

from conftest import NewMachine
from machine import DEFAULT_IMAGE, DEFAULT_PORTS, Machine


def test_programs_and_default_ports_need_a_machine() -> None:
    with pytest.raises(RuntimeError, match="Machine"):
        subprocess.run(["true"])
    for port in DEFAULT_PORTS:
        with socket.socket() as client, pytest.raises(RuntimeError, match="Machine"):
            client.connect(("127.0.0.1", port))


def test_clone_has_no_default_and_no_other_tool(machine: Machine) -> None:
    names = {DEFAULT_IMAGE, "01-mcp-server-basic", *(f"localhost:{p}" for p in DEFAULT_PORTS)}
    for path in filter(lambda path: path.is_file(), machine.clone.rglob("*")):
        assert not any(name in path.read_text() for name in names), path
    assert machine.run("bash", "-c", "command -v docker uv ps git").stdout == ""


def test_what_was_started_ends(new_machine: NewMachine) -> None:
    machine = new_machine()
    machine.start("bash", "-c", "nohup sleep 60 & sleep 60")
    while len(machine.processes()) < 3:
        pass
    machine.close()
    assert machine.left() == []
