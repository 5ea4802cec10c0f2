"""Both READMEs: every command is run, every table, number and quoted message is compared."""

import inspect
import json
import re
import warnings
from base64 import urlsafe_b64decode

import pytest

from conftest import NewMachine, StartFake, need_image
from fakes import http
from machine import ROOT, Machine
from test_agent import start_runner
from test_resource_auth import CALLS

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import AuthplaneClient

README, HARNESS = ((ROOT / name).read_text() for name in ("README.md", "tests/README.md"))
SCRIPTS = [ROOT / "verify.sh", *(ROOT / "tests/harness").glob("*.sh")]
CONTAINER, CLI, HOST = "docker compose run", "docker exec", ".venv/bin/python"


def section(text: str, heading: str) -> str:
    return text.split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]


def rows(text: str, heading: str) -> list[list[str]]:
    """Return the cells of the table in a section, without the heading of the table."""
    lines = re.findall(r"(?m)^\| (.*) \|$", section(text, heading))
    return [line.split(" | ") for line in lines[1:]]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"(?s)```{language}\n(.*?)```", text)


def quoted(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


def pattern(shown: str) -> str:
    """Return a regular expression for what is shown, in which … stands for anything on the line."""
    return re.escape(shown).replace("…", ".*")


# What comes from files is compared with them


def test_blocks_and_counts(machine: Machine) -> None:
    counts, diff = machine.make("-s", "diff").stdout.split("\n", 1)
    assert README.splitlines()[2] == counts
    assert blocks(README, "diff") == [diff]
    assert blocks(README, "python") == [(ROOT / "tests/examples/resource_auth.py").read_text()]


def test_numbers() -> None:
    text, project = " ".join(README.split()), (ROOT / "pyproject.toml").read_text()
    buffer = inspect.signature(AuthplaneClient.create).parameters["cache_ttl_buffer_seconds"]
    assert f"{CALLS} concurrent calls cost 1 token request" in text
    assert f"until {buffer.default:.0f} seconds before it expires" in text
    for name, versions in re.findall(r'"(authplane-sdk|httpx)([<>=.,\d]+)"', project):
        assert f"`{name}{versions}`" in README


def test_pages_are_short() -> None:
    assert len(README.splitlines()) <= 260
    assert len(HARNESS.splitlines()) <= 100
    assert len(blocks(README, "python")[0].splitlines()) <= 25
    for block in blocks(README + HARNESS, r"\w+"):
        assert max(map(len, block.splitlines())) <= 100, block


def test_help_and_pages_name_every_target(machine: Machine) -> None:
    makefile, printed = (ROOT / "Makefile").read_text(), machine.make().stdout
    targets = re.findall(r"(?m)^([a-z]+):", makefile)
    assert re.findall(r"(?m)^make (\S+) +\S", printed) == targets
    assert f".PHONY: {' '.join(targets)}\n" in makefile
    assert max(map(len, printed.splitlines())) <= 80
    assert set(re.findall(r"make ([a-z]+)", README + HARNESS)) == set(targets)


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


def test_settings_are_those_that_are_read() -> None:
    example = (ROOT / ".env.example").read_text().split("# verify.sh and make")
    agent, harness = (set(re.findall(r"(?m)^(?:# )?([A-Z0-9_]+)=", part)) for part in example)
    section_of_agent = section(README, "Settings of the agent")
    assert {name for name in quoted(section_of_agent) if name.isupper()} == agent
    assert {name for row in rows(HARNESS, "Settings") for name in quoted(row[0])} == harness
    [required] = re.findall(r"REQUIRED = \[(.*)\]", (ROOT / "agent.py").read_text())
    optional = {"MCP_SERVER_NAME", "AUTHPLANE_DEV_MODE"}
    assert set(re.findall(r'"([A-Z_]+)"', required)) == agent - optional
    scripts = "\n".join(path.read_text() for path in SCRIPTS)
    found = re.findall(r"for name in ([A-Z0-9_ ]+); do setting|\nsetting ([A-Z0-9_]+)", scripts)
    read = {name for names in found for name in " ".join(names).split()}
    assert harness <= read <= harness | agent


# What is shown is compared with what a tier 01 sends, receives and logs


def test_token(tier01: Machine, credentials: tuple[str, str]) -> None:
    token = tier01.token(credentials, scope="mcp:echo", resource=tier01.mcp_url)
    parts = [urlsafe_b64decode(f"{part}==").decode() for part in token.split(".")[:2]]
    [text] = blocks(tier01.rewrite(README), "json")
    shown_header, shown_claims = map(json.loads, text.split("\n", 1))
    header, claims = map(json.loads, parts)
    assert header == shown_header | {"kid": header["kid"]}
    assert claims["exp"] - claims["iat"] == shown_claims["exp"] - shown_claims["iat"]
    varying = {name: claims[name] for name in ("sub", "client_id", "jti", "iat", "nbf", "exp")}
    assert list(claims.items()) == list((shown_claims | varying).items())


def test_sequence(tier01: Machine, beside: Machine) -> None:
    before = len(tier01.log.read_text())
    beside.verify()
    _, log = tier01.log.read_text()[before:].split('"POST /admin/clients HTTP/1.1" 201')
    requests = re.findall(r'"([A-Z]+ \S+) HTTP/1.1" 200', log)
    diagram = re.findall(r"agent->>(?:as|mcp): ([A-Z]+ /[^ \n]+)", README)
    assert requests[: len(diagram)] == diagram


SYMPTOMS: dict[str, dict[str, str]] = {
    "… not set": {"CLIENT_ID": ""},
    "Failed to fetch metadata": {"AUTHPLANE_ISSUER": "http://localhost:1"},
    "URL must use HTTPS": {"AUTHPLANE_DEV_MODE": ""},
    "issuer mismatch": {"AUTHPLANE_ISSUER": "http://127.0.0.1:{0}"},
    "(invalid_client)": {"CLIENT_SECRET": "wrong"},
    "(invalid_scope)": {"CLIENT_ID": "{3}", "CLIENT_SECRET": "{4}"},
    "(invalid_target)": {"RESOURCE_URI": "http://localhost:{2}/mcp/"},
    "401 Unauthorized": {"RESOURCE_URI": "http://other/{0}"},
    "307 Temporary Redirect": {"MCP_URL": "http://localhost:{2}/mcp/"},
    "no result.serverInfo.name": {"MCP_URL": "{5}"},
    "Expecting value": {"MCP_URL": "{6}"},
}


def test_symptoms_of_the_agent(
    tier01: Machine, machine: Machine, agent_settings: dict[str, str], fake: StartFake
) -> None:
    """Each is provoked, with the real SDK and servers where they can be made to do it."""
    symptoms = [quoted(row[0])[0] for row in rows(README, "Troubleshooting")]
    tier01.register_resource("another", f"http://other/{tier01.ports[0]}")
    other = fake(lambda _: http("200 OK", '{"id": 1, "result": {}}')).url
    html = fake(lambda _: http("200 OK", "<html>")).url
    values = [*tier01.ports, *tier01.register_client("mcp:other"), other, html]
    call = start_runner(machine)
    for symptom, (beginning, settings) in zip(symptoms, SYMPTOMS.items(), strict=True):
        change = {name: value.format(*values) for name, value in settings.items()}
        failure = call(agent_settings | change).failure or ""
        assert symptom.startswith(beginning)
        assert re.search(pattern(symptom), failure), failure


def test_symptoms_of_the_harness_stand_in_the_scripts() -> None:
    """The tests of make, verify.sh and containers provoke them."""
    scripts = "\n".join(path.read_text() for path in SCRIPTS)
    scripts = re.sub(r"\$\{[^}]*\}|\$\([^)]*\)+|\$\w+", "…", scripts)
    for symptom, *_ in rows(HARNESS, "Troubleshooting"):
        parts = [part for part in re.split("…|: ", quoted(symptom)[0]) if len(part) > 8]
        assert parts
        for part in parts:
            assert part.removeprefix("make: ").strip() in scripts, part


# Every command is run, as a reader of each machine would

type Steps = list[tuple[str, str]]


def shell_blocks(text: str) -> Steps:
    """Return blocks of commands with what they are shown to print.

    That stands in comments of the block, or in a block of text that follows.
    """
    found = re.findall(r"(?s)```sh\n(.*?)```\n(?:[^\n]+\n```text\n(.*?)```)?", text)
    assert len(found) == text.count("```sh\n")
    comment = re.compile("(?m)^# (.*\n)")
    return [(each, printed or "".join(comment.findall(each))) for each, printed in found]


def by_hand() -> Steps:
    return shell_blocks(section(README, "Step by step"))


def by_hand_in_containers() -> Steps:
    """Return the steps there: another issuer, the CLI second, and the agent in the network."""
    first, (registration, _), cli, host, (container, _), last = by_hand()
    assert CLI in cli[0] and HOST in host[0] and CONTAINER in container
    issuer = (first[0], "http://authserver:9000\n")
    return [issuer, cli, (registration, "409\n"), (container, host[1]), last]


def follow(machine: Machine, steps: Steps) -> None:
    """Run blocks of commands one after the other in one shell, and compare what they print."""
    script = "".join(f"{commands}echo '--- end of block'\n" for commands, _ in steps)
    (machine.folder / "script").write_text(machine.rewrite(f"set -e\n{script}"))
    result = machine.run("bash", machine.folder / "script")
    assert result.returncode == 0, result
    *outputs, last = result.stdout.split("--- end of block\n")
    assert (len(outputs), last) == (len(steps), "")
    for output, (commands, expected) in zip(outputs, steps, strict=True):
        end = output.splitlines(keepends=True)
        if not commands.startswith("cp "):  # elsewhere what make prints is not shown
            end = end[len(end) - expected.count("\n") :]
        assert re.fullmatch(pattern(machine.rewrite(expected)), "".join(end)), result
    assert machine.make("clean").returncode == 0
    assert machine.left() == []


def test_run_it(new_machine: NewMachine) -> None:
    follow(new_machine("uv", prepared=False), shell_blocks(section(README, "Run it")))


@pytest.mark.parametrize("tools", [[], ["docker"]], ids=["no Docker", "Docker without the image"])
def test_step_by_step_on_this_host(
    request: pytest.FixtureRequest, new_machine: NewMachine, tools: list[str]
) -> None:
    if tools:
        request.getfixturevalue("engine")
    in_docker = re.compile(f"{CLI}|{CONTAINER}")
    steps = [step for step in by_hand() if not in_docker.search(step[0])]
    follow(new_machine(*tools), steps)


def test_step_by_step_with_the_stand_in_in_containers(
    new_machine: NewMachine, engine: Machine
) -> None:
    """The stand-in has no CLI: verify.sh registers the resource."""
    machine = new_machine("docker")
    [(commands, _)] = shell_blocks(HARNESS.replace("stand-in", f"{machine.name}-stand-in"))
    build_and_verify, remove = commands.split("make clean\n")
    issuer, _, *steps = by_hand_in_containers()
    follow(machine, [(build_and_verify, "ALL CHECKS PASSED\n"), issuer, *steps, (remove, "")])


def test_step_by_step_with_the_cli(request: pytest.FixtureRequest, new_machine: NewMachine) -> None:
    machine = new_machine("docker", image=need_image(request))
    entry = machine.docker("image", "inspect", "--format", "{{.Config.Entrypoint}}", machine.image)
    if "/authserver" not in entry:
        pytest.skip(f"{machine.image} has no CLI: it is the stand-in")
    follow(machine, by_hand_in_containers())


def test_adapting_it(new_machine: NewMachine) -> None:
    """Just the edits of the list make it an example for another tier 01."""
    machine, other = new_machine(), new_machine()
    code, settings = map(quoted, re.findall("(?m)^- (.*)$", section(README, "In your server")))
    for name, old in zip(code[::2], code[1::2], strict=True):
        content = (machine.clone / name).read_text()
        assert content.count(old) == 1
        new = old.replace("mcp:echo", "my:scope").replace("demo-mcp", "my-mcp")
        (machine.clone / name).write_text(content.replace(old, new))
    values = {
        "RESOURCE_URI": other.mcp_url,
        "MCP_URL": other.mcp_url,
        "MCP_SERVER_NAME": "my-server",
        "AUTHPLANE_ISSUER": other.issuer,
        "ISSUER_URL": other.issuer,
        "ADMIN_URL": other.admin_url,
    }
    assert settings[1:] == list(values)
    env = (machine.clone / ".env.example").read_text()
    for name, value in values.items():
        env = re.sub(f"(?m)^{name}=.*", f"{name}={value}", env)
    (machine.clone / ".env").write_text(env)
    result = machine.make("verify", MCP_SCOPE="my:scope")
    assert f"tier 01: {other.issuer} and {other.mcp_url}, started by make run\n" in result.stdout
    assert "registered           201 my-mcp" in result.stdout
    assert result.stdout.endswith("ALL CHECKS PASSED\n"), result
