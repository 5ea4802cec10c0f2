"""Both READMEs: every command is run; what comes from files or from the servers is compared."""

import inspect
import json
import re
from base64 import urlsafe_b64decode

import pytest
from authplane import AuthplaneClient

from authserver_client import Credentials
from conftest import NewSandbox, StartFake, authserver_image
from fakes import http_response
from sandbox import ROOT, Sandbox
from test_agent import call
from test_resource_auth import CALLS

README, HARNESS = ((ROOT / name).read_text() for name in ("README.md", "tests/README.md"))
CONTAINER, CLI, HOST = "docker compose run", "docker exec", ".venv/bin/python"

type Steps = list[tuple[str, str]]  # blocks of commands, with what they are shown to print


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


def rewritten(text: str, sandbox: Sandbox) -> str:
    """Return text of a README with the ports of a sandbox."""
    for default, own in zip((9000, 9001, 8080), sandbox.ports, strict=True):
        text = text.replace(f"localhost:{default}", f"localhost:{own}")
        text = text.replace(f"publish={default}", f"publish={own}")
    return text


# What comes from files is compared with them


def test_blocks_and_counts(sandbox: Sandbox) -> None:
    counts, diff = sandbox.make("-s", "diff").stdout.split("\n", 1)
    assert README.splitlines()[2] == counts
    assert blocks(README, "diff") == [diff]
    assert blocks(README, "python")[0] == (ROOT / "tests/examples/resource_auth.py").read_text()


def test_numbers() -> None:
    text, project = " ".join(README.split()), (ROOT / "pyproject.toml").read_text()
    buffer = inspect.signature(AuthplaneClient.create).parameters["cache_ttl_buffer_seconds"]
    assert f"{CALLS} concurrent calls cost one token request" in text
    assert f"caches it until {buffer.default:.0f} seconds before" in text
    for name, versions in re.findall(r'"(authplane-sdk|httpx)([<>=][<>=.,\d]*)"', project):
        assert f"`{name}{versions}`" in README


def test_help_names_every_target(sandbox: Sandbox) -> None:
    makefile, printed = (ROOT / "Makefile").read_text(), sandbox.make().stdout
    targets = re.findall(r"(?m)^([a-z]+):", makefile)
    assert re.findall(r"(?m)^make (\S+) +\S", printed) == targets
    assert f".PHONY: {' '.join(targets)}\n" in makefile
    assert set(re.findall(r"`make ([a-z]+)", README + HARNESS)) <= set(targets)


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


def test_settings_are_those_that_are_read(sandbox: Sandbox) -> None:
    example = (ROOT / ".env.example").read_text().split("# verify.sh and make")
    agent, harness = (set(re.findall(r"(?m)^(?:# )?([A-Z0-9_]+)=", part)) for part in example)
    section_of_agent = section(README, "Settings of the agent")
    assert {name for name in quoted(section_of_agent) if name.isupper()} == agent
    assert {name for row in rows(HARNESS, "Settings") for name in quoted(row[0])} == harness
    [required] = re.findall(r"REQUIRED = \[(.*)\]", (ROOT / "agent.py").read_text())
    optional = {"MCP_SERVER_NAME", "AUTHPLANE_DEV_MODE"}
    assert set(re.findall(r'"([A-Z_]+)"', required)) == agent - optional
    read = sandbox.run("bash", "-c", ". tests/harness/settings.sh; echo $SETTINGS").stdout.split()
    assert harness == set(read) - agent
    assert set(read) == (agent | harness) - {"CLIENT_ID", "CLIENT_SECRET"}


# What is shown is compared with what the servers send, receive and log


def test_token(servers: Sandbox, credentials: Credentials) -> None:
    form = {"scope": "mcp:echo", "resource": servers.mcp_url}
    token = servers.authserver.token(credentials, **form)
    parts = [urlsafe_b64decode(f"{part}==").decode() for part in token.split(".")[:2]]
    [text] = blocks(rewritten(README, servers), "json")
    shown_header, shown_claims = map(json.loads, text.split("\n", 1))
    header, claims = map(json.loads, parts)
    assert header == shown_header | {"kid": header["kid"]}
    assert claims["exp"] - claims["iat"] == shown_claims["exp"] - shown_claims["iat"]
    varying = {name: claims[name] for name in ("sub", "client_id", "jti", "iat", "nbf", "exp")}
    assert claims == shown_claims | varying


def test_sequence(servers: Sandbox, served: Sandbox) -> None:
    before = len(servers.log.read_text())
    served.verify()
    _, log = servers.log.read_text()[before:].split('"POST /admin/clients HTTP/1.1" 201')
    requests = re.findall(r'"([A-Z]+ \S+) HTTP/1.1" 200', log)
    diagram = re.findall(r"agent->>(?:as|mcp): ([A-Z]+ /[^ \n]+)", README)
    assert requests[: len(diagram)] == diagram


SYMPTOMS: dict[str, dict[str, str]] = {
    "… not set": {"CLIENT_ID": ""},
    "Failed to fetch metadata": {"AUTHPLANE_ISSUER": "http://localhost:1"},
    "URL must use HTTPS": {"AUTHPLANE_DEV_MODE": ""},
    "URL resolves to": {"AUTHPLANE_DEV_MODE": "", "AUTHPLANE_ISSUER": "https://10.0.0.5"},
    "issuer mismatch": {"AUTHPLANE_ISSUER": "http://127.0.0.1:{0}"},
    "(invalid_client)": {"CLIENT_SECRET": "wrong"},
    "(invalid_scope)": {"CLIENT_ID": "{3}", "CLIENT_SECRET": "{4}"},
    "(invalid_target)": {"RESOURCE_URI": "http://localhost:{2}/mcp/"},
    "401 Unauthorized": {"RESOURCE_URI": "http://other/{0}"},
    "307 Temporary Redirect": {"MCP_URL": "http://localhost:{2}/mcp/"},
    "no result.serverInfo.name": {"MCP_URL": "{5}"},
    "Expecting value": {"MCP_URL": "{6}"},
    "HTTP client": {"ALL_PROXY": "socks5://localhost:1"},
}


def test_symptoms_of_the_agent(
    servers: Sandbox, agent_settings: dict[str, str], fake: StartFake
) -> None:
    """Each is provoked, with the real SDK and servers where they can be made to do it."""
    symptoms = [row[0].strip("`") for row in rows(README, "Troubleshooting")]
    symptoms = [symptom for symptom in symptoms if not symptom.startswith("the same, ")]
    port = servers.ports[0]
    servers.authserver.register_resource(f"other-{port}", f"http://other/{port}", "mcp:echo")
    other = fake(lambda _: http_response("200 OK", '{"id": 1, "result": {}}')).url
    html = fake(lambda _: http_response("200 OK", "<html>")).url
    values = [*servers.ports, *servers.authserver.register_client("mcp:other"), other, html]
    for symptom, (beginning, settings) in zip(symptoms, SYMPTOMS.items(), strict=True):
        change = {name: value.format(*values) for name, value in settings.items()}
        failure = call(agent_settings | change).failure or ""
        assert symptom.startswith(beginning)
        assert re.search(pattern(symptom), failure), failure


# Every command is run, as a reader of each machine would


def steps_of(text: str) -> Steps:
    """Return blocks of commands with what they are shown to print, in comments of the block."""
    printed = re.compile("(?m)^# (.*\n)")
    return [(block, "".join(printed.findall(block))) for block in blocks(text, "sh")]


def by_hand() -> Steps:
    return steps_of(section(README, "Step by step"))


def by_hand_in_containers() -> Steps:
    """Return the steps there: another issuer, the CLI second, and the agent in the network."""
    first, (registration, _), cli, host, (container, _), last = by_hand()
    assert CLI in cli[0] and HOST in host[0] and CONTAINER in container
    issuer = (first[0], "http://authserver:9000\n")
    return [issuer, cli, (registration, "409\n"), (container, host[1]), last]


def follow(sandbox: Sandbox, steps: Steps) -> None:
    """Run blocks of commands one after the other in one shell; compare the end of their output."""
    script = "".join(f"{commands}echo '--- end of block'\n" for commands, _ in steps)
    (sandbox.folder / "script").write_text(rewritten(f"set -e\n{script}", sandbox))
    result = sandbox.run("bash", sandbox.folder / "script")
    assert result.returncode == 0, result
    *outputs, last = result.stdout.split("--- end of block\n")
    assert (len(outputs), last) == (len(steps), "")
    for output, (_, expected) in zip(outputs, steps, strict=True):
        lines = output.splitlines(keepends=True)
        end = "".join(lines[len(lines) - expected.count("\n") :])
        assert re.fullmatch(pattern(rewritten(expected, sandbox)), end), result
    assert sandbox.make("clean").returncode == 0
    assert sandbox.left() == []


def test_run_it(new_sandbox: NewSandbox) -> None:
    text = section(README, "Run it")
    [(verify, _), three_steps] = steps_of(text)
    follow(new_sandbox("uv", prepared=False), [(verify, blocks(text, "text")[0]), three_steps])


def test_step_by_step_on_this_host(sandbox: Sandbox) -> None:
    in_docker = re.compile(f"{CLI}|{CONTAINER}")
    follow(sandbox, [step for step in by_hand() if not in_docker.search(step[0])])


def test_step_by_step_with_the_stand_in_in_containers(
    new_sandbox: NewSandbox, engine: Sandbox
) -> None:
    """The stand-in has no CLI: verify.sh registers the resource."""
    sandbox = new_sandbox("docker")
    [(commands, _)] = steps_of(HARNESS.replace("stand-in", f"{sandbox.name}-stand-in"))
    build_and_verify, remove = commands.split("make clean\n")
    issuer, _, *steps = by_hand_in_containers()
    follow(sandbox, [(build_and_verify, "ALL CHECKS PASSED\n"), issuer, *steps, (remove, "")])


def test_step_by_step_with_the_cli(new_sandbox: NewSandbox, engine: Sandbox) -> None:
    sandbox = new_sandbox("docker", image=authserver_image(engine))
    image = sandbox.docker("image", "inspect", authserver_image(engine))
    if "/authserver" not in json.loads(image)[0]["Config"]["Entrypoint"]:
        pytest.skip(
            "the authserver's image is not here: AUTHSERVER_IMAGE is the stand-in, which has no CLI"
        )
    follow(sandbox, by_hand_in_containers())


def test_adapting_it(new_sandbox: NewSandbox) -> None:
    """Just the edits of the list make it an example for another tier 01."""
    sandbox, other = new_sandbox(), new_sandbox()
    adapting = section(README, "Run it").split("**Adapting it.**")[1]
    *code, settings = map(quoted, re.findall("(?m)^- (.*)$", adapting))
    for name, old in code:
        content = (sandbox.clone / name).read_text()
        assert content.count(old) == 1
        new = old.replace("mcp:echo", "my:scope").replace("demo-mcp", "my-mcp")
        (sandbox.clone / name).write_text(content.replace(old, new))
    values = {
        "MCP_SCOPE": "my:scope",
        "RESOURCE_URI": other.mcp_url,
        "MCP_URL": other.mcp_url,
        "MCP_SERVER_NAME": "my-server",
        "AUTHSERVER_URL": other.issuer,
        "ADMIN_URL": other.authserver.admin_url,
    }
    assert settings[1:] == list(values)
    (sandbox.clone / ".env").write_text("".join(f"{n}={v}\n" for n, v in values.items()))
    result = sandbox.make("verify")
    assert result.stdout.endswith("ALL CHECKS PASSED\n"), result
    assert other.authserver.register_resource("my-mcp", "", "my:scope").status_code == 409
