"""The README: every command is run, every table, number and quoted message is compared."""

import inspect
import json
import os
import re
import socket
import subprocess
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from conftest import (
    CLIENT,
    ENGINE,
    KEY,
    RESOURCE,
    ROOT,
    Result,
    StartFake,
    Tier01,
    http,
    make,
    needs_engine,
    plain_environment,
    run_agent,
    running_tier01,
    settings_for_free_ports,
    start_verify,
)
from test_relay_server import CALLS, TOKEN_REQUESTS

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import AuthplaneClient

pytestmark = pytest.mark.xdist_group("readme")
README = (ROOT / "README.md").read_text()


def rows(heading: str) -> list[list[str]]:
    """Return the cells of the first table below a heading, without its own heading."""
    section = README.split(f"# {heading}\n", 1)[1].split("\n#", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def quoted(cell: str) -> list[str]:
    """Return what stands between backquotes."""
    return re.findall(r"`([^`]+)`", cell)


def pattern(text: str) -> str:
    """Return a regular expression for shown text, in which … stands for anything on the line."""
    return re.escape(text).replace("…", ".*")


# What comes from files is compared with them


def test_diff_and_counts_are_those_of_the_files() -> None:
    counts, diff = make(ROOT, {}, "-s", "diff").stdout.split("\n", 1)
    assert README.splitlines()[2] == counts
    assert f"```diff\n{diff}```" in README


def test_lines_to_look_at_are_in_the_agent() -> None:
    lines = [line.strip() for line in (ROOT / "agent.py").read_text().splitlines()]
    section = README.split("## What to look at\n")[1].split("\n## ")[0]
    shown = re.findall(r"(?m)^\d\. `([^`]+)`", section)
    assert len(shown) == 5
    assert [line for line in shown if line not in lines] == []
    assert [line for line in lines if line in shown] == shown


def test_numbers_are_the_measured_ones() -> None:
    assert CALLS == 100
    assert f"cost **{TOKEN_REQUESTS} token request**" in README
    buffer = inspect.signature(AuthplaneClient.create).parameters["cache_ttl_buffer_seconds"]
    assert f"until {buffer.default:.0f} seconds before it expires" in README.replace("\n", " ")


def test_targets_exist() -> None:
    named = set(re.findall(r"(?m)(?:^|`)make ([a-z]+)(?:$|`)", README))
    targets = set(re.findall(r"(?m)^([a-z]+):", (ROOT / "Makefile").read_text()))
    assert named == targets


def test_links_inside_the_repository_resolve() -> None:
    headings = re.findall(r"(?m)^#+ (.*)$", README)
    anchors = {re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings}
    links = re.findall(r"\]\(([^)]+)\)", README)
    assert len(links) >= 3
    for link in links:
        assert link[1:] in anchors if link.startswith("#") else (ROOT / link).exists(), link
    for reference in set(re.findall(r"\[([^]]+)\](?![(:])", README)) - {"REDACTED"}:
        if f"[{reference}]" not in "".join(re.findall(r"`[^`]*`|(?s:```.*?```)", README)):
            assert f"\n[{reference}]: https://" in README


def test_settings_are_those_that_are_read() -> None:
    files = {
        name: (ROOT / name).read_text()
        for name in ("agent.py", "verify.sh", "tests/settings.sh", "tests/tier01/tier01.sh")
    }
    called = r"(?m)^setting ([A-Z0-9_]+) (\S+)$"
    both, verify, run = (
        dict(re.findall(called, files[name]))
        for name in ("tests/settings.sh", "verify.sh", "tests/tier01/tier01.sh")
    )
    compose = "".join(path.read_text() for path in ROOT.glob("**/docker-compose.yml"))
    composed = dict(re.findall(r"\$\{([A-Z0-9_]+):-([^}]*)\}", compose))
    internal = re.findall(
        r"([A-Z_]+)=(?:\$\(port|\$\{RESOURCE_URI%)", files["tests/tier01/tier01.sh"]
    )
    for name in internal:
        composed.pop(name, None)
    [required] = re.findall(r"REQUIRED = \[(.*)\]", files["agent.py"])
    agent = {*re.findall(r'"([A-Z_]+)"', required), "MCP_SERVER_NAME", "AUTHPLANE_DEV_MODE"}
    assert 'environ.get("MCP_SERVER_NAME") or "demo-server"' in files["agent.py"]
    readers = {"agent": agent, "verify": both | verify, "run": both | run, "compose": composed}
    defaults = composed | both | verify | run
    example = dict(
        re.findall(r"(?m)^(?:# )?([A-Z0-9_]+)=(.*)$", (ROOT / ".env.example").read_text())
    )
    table = {quoted(row[0])[0]: row for row in rows("Settings")}
    assert table.keys() == set().union(*readers.values()) == example.keys()
    for name, (_, read_by, default, _) in table.items():
        assert read_by.split(", ") == [who for who in readers if name in readers[who]], name
        assert default.strip("`") == defaults.get(name, "").strip("'"), name
        if default:
            assert example[name] == default.strip("`"), name
            assert composed.get(name, example[name]) == example[name]


def test_sequence_is_that_of_a_real_run(own_tier01: Tier01, own_agent: dict[str, str]) -> None:
    diagram = re.findall(r"agent->>(as|mcp): ([A-Z]+ /[^ \n]+)", README)
    before = {log: len(log.read_text()) for log in own_tier01.logs.glob("*.log")}
    assert run_agent(own_agent).returncode == 0
    for server, name in (("as", "authserver.log"), ("mcp", "mcp_server.log")):
        log = own_tier01.logs / name
        requests = re.findall(r'"([A-Z]+ \S+) HTTP/1.1" 200', log.read_text()[before[log] :])
        assert requests == [request for who, request in diagram if who == server]
    assert [who for who, _ in diagram] == ["as"] * 3 + ["mcp"] * 2


# Every command is run


def blocks() -> list[tuple[str, str]]:
    """Return each block of commands with what it is shown to print, or ''."""
    found = re.findall(r"(?s)```sh\n(.*?)```\n(?:\n```text\n(.*?)```)?", README)
    assert len(found) == README.count("```sh\n")
    return found


@pytest.fixture
def reader(checkout: Path, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The settings of a reader who has uv, and ports and image names of its own."""
    name = f"readme-{uuid.uuid4().hex[:8]}"
    settings = settings_for_free_ports() | {
        "TIER01_NETWORK": f"{name}_default",
        "COMPOSE_PROJECT_NAME": f"{name}-agent",
        "PATH": f"{ROOT}/tests/.venv/bin:{os.environ['PATH']}",
    }
    settings["AUTHPLANE_ADMIN_API_KEY"] = "dev-admin-key-change-me"
    yield settings
    make(checkout, settings, "clean")
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True)


def test_commands_print_what_is_shown(checkout: Path, reader: dict[str, str]) -> None:
    """In order, in one shell, in a clean clone; ports and the name of the image are the test's."""
    own = {
        "localhost:9000": "ISSUER_URL",
        "localhost:9001": "ADMIN_URL",
        "localhost:8080": "MCP_URL",
    }
    ports = {shown: re.findall(r"localhost:\d+", reader[name])[0] for shown, name in own.items()}
    ports["my-authserver"] = reader["TIER01_NETWORK"].removesuffix("_default")
    script = "set -e\n"
    shown: list[str] = []
    for commands, output in blocks():
        needs_engine = "docker build" in commands
        if needs_engine and not ENGINE:
            assert "CI" not in os.environ
            commands = "make clean\n"
        away = "unset DOCKER_HOST" if needs_engine else "export DOCKER_HOST=unix:///nowhere"
        script += f"{away}\n{commands}echo '--- end of block'\n"
        shown.append(output)
    for text, real in ports.items():
        script = script.replace(text, real)
        shown = [output.replace(text, real) for output in shown]
    result = subprocess.run(
        ["bash", "-c", script],
        cwd=checkout,
        env=plain_environment(**reader),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert (result.returncode, result.stderr) == (0, "")
    printed = result.stdout.split("--- end of block\n")
    assert len(printed) == len(shown) + 1
    for real, output in zip(printed, shown, strict=False):
        if output:
            assert re.fullmatch(pattern(output), real), real
        assert "✗" not in real
    assert not (checkout / ".venv").exists()
    assert not (checkout / "client.json").exists()


# Every row of the troubleshooting table is provoked


@pytest.fixture(scope="module")
def own_tier01(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tier01]:
    """A tier 01 with a second resource."""
    with running_tier01(tmp_path_factory.mktemp("readme")) as running:
        running.admin("POST", "resources", json=RESOURCE | {"uri": running.mcp_url})
        other = RESOURCE | {"slug": "other", "uri": "http://other/mcp"}
        running.admin("POST", "resources", json=other)
        yield running


@pytest.fixture
def own_agent(own_tier01: Tier01) -> dict[str, str]:
    client = own_tier01.admin("POST", "clients", json=CLIENT).json()
    return {
        "AUTHPLANE_ISSUER": own_tier01.issuer,
        "CLIENT_ID": client["client_id"],
        "CLIENT_SECRET": client["client_secret"],
        "RESOURCE_URI": own_tier01.mcp_url,
        "MCP_URL": own_tier01.mcp_url,
        "AUTHPLANE_DEV_MODE": "true",
    }


AGENT: dict[str, Callable[[dict[str, str]], dict[str, str]]] = {
    "agent: settings: ": lambda right: dict.fromkeys(right, ""),
    "Failed to fetch metadata: All": lambda _: {"AUTHPLANE_ISSUER": "http://localhost:1"},
    "URL must use HTTPS": lambda _: {"AUTHPLANE_DEV_MODE": ""},
    "AS metadata issuer mismatch": lambda right: {
        "AUTHPLANE_ISSUER": right["AUTHPLANE_ISSUER"].replace("localhost", "127.0.0.1")
    },
    "client authentication failed": lambda _: {"CLIENT_SECRET": "wrong"},
    "is not a registered resource": lambda right: {"RESOURCE_URI": right["RESOURCE_URI"] + "/"},
    "401 Unauthorized": lambda _: {"RESOURCE_URI": "http://other/mcp"},
    "307 Temporary Redirect": lambda right: {"MCP_URL": right["MCP_URL"] + "/"},
}
VERIFY: dict[str, dict[str, str]] = {
    "verify.sh: discovery: expected": {"ISSUER_URL": "http://localhost:1"},
    "AUTHPLANE_ADMIN_API_KEY is not": {"AUTHPLANE_ADMIN_API_KEY": "wrong"},
    "resource: registered: expected": {"RESOURCE_URI": "http://another/mcp"},
}
IN_CONTAINERS: dict[str, dict[str, str]] = {
    "there is no Docker network": {"TIER01": "docker", "TIER01_NETWORK": "not-there"},
    "the agent's image is missing": {
        "TIER01": "docker",
        "TIER01_NETWORK": "bridge",
        "COMPOSE_PROJECT_NAME": "not-built",
    },
}
OTHERWISE = {
    "the requested scope exceeds",
    "421 Misdirected Request",
    "no result.serverInfo.name",
    "can't listen on",
    "make: no Python",
}


def message(beginning: str) -> str:
    """Return the message that the troubleshooting table quotes."""
    quotes = [quoted(row[0])[0] for row in rows("Troubleshooting")]
    [found] = [quote for quote in quotes if quote.startswith(beginning)]
    return found


def test_every_symptom_is_provoked() -> None:
    known = {*AGENT, *VERIFY, *IN_CONTAINERS, *OTHERWISE}
    assert {message(beginning) for beginning in known} == {
        quoted(row[0])[0] for row in rows("Troubleshooting")
    }
    assert len(known) == len(rows("Troubleshooting"))


@pytest.mark.parametrize("beginning", AGENT)
def test_agent_says_it(own_agent: dict[str, str], beginning: str) -> None:
    result = run_agent(own_agent | AGENT[beginning](own_agent))
    assert re.search(pattern(message(beginning)), result.stderr), result.stderr


def verify_errors(place: Path, settings: dict[str, str]) -> str:
    with start_verify(place, settings) as run:
        return run.communicate(timeout=60)[1]


@pytest.mark.parametrize("beginning", VERIFY)
def test_verify_says_it(own_tier01: Tier01, prepared: Path, beginning: str) -> None:
    errors = verify_errors(prepared, own_tier01.settings | VERIFY[beginning])
    assert re.search(pattern(message(beginning)), errors), errors


@needs_engine
@pytest.mark.parametrize("beginning", IN_CONTAINERS)
def test_verify_in_containers_says_it(own_tier01: Tier01, prepared: Path, beginning: str) -> None:
    errors = verify_errors(prepared, own_tier01.settings | IN_CONTAINERS[beginning])
    assert re.search(pattern(message(beginning)), errors), errors


def test_scope_beyond_the_registered_one(own_tier01: Tier01, own_agent: dict[str, str]) -> None:
    client = own_tier01.admin("POST", "clients", json=CLIENT | {"scope": "mcp:else"}).json()
    ids = {"CLIENT_ID": client["client_id"], "CLIENT_SECRET": client["client_secret"]}
    errors = run_agent(own_agent | ids).stderr
    assert re.search(pattern(message("the requested scope exceeds")), errors), errors


@pytest.mark.parametrize(
    ("beginning", "answer"),
    [
        ("421 Misdirected Request", http("421 Misdirected Request")),
        (
            "no result.serverInfo.name",
            http("200 OK", json.dumps({"id": 1, "result": {"serverInfo": {"name": "other"}}})),
        ),
    ],
)
def test_other_servers(
    fake: StartFake, own_agent: dict[str, str], beginning: str, answer: bytes
) -> None:
    errors = run_agent(own_agent | {"MCP_URL": fake(lambda _: answer).url}).stderr
    assert re.search(pattern(message(beginning)), errors), errors


def errors_of(result: Result) -> str:
    assert result.returncode == 2
    return result.stderr


def test_taken_port(prepared: Path) -> None:
    settings = settings_for_free_ports() | {"TIER01": "native", "AUTHPLANE_ADMIN_API_KEY": KEY}
    [port] = re.findall(r":(\d+)", settings["ADMIN_URL"])
    with socket.create_server(("127.0.0.1", int(port))):
        errors = errors_of(make(prepared, settings, "run"))
    assert re.search(pattern(message("can't listen on")), errors), errors


def test_old_python(checkout: Path) -> None:
    errors = errors_of(
        make(checkout, {"TIER01": "native"} | settings_for_free_ports(), "run", "PY=false")
    )
    assert re.search(pattern(message("make: no Python")), errors), errors
