"""The two pages: every command is run; what comes from files or from the servers is compared."""

import json
import re
import signal
import sys
import tomllib
from base64 import urlsafe_b64decode
from textwrap import indent

import psutil
import pytest

from authserver_client import Credentials, status_of
from pages import (
    EXAMPLES,
    README,
    RELAY_SERVER,
    WITHOUT_SDK,
    blocks,
    make_environment,
    section,
    table,
)
from sandbox import PYTHON, ROOT, Sandbox, free_ports, wait_until

END = "--- end of a block ---\n"


def test_blocks_and_counts(sandbox: Sandbox) -> None:
    counts, diff = sandbox.make("-s", "diff").stdout.split("\n", 1)
    assert f"\n{counts}\n" in README
    assert blocks(README, "diff") == [diff]
    at_the_top, program = blocks(README, "python")
    assert program == RELAY_SERVER
    assert indent(at_the_top, "    ") in program
    with_sdk = blocks(section(README, "In your server"), "sh")[0].splitlines()
    [without_sdk] = blocks(section(EXAMPLES, "Without the SDK"), "sh")
    venv, pip, other_url, start = without_sdk.splitlines()
    assert [venv, start] == [with_sdk[0], with_sdk[3]]
    assert with_sdk[1].startswith(pip.split('"')[0])
    assert with_sdk[2].startswith(other_url)
    assert blocks(section(EXAMPLES, "Without the SDK"), "python") == [WITHOUT_SDK]


def test_packages() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = [re.sub("(?=>)", " ", each) for each in project["dependencies"]]
    assert " and ".join(packages) in README


@pytest.mark.parametrize("name", ["README.md", "tests/README.md", "tests/examples/README.md"])
def test_links_resolve(name: str) -> None:
    links = re.findall(r"\]\((?!https://)([^)#]*)#?([^)]*)\)", (ROOT / name).read_text())
    assert len(links) > 1
    for file, anchor in links:
        target = (ROOT / name).parent / file if file else ROOT / name
        assert target.exists(), file
        if anchor:
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text().lower())
            anchors = {re.sub("[^a-z0-9 -]", "", each).replace(" ", "-") for each in headings}
            assert anchor in anchors


def test_token(servers: Sandbox, credentials: Credentials) -> None:
    form = {"scope": "mcp:echo", "resource": servers.mcp_url}
    token = servers.authserver.request_token(credentials, **form).json()["access_token"]
    header, claims = (json.loads(urlsafe_b64decode(f"{x}==")) for x in token.split(".")[:2])
    [text] = blocks(servers.with_ports(README), "json")
    shown_header, shown_claims = map(json.loads, text.split("\n", 1))
    assert header == shown_header | {"kid": header["kid"]}
    assert claims["exp"] - claims["iat"] == shown_claims["exp"] - shown_claims["iat"]
    varying = {name: claims[name] for name in ("sub", "client_id", "jti", "iat", "nbf", "exp")}
    assert claims == shown_claims | varying


def test_run_it(sandbox: Sandbox) -> None:
    """The output is that of the page, without its first two lines, because all is installed."""
    [verify, _] = blocks(section(README, "Run it"), "sh")
    [shown] = blocks(section(README, "Run it"), "text")
    result = sandbox.run("bash", "-c", verify)
    assert result.stderr == ""
    assert result.stdout == sandbox.with_ports(shown).split("\n", 2)[2]
    assert sandbox.make("clean").returncode == 0
    assert sandbox.leftovers() == []


def test_steps_and_server(sandbox: Sandbox) -> None:
    """Run all steps in one shell, and call the tool from a second one. pip installs nothing."""
    steps = blocks(sandbox.with_ports(section(README, "Step by step")), "sh")
    serve, call_tool, clean_up = blocks(section(README, "In your server"), "sh")
    assert serve.startswith(".venv/bin/python -m venv relay\nrelay/bin/pip install ")
    make_environment(sandbox.project / "relay", PYTHON)
    (sandbox.project / "relay_server.py").write_text(blocks(README, "python")[1])
    install_and_serve = serve.split("\n", 1)[1].rstrip("\n") + " || true\n"  # Ctrl-C ends it
    port = str(free_ports()[0])
    script = f"echo {END}".join([*steps, install_and_serve, clean_up])

    shell = sandbox.start("bash", "-ec", script, PORT=port)
    url = sandbox.mcp_url.replace(str(sandbox.ports[2]), port)
    wait_until(lambda: shell.poll() is not None or status_of(url), "the server")
    assert shell.poll() is None, shell.communicate()
    call = sandbox.run("bash", "-c", call_tool.replace("8081", port))
    for process in psutil.Process(shell.pid).children():
        process.send_signal(signal.SIGINT)
    output, errors = shell.communicate(timeout=60)
    assert shell.returncode == 0, errors
    assert "hello" in call.stdout
    for printed, step in zip(output.split(END)[: len(steps)], steps, strict=True):
        assert_shown(printed, step)
    assert sandbox.leftovers() == []
    assert (sandbox.project / "relay_server.py").exists()
    for name in ("admin.header", "client.json", "relay"):
        assert not (sandbox.project / name).exists()


def assert_shown(printed: str, step: str) -> None:
    """Check what a step prints at its end; in its comments, … stands for any text on the line."""
    shown = re.findall("(?m)^# (.*)$", step)
    lines = printed.splitlines()[-len(shown) :] if shown else []
    pattern = re.escape("\n".join(shown)).replace("…", ".*")
    assert re.fullmatch(pattern, "\n".join(lines)), printed


def test_when_the_agent_fails(servers: Sandbox, agent_settings: dict[str, str]) -> None:
    """With a wrong setting, the only line of the agent has the text that the table quotes."""
    other, undeclared = f"{servers.mcp_url}/other", f"{servers.mcp_url}/undeclared"
    servers.authserver.register_resource("other", other, "mcp:echo")
    servers.authserver.register_resource("undeclared", undeclared, "mcp:other")
    https = servers.issuer.replace("http://localhost", "https://127.0.0.1")
    wrong = {
        "KeyError('CLIENT_ID')": {"CLIENT_ID": None},
        "client_id must not be empty": {"CLIENT_ID": ""},
        "Failed to fetch metadata: All connection attempts failed": {
            "AUTHPLANE_ISSUER": "http://localhost:1"
        },
        "ConnectError": {"MCP_URL": "http://localhost:1/mcp"},
        "issuer mismatch": {"AUTHPLANE_ISSUER": servers.issuer.replace("localhost", "127.0.0.1")},
        "URL must use HTTPS": {"AUTHPLANE_DEV_MODE": ""},
        "URL resolves to blocked IP": {"AUTHPLANE_DEV_MODE": "", "AUTHPLANE_ISSUER": https},
        "InvalidClientError": {"CLIENT_SECRET": "wrong"},
        "InvalidTargetError": {"RESOURCE_URI": f"{servers.mcp_url}/"},
        "InvalidScopeError": {"RESOURCE_URI": undeclared},
        'HTTP 401: Bearer error="invalid_token"': {"RESOURCE_URI": other},
        "expected the server": {"MCP_SERVER_NAME": "other-server"},
        "HTTP 307": {"MCP_URL": f"{servers.mcp_url}/"},
        "HTTP 404": {"MCP_URL": servers.mcp_url.replace("/mcp", "/")},
    }
    rows = table(section(README, "When the agent fails"))
    quoted = {text for row in rows for text in re.findall("`([^`]*)`", row[0])}
    assert quoted == {*wrong, "TimeoutError", "ReadTimeout"}  # test_agent has these two
    for text, change in wrong.items():
        changed = agent_settings | change
        settings = {name: value for name, value in changed.items() if value is not None}
        result = servers.run(sys.executable, "agent.py", **settings)
        [error] = result.stderr.splitlines()
        assert text in error
        assert (result.returncode, result.stdout) == (1, "")
