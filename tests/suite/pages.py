"""The two pages and the programs of the second, as tests compare and run them."""

import re
from pathlib import Path

from sandbox import ROOT

README = (ROOT / "README.md").read_text()
EXAMPLES = (ROOT / "tests/examples/README.md").read_text()
RELAY_SERVER = (ROOT / "tests/examples/relay_server.py").read_text()
WITHOUT_SDK = (ROOT / "tests/examples/relay_without_sdk.py").read_text()


def section(page: str, heading: str) -> str:
    """Return the text below a heading, up to the next one."""
    [text] = re.findall(rf"(?ms)^## {heading}\n(.*?)(?=^## |\Z)", page)
    return text


def blocks(text: str, language: str) -> list[str]:
    """Return what stands in the fenced blocks of a language."""
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def table(text: str) -> list[list[str]]:
    """Return the cells of the only table, without its head."""
    rows = re.findall(r"(?m)^\| (.*) \|$", text)
    return [row.split(" | ") for row in rows[1:]]


def make_environment(folder: Path, python: Path) -> None:
    """Make what looks like the environment of the pages, and has the packages of this Python."""
    (folder / "bin").mkdir(parents=True)
    for name, command in {
        "python": f'{python} "$@"',
        "pip": f'{python} -m pip "$@" --dry-run',
        "fastmcp": f'{python} -m fastmcp.cli "$@"',
    }.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\nexec {command}\n")
        (folder / "bin" / name).chmod(0o755)
