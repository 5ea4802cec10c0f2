"""Both READMEs: every command is run, every table, number and quoted message is compared."""

import inspect
import json
import re
import warnings
from base64 import urlsafe_b64decode

import pytest

from conftest import NewMachine, StartFake, need_image
from fakes import http
from machine import ROOT, Machine, status_of, wait_until
from test_agent import Call, start_runner
from test_resource_auth import CALLS

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import AuthplaneClient

README, HARNESS = ((ROOT / name).read_text() for name in ("README.md", "tests/README.md"))
HERE = {"README.md": README, "tests/README.md": HARNESS}


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table in a section, without the heading of the table."""
    section = text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def pattern(shown: str) -> str:
    """Return a regular expression for what is shown, in which … stands for anything on the line."""
    return re.escape(shown).replace("…", ".*")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", text)


# What comes from files is compared with them


def test_diff_and_counts(machine: Machine) -> None:
    counts, diff = machine.make("-s", "diff").stdout.split("\n", 1)
    assert README.splitlines()[2] == counts
    assert blocks(README, "diff") == [diff]


def test_pages_are_short() -> None:
    assert len(README.splitlines()) <= 260
    assert len(HARNESS.splitlines()) <= 100
    for block in re.findall(r"(?s)```\w+\n(.*?)```", README + HARNESS):
        assert max(map(len, block.splitlines())) <= 100, block


def test_auth_class_is_shown_in_full() -> None:
    [shown] = blocks(README, "python")
    assert shown == (ROOT / "tests/examples/resource_auth.py").read_text()
    assert len(shown.splitlines()) <= 25
    assert f"{CALLS} concurrent calls cost 1 token request" in " ".join(README.split())


def test_numbers() -> None:
    buffer = inspect.signature(AuthplaneClient.create).parameters["cache_ttl_buffer_seconds"]
    assert f"until {buffer.default:.0f} seconds before its end" in README
    project = (ROOT / "pyproject.toml").read_text()
    for name, versions in re.findall(r'"(authplane-sdk|httpx)([<>=.,\d]+)"', project):
        assert f"`{name}{versions}`" in README


def test_targets_are_explained() -> None:
    targets = set(re.findall(r"(?m)^([a-z]+):.*##", (ROOT / "Makefile").read_text()))
    named = {target for text in HERE.values() for target in re.findall(r"make ([a-z]+)", text)}
    assert named == targets


def test_links_resolve() -> None:
    for name, text in HERE.items():
        links = re.findall(r"\]\(([^)]+)\)", text)
        assert len(links) > 3
        for link in links:
            file, _, anchor = link.partition("#")
            if link.startswith("https://"):
                continue
            target = (ROOT / name).parent / file if file else ROOT / name
            assert target.exists(), link
            headings = re.findall(r"(?m)^#+ (.*)$", target.read_text()) if anchor else []
            slugs = {
                re.sub(r"[^a-z0-9 -]", "", each.lower()).replace(" ", "-") for each in headings
            }
            assert not anchor or anchor in slugs, link


def test_settings_are_those_that_are_read() -> None:
    example = (ROOT / ".env.example").read_text()
    agent, harness = (
        set(re.findall(r"(?m)^(?:# )?([A-Z0-9_]+)=", part))
        for part in example.split("# verify.sh and make")
    )
    section = README.split("## Settings of the agent\n")[1].split("\n## ")[0]
    assert {name for name in quoted(section) if name.isupper()} == agent
    assert {name for row in rows(HARNESS, "Settings") for name in quoted(row[0])} == harness
    scripts = [ROOT / "verify.sh", *(ROOT / "tests/harness").glob("*.sh")]
    text = "\n".join(path.read_text() for path in scripts)
    read = set(re.findall(r"(?m)^setting ([A-Z0-9_]+)", text))
    for names in re.findall(r"for name in ([A-Z0-9_ ]+); do setting", text):
        read |= set(names.split())
    assert harness <= read <= harness | agent
    required = re.findall(r"REQUIRED = \[(.*)\]", (ROOT / "agent.py").read_text())[0]
    assert set(re.findall(r'"([A-Z_]+)"', required)) == agent - {
        "MCP_SERVER_NAME",
        "AUTHPLANE_DEV_MODE",
    }


def test_token_is_the_one_of_a_real_run(tier01: Machine, credentials: tuple[str, str]) -> None:
    token = tier01.token(credentials, scope="mcp:echo", resource=tier01.mcp_url)
    header, claims = (json.loads(urlsafe_b64decode(part + "==")) for part in token.split(".")[:2])
    text = blocks(README, "json")[0].replace("localhost:9000", tier01.issuer[7:])
    decoder = json.JSONDecoder()
    shown, end = decoder.raw_decode(text)
    assert header == shown | {"kid": header["kid"]}
    shown, _ = decoder.raw_decode(
        text[end:].replace("localhost:8080", tier01.mcp_url[7:-4]).strip()
    )
    assert shown["exp"] - shown["iat"] == claims["exp"] - claims["iat"]
    varying = {name: claims[name] for name in ("sub", "client_id", "jti", "iat", "nbf", "exp")}
    assert claims == shown | varying
    assert list(claims) == list(shown)


def test_sequence_is_that_of_a_real_run(new_machine: NewMachine) -> None:
    machine = new_machine()
    machine.make("run")
    machine.verify()
    log = (machine.clone / ".tier01/log").read_text()
    between = log.split('"POST /admin/clients HTTP/1.1" 201')[1]
    requests = re.findall(r'"([A-Z]+ \S+) HTTP/1.1" 200', between)
    diagram = re.findall(r"agent->>(?:as|mcp): ([A-Z]+ /[^ \n]+)", README)
    assert requests[: len(diagram)] == diagram


# Every command is run, as a reader of each machine would


CONTAINER, CLI, HOST = "docker compose run", "docker exec", ".venv/bin/python"


def section(heading: str) -> str:
    return README.split(f"## {heading}\n")[1].split("\n## ")[0]


def shell_blocks(text: str) -> list[tuple[str, str]]:
    """Return blocks of commands with what they are shown to print.

    That stands in comments of the block, or in a block of text that follows.
    """
    found = re.findall(r"(?s)```sh\n(.*?)```\n(?:[^`\n]*\n```text\n(.*?)```)?", text)
    assert len(found) == text.count("```sh\n")
    comments = ["".join(re.findall(r"(?m)^# (.*\n)", commands)) for commands, _ in found]
    return [(found[n][0], found[n][1] or comments[n]) for n in range(len(found))]


def follow(machine: Machine, shown: list[tuple[str, str]]) -> None:
    """Run blocks of commands one after the other in one shell, and compare what they print."""
    script = "".join(f"{commands}echo '--- end of block'\n" for commands, _ in shown)
    (machine.folder / "script").write_text(machine.rewrite(f"set -e\n{script}"))
    result = machine.run("bash", machine.folder / "script")
    assert result.returncode == 0, result
    *outputs, last = result.stdout.split("--- end of block\n")
    assert (len(outputs), last) == (len(shown), "")
    for real, (commands, expected) in zip(outputs, shown, strict=True):
        end = real.splitlines(keepends=True)
        if not commands.startswith("cp "):  # elsewhere what make prints is not shown
            end = end[len(end) - expected.count("\n") :]
        assert re.fullmatch(pattern(machine.rewrite(expected)), "".join(end)), result
    assert machine.make("clean").returncode == 0
    assert machine.left() == []


def test_run_it(new_machine: NewMachine) -> None:
    follow(new_machine("uv", prepared=False), shell_blocks(section("Run it")))


def test_step_by_step_without_docker(machine: Machine) -> None:
    shown = shell_blocks(section("Step by step"))
    follow(machine, [each for each in shown if CONTAINER not in each[0] and CLI not in each[0]])


def in_containers(shown: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Return the steps of a reader with Docker: another issuer, and the agent in the network."""
    [agent] = [expected for commands, expected in shown if HOST in commands]
    steps = [
        (commands, expected if CONTAINER not in commands else agent) for commands, expected in shown
    ]
    steps[0] = (steps[0][0], "http://authserver:9000\n")
    return [each for each in steps if HOST not in each[0]]


def test_step_by_step_in_containers(new_machine: NewMachine, stand_in: str) -> None:
    shown = in_containers(shell_blocks(section("Step by step")))
    machine = new_machine("docker", image=stand_in)
    follow(machine, [each for each in shown if CLI not in each[0]])


def test_step_by_step_with_the_cli(request: pytest.FixtureRequest, new_machine: NewMachine) -> None:
    """The CLI goes first here, so that the resource is registered when curl comes."""
    machine = new_machine("docker", image=need_image(request))
    if "/authserver" not in machine.docker("image", "inspect", machine.image):
        pytest.skip(f"{machine.image} has no CLI: it is the stand-in")
    first, registration, cli, *rest = in_containers(shell_blocks(section("Step by step")))
    assert CLI in cli[0]
    follow(machine, [first, cli, (registration[0], "409\n"), *rest])


def test_stand_in_in_containers(new_machine: NewMachine, engine: Machine) -> None:
    machine = new_machine("docker")
    [(commands, _)] = shell_blocks(HARNESS)
    commands = commands.replace("stand-in", f"{machine.name}-stand-in")
    result = machine.run("bash", "-c", f"set -e\n{commands}")
    assert "ALL CHECKS PASSED\n" in result.stdout, result
    assert machine.left() == []


def test_adapting_it(new_machine: NewMachine) -> None:
    """Just the edits of the list make it an example for another tier 01."""
    other, machine = new_machine(), new_machine()
    other.serve(MCP_SERVER_NAME="my-server", MCP_SCOPE="my:scope")
    wait_until(lambda: status_of("POST", other.mcp_url) == 401, "the other tier 01")
    [code, settings] = re.findall(r"(?m)^- (.*)$", section("In your server"))
    file, old, second, line = quoted(code)
    for name, text in ((file, old), (second, line)):
        content = (machine.clone / name).read_text()
        assert content.count(text) == 1
        changed = text.replace("mcp:echo", "my:scope").replace("demo-mcp", "my-mcp")
        (machine.clone / name).write_text(content.replace(text, changed))
    values = {
        "RESOURCE_URI": other.mcp_url,
        "MCP_URL": other.mcp_url,
        "MCP_SERVER_NAME": "my-server",
        "AUTHPLANE_ISSUER": other.issuer,
        "ISSUER_URL": other.issuer,
        "ADMIN_URL": other.admin_url,
    }
    assert quoted(settings)[1:] == list(values)
    env = (machine.clone / ".env.example").read_text()
    for name, value in values.items():
        env = re.sub(f"(?m)^{name}=.*", f"{name}={value}", env)
    (machine.clone / ".env").write_text(env)
    result = machine.make("verify")
    assert "registered           201 my-mcp" in result.stdout
    assert result.stdout.endswith("ALL CHECKS PASSED\n"), result


@pytest.fixture
def call(machine: Machine) -> Call:
    return start_runner(machine)


SYMPTOMS: dict[str, dict[str, str]] = {
    "Failed to fetch metadata": {"AUTHPLANE_ISSUER": "http://localhost:1"},
    "URL must use HTTPS": {"AUTHPLANE_DEV_MODE": ""},
    "issuer mismatch": {"AUTHPLANE_ISSUER": "http://127.0.0.1:{0}"},
    "(invalid_client)": {"CLIENT_SECRET": "wrong"},
    "(invalid_scope)": {"CLIENT_ID": "{3}", "CLIENT_SECRET": "{4}"},
    "(invalid_target)": {"RESOURCE_URI": "http://localhost:{2}/mcp/"},
    "401 Unauthorized": {"RESOURCE_URI": "http://other/{0}"},
    "307 Temporary Redirect": {"MCP_URL": "http://localhost:{2}/mcp/"},
    "no result.serverInfo.name": {"MCP_SERVER_NAME": "demo-server", "MCP_URL": "{5}"},
    "Expecting value": {"MCP_URL": "{6}"},
}


def test_symptoms_of_the_agent(
    tier01: Machine, call: Call, agent_settings: dict[str, str], fake: StartFake
) -> None:
    """Each is provoked, with the real SDK and servers where they can be made to do it."""
    symptoms = [quoted(row[0])[0] for row in rows(README, "Troubleshooting")]
    assert len(symptoms) == len(SYMPTOMS)
    tier01.register_resource("other", f"http://other/{tier01.ports[0]}")
    other = fake(lambda _: http("200 OK", '{"id": 1, "result": {}}')).url
    html = fake(lambda _: http("200 OK", "<html>")).url
    values = [*tier01.ports, *tier01.register_client("mcp:other"), other, html]
    for symptom, (beginning, settings) in zip(symptoms, SYMPTOMS.items(), strict=True):
        change = {name: value.format(*values) for name, value in settings.items()}
        failure = call(agent_settings | change).failure or ""
        assert symptom.startswith(beginning)
        assert re.search(pattern(symptom), failure), failure


def test_symptoms_of_the_harness_stand_in_the_scripts() -> None:
    """The tests of make, verify.sh and containers provoke them."""
    paths = [ROOT / "verify.sh", *(ROOT / "tests/harness").glob("*.sh")]
    scripts = "\n".join(path.read_text() for path in paths)
    scripts = re.sub(r"\$\{[^}]*\}|\$\([^)]*\)+|\$\w+", "…", scripts)
    for symptom, *_ in rows(HARNESS, "Troubleshooting"):
        parts = [part for part in re.split("…|: ", quoted(symptom)[0]) if len(part) > 8]
        assert parts
        for part in parts:
            assert part.removeprefix("make: ").strip() in scripts, part
