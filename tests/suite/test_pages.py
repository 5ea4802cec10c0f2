"""The README: every command is run; what comes from files or from the servers is compared."""

import json
import re
from base64 import urlsafe_b64decode

import pytest

from authserver_client import Credentials, status_of
from conftest import NewSandbox
from sandbox import PYTHON, ROOT, Sandbox, wait_until

README = (ROOT / "README.md").read_text()


def section(heading: str) -> str:
    return README.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", text)


def rewritten(text: str, sandbox: Sandbox) -> str:
    """Return text of the README with the ports of a sandbox."""
    for default, own in zip((9000, 9001, 8080), sandbox.ports, strict=True):
        text = text.replace(f"localhost:{default}", f"localhost:{own}")
    return text


def assert_shown(printed: str, shown: str) -> None:
    """Check the end of what was printed; in what is shown, … stands for any text on the line."""
    lines = printed.splitlines()[-len(shown.splitlines()) :]
    pattern = re.escape(shown.strip("\n")).replace("…", ".*")
    assert re.fullmatch(pattern, "\n".join(lines)), printed


def test_blocks_and_counts(sandbox: Sandbox) -> None:
    counts, diff = sandbox.make("-s", "diff").stdout.split("\n", 1)
    assert f"\n{counts}\n" in README
    assert blocks(README, "diff") == [diff]
    assert blocks(README, "python") == [(ROOT / "tests/examples/relay_server.py").read_text()]


@pytest.mark.parametrize("name", ["README.md", "tests/README.md"])
def test_links_resolve(name: str) -> None:
    links = re.findall(r"\]\((?!https://)([^)#]*)#?([^)]*)\)", (ROOT / name).read_text())
    assert len(links) > 3
    for file, anchor in links:
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text().lower())
            anchors = {re.sub("[^a-z0-9 -]", "", each).replace(" ", "-") for each in headings}
            assert anchor in anchors


def test_token(servers: Sandbox, credentials: Credentials) -> None:
    form = {"scope": "mcp:echo", "resource": servers.mcp_url}
    token = servers.authserver.token(credentials, **form)
    header, claims = (json.loads(urlsafe_b64decode(f"{x}==")) for x in token.split(".")[:2])
    [text] = blocks(rewritten(README, servers), "json")
    shown_header, shown_claims = map(json.loads, text.split("\n", 1))
    assert header == shown_header | {"kid": header["kid"]}
    assert claims["exp"] - claims["iat"] == shown_claims["exp"] - shown_claims["iat"]
    varying = {name: claims[name] for name in ("sub", "client_id", "jti", "iat", "nbf", "exp")}
    assert claims == shown_claims | varying


def test_run_it(sandbox: Sandbox) -> None:
    """All but the slow installation, which the first line is about."""
    (sandbox.clone / ".venv").unlink()
    [verify, _] = blocks(section("Run it"), "sh")
    [shown] = blocks(section("Run it"), "text")
    result = sandbox.run("bash", "-c", verify)
    assert result.stderr == ""
    assert shown.splitlines()[0] + "\n" + result.stdout == rewritten(shown, sandbox)
    assert sandbox.make("clean").returncode == 0
    assert sandbox.left() == []


def test_in_your_server(
    new_sandbox: NewSandbox, servers: Sandbox, agent_settings: dict[str, str]
) -> None:
    """What to install is resolved only; the server is pasted from the page."""
    sandbox = new_sandbox("fastmcp")
    sandbox.make_tool("python", f'exec {PYTHON} "$@"')
    sandbox.make_tool("pip", 'exec python -m pip "$@" --dry-run')
    install, commands = blocks(section("In your server"), "sh")
    [program] = blocks(section("In your server"), "python")
    serve, call_tool = commands.replace("8081", str(sandbox.ports[2])).splitlines()
    settings = agent_settings | {
        "OTHER_MCP_URL": servers.mcp_url,
        "OTHER_RESOURCE_URI": servers.mcp_url,
        "PORT": str(sandbox.ports[2]),
    }
    assert sandbox.run("bash", "-c", install).returncode == 0
    (sandbox.clone / "relay_server.py").write_text(program)
    sandbox.start("bash", "-c", f"exec {serve} >{sandbox.log} 2>&1", **settings)
    wait_until(lambda: status_of(sandbox.mcp_url), f"the server, {sandbox.log}")
    assert "hello" in sandbox.run("bash", "-c", call_tool).stdout


def test_step_by_step(sandbox: Sandbox) -> None:
    """In one shell; each block prints what its comments show."""
    steps = blocks(rewritten(section("Step by step"), sandbox), "sh")
    script = "echo --- end of block ---\n".join(steps)
    result = sandbox.run("bash", "-ec", script)
    assert result.returncode == 0, result
    for printed, step in zip(result.stdout.split("--- end of block ---\n"), steps, strict=True):
        shown = "\n".join(re.findall("(?m)^# (.*)$", step))
        assert_shown(printed, shown)
    assert sandbox.left() == []
