"""The two pages, README.md and tests/examples/README.md, as tests compare and run them."""

import re

from sandbox import ROOT, Sandbox

README = (ROOT / "README.md").read_text()
EXAMPLES = (ROOT / "tests/examples/README.md").read_text()


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


def with_ports(text: str, sandbox: Sandbox) -> str:
    """Return text of a page with the ports of a sandbox."""
    for default, own in zip((9000, 9001, 8080), sandbox.ports, strict=True):
        text = text.replace(f"localhost:{default}", f"localhost:{own}")
    return text
