"""verify.sh: it passes only for servers as they should be, and leaves nothing."""

import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable

import pytest

from authserver_client import ADMIN_KEY
from conftest import StartFake
from fakes import Change, Handler, Request, Response, http_response, in_front_of, replacing, when
from sandbox import ROOT, Sandbox, wait_until

PATHS = {"AUTHSERVER_URL": "", "ADMIN_URL": "", "MCP_URL": "/mcp"}


def masked(output: str) -> str:
    """Return the output with the ports of this run replaced."""
    return re.sub(r"localhost:\d+", "localhost:PORT", output)


TRANSCRIPT = (ROOT / "README.md").read_text().split("```text\n")[1].split("```")[0]
# what verify.sh prints if the resource is registered already
CHECKS = masked(TRANSCRIPT[TRANSCRIPT.index("✓") :]).replace(" 201\n", " 409\n", 1)


def behind_fakes(
    beside_servers: Sandbox, start_fake: StartFake, changes: dict[str, Change]
) -> dict[str, str]:
    """Return the settings for its servers behind fakes with these changes."""
    settings: dict[str, str] = {}
    for (name, path), port in zip(PATHS.items(), beside_servers.ports, strict=True):
        if name in changes:
            settings[name] = start_fake(in_front_of(port, changes[name])).url + path
    return settings


def test_checks_everything_and_leaves_nothing(beside_servers: Sandbox) -> None:
    """Two runs at once do not disturb each other."""
    before = beside_servers.authserver.clients()
    runs = [beside_servers.start("bash", "verify.sh") for _ in range(2)]
    for run in runs:
        output, errors = run.communicate(timeout=60)
        assert (masked(output), errors, run.returncode) == (CHECKS, "", 0)
    assert beside_servers.authserver.clients() == before
    assert beside_servers.left() == []


def test_holds_in_any_environment(beside_servers: Sandbox, sandbox: Sandbox) -> None:
    """Proxies, missing certificates, a missing locale, and what changes curl and cd."""
    (beside_servers.folder / ".curlrc").write_text("url = http://localhost:1\n")
    proxies = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
    settings = dict.fromkeys(proxies, "socks5://localhost:1")
    settings |= {"NO_PROXY": "b51a:cc66:f0::/48", "LC_ALL": "not_installed"}
    settings |= {"SSL_CERT_FILE": "/nowhere", "CDPATH": str(sandbox.folder)}
    result = beside_servers.run("sh", "-c", "cd .. && bash clone/verify.sh", **settings)
    assert masked(result.stdout) == CHECKS
    assert result.stderr.count("\n") <= 1  # a warning of bash


def test_the_first_that_sets_a_name_wins(beside_servers: Sandbox) -> None:
    """.env is read, not executed, whatever its line ends, its byte order mark and its bytes."""
    lines = [
        f"\xef\xbb\xbfAUTHSERVER_URL={beside_servers.issuer}/",
        "AUTHSERVER_URL=http://localhost:1",
        f'export ADMIN_URL="{beside_servers.authserver.admin_url}/"  # caf\xe9',
        "MCP_SERVER_NAME='$(touch ran)'",
    ]
    dotenv = "".join(f"{line}\r\n" for line in lines)
    (beside_servers.clone / ".env").write_text(dotenv, encoding="latin-1")
    result = beside_servers.verify(MCP_SERVER_NAME="demo-server")
    assert (masked(result.stdout), result.stderr) == (CHECKS, "")
    assert "no response of $(touch ran): " in beside_servers.verify().stderr
    assert not (beside_servers.clone / "ran").exists()
    assert "ADMIN_URL=: it must begin with http" in beside_servers.verify(ADMIN_URL="").stderr


ACCEPTED = http_response("200 OK", '{"id": 1, "result": {"serverInfo": {"name": "demo-server"}}}')
ERROR = http_response("400 No", json.dumps({"error": "\x1b[31m\r\nALL\u202e" + "\x01" * 5_000}))


def issuer(text: str) -> Change:
    return when(b"GET", http_response("200 OK", json.dumps({"issuer": text})))


WRONG: dict[str, dict[str, Change]] = {
    "MCP_URL": {
        "no token: rejected: expected 401 bearer resource_metadata, got 200: ": when(b"", ACCEPTED),
        "got 401 bearer: ": replacing(b"resource_metadata", b"resource_megadata"),
        "got no response, curl: (28) ": when(b"", None),
        "agent: accepted: expected": replacing(b"demo-server", b"my_server_1"),
        "tampered token: rejected: ": when(rb"Bearer .*AAAA\r", ACCEPTED),
        "different audience: rejected: ": when(rb"Bearer .*[^A].{0,9}\r", ACCEPTED),  # not tampered
    },
    "AUTHSERVER_URL": {
        "expected 200, got 404: is there an authorization server at http://": when(
            b"GET", http_response("404 Not Found")
        ),
        "oauth-authorization-server: 200, but ": when(b"GET", http_response("200 OK", "<html>")),
        "has no issuer": replacing(b'"issuer"', b'"iss"   '),
        "ftp://x?[31m??ALL: it must begin with http": issuer("ftp://x\x1b[31m\r\nALL"),
        "http://no.invalid is not reachable from this host": issuer("http://no.invalid"),
        "token: issued: expected 200, got 400 ?[31m??ALL?": when(b"POST", ERROR),
        "wrong secret: rejected: ": replacing(b" 401 ", b" 400 "),
        "scope not granted: rejected: ": when(b"mcp%3Anot", ACCEPTED),
        "unknown resource: rejected: ": when(b"not-registered", ACCEPTED),
    },
    "ADMIN_URL": {
        "got 401: are AUTHPLANE_ADMIN_API_KEY": when(b"", http_response("401 Unauthorized")),
        "client: deleted: expected 204, got 500: ": replacing(b" 204 ", b" 500 "),
    },
}


@pytest.mark.parametrize(
    ("server", "message"), [(server, message) for server in WRONG for message in WRONG[server]]
)
def test_fails(start_fake: StartFake, beside_servers: Sandbox, server: str, message: str) -> None:
    """It says why in one line, sends no control character to a terminal, and leaves nothing."""
    before = beside_servers.authserver.clients()
    result = beside_servers.verify(
        **behind_fakes(beside_servers, start_fake, {server: WRONG[server][message]})
    )
    assert result.returncode == 1
    [error] = result.stderr.splitlines()
    assert error.startswith("verify.sh: ")
    assert message in error
    assert len(error) < 1_000
    assert ("✗" in result.stdout) == (": expected " in error)
    assert (result.stderr + result.stdout).replace("\n", "").isprintable()
    assert beside_servers.authserver.clients() == before
    assert beside_servers.left() == []


STAYS = {
    "500 Oops": "client {} was not deleted (500): delete it manually",
    "204 No Content": "deleted client: rejected: expected 401 invalid_client, got 200",
}


@pytest.mark.parametrize(("status", "message"), STAYS.items())
def test_the_client_stays(
    start_fake: StartFake, beside_servers: Sandbox, status: str, message: str
) -> None:
    stays = {"ADMIN_URL": when(b"DELETE", http_response(status))}
    result = beside_servers.verify(**behind_fakes(beside_servers, start_fake, stays))
    client = beside_servers.authserver.clients()[0]
    beside_servers.authserver.delete_client(client)
    assert result.returncode == 1
    assert message.format(client) in result.stderr


def test_says_why_jq_fails(beside_servers: Sandbox) -> None:
    beside_servers.make_tool("jq", "echo its own words >&2; exit 2")
    assert "its own words" in beside_servers.verify().stderr


def test_metadata_of_the_issuer(start_fake: StartFake, beside_servers: Sandbox) -> None:
    """RFC 8414, section 3.1: the path comes last. It is one request, whatever brackets it has."""
    other = start_fake(lambda _: http_response("200 OK", "<html>"))
    url = f"{other.url.replace('localhost', '0.0.0.0')}/[1-9]/"  # noqa: S104
    result = beside_servers.verify(
        **behind_fakes(beside_servers, start_fake, {"AUTHSERVER_URL": issuer(url)})
    )
    [error] = result.stderr.splitlines()
    assert "is not reachable from this host" in error  # what responds is no such issuer
    [request] = other.requests
    assert request.path == "/.well-known/oauth-authorization-server/[1-9]"


def test_passes_for_other_servers_as_they_should_be(
    start_fake: StartFake, beside_servers: Sandbox
) -> None:
    """That is an older authserver, and an MCP server whose challenge has capital letters."""
    older = replacing(b'"invalid_target"', b'"invalid_scope" ')
    capitals = replacing(b"www-authenticate: Bearer", b"WWW-Authenticate: BEARER")
    changes = {"AUTHSERVER_URL": older, "MCP_URL": capitals}
    result = beside_servers.verify(**behind_fakes(beside_servers, start_fake, changes))
    assert masked(result.stdout) == CHECKS.replace("invalid_target", "invalid_scope")


def test_an_id_and_a_secret_of_any_characters(
    start_fake: StartFake, beside_servers: Sandbox
) -> None:
    """They are percent-encoded: RFC 6749, section 2.3.1, and RFC 3986, section 2.1."""
    client = http_response("201 Created", '{"client_id": "../x", "client_secret": "+/=&%: x"}')
    public = start_fake(
        in_front_of(beside_servers.ports[0], when(b"POST", http_response("401 No")))
    )
    admin = start_fake(in_front_of(beside_servers.ports[1], when(b"/admin/clients", client)))
    beside_servers.verify(AUTHSERVER_URL=public.url, ADMIN_URL=admin.url)
    basic = "Basic Li4lMkZ4OiUyQiUyRiUzRCUyNiUyNSUzQSUyMHg="  # ..%2Fx:%2B%2F%3D%26%25%3A%20x
    assert public.requests[-1].headers["authorization"] == basic
    assert admin.requests[-1].path == "/admin/clients/..%2Fx?force=true"


SECRET = r'(?:client_secret":|access_token":|authorization: \w+ )"?([^"\r]+)'
RECORDING = 'import os, sys\nprint(sys.orig_argv, [*os.environ], file=open("../record", "a"))\n'


def test_shows_no_secret(start_fake: StartFake, beside_servers: Sandbox) -> None:
    """None is in an argument or in the output; the agent doesn't get the admin API key."""
    messages: list[bytes] = []

    def kept(request: Request, forward: Callable[[Request], bytes]) -> Response:
        response = forward(request)
        messages.extend([bytes(request), response])
        return response

    record = beside_servers.folder / "record"
    for tool in ("curl", "jq"):
        beside_servers.make_tool(
            tool, f'echo {tool} "$@" >>{record}; exec {shutil.which(tool)} "$@"'
        )
    with (beside_servers.clone / "agent.py").open("a") as agent:
        agent.write(RECORDING)
    settings = behind_fakes(beside_servers, start_fake, dict.fromkeys(PATHS, kept))
    result = beside_servers.verify(AUTHPLANE_ADMIN_API_KEY=ADMIN_KEY, EXPORTED="x", **settings)
    assert masked(result.stdout) == CHECKS
    secrets = {*re.findall(SECRET, b"\n".join(messages).decode())}
    assert len(secrets) == 8  # the admin key, the secret, two Basic credentials, four tokens
    shown = result.stdout + result.stderr + record.read_text()
    assert [secret for secret in secrets if secret in shown] == []
    for recorded in ("curl --disable", "jq -r", "'agent.py'", "'CLIENT_SECRET'", "'EXPORTED'"):
        assert recorded in shown
    assert "'AUTHPLANE_ADMIN_API_KEY'" not in shown


@pytest.mark.parametrize(("moment", "seconds"), [(b"POST /admin/clients", 1), (b"Bearer ey", 20)])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_cleans_up_when_interrupted(
    start_fake: StartFake, beside_servers: Sandbox, moment: bytes, seconds: int, number: int
) -> None:
    """A server has acted, and has not responded yet: curl is waited for, the agent is ended."""
    before = beside_servers.authserver.clients()
    reached = threading.Event()

    def slow(request: Request, forward: Handler) -> Response:
        response = forward(request)
        if moment in bytes(request):
            reached.set()
            time.sleep(seconds)
        return response

    run = beside_servers.start(
        "bash", "verify.sh", **behind_fakes(beside_servers, start_fake, dict.fromkeys(PATHS, slow))
    )
    assert reached.wait(20)
    assert len(beside_servers.authserver.clients()) == len(before) + 1
    os.kill(run.pid if number == signal.SIGTERM else -run.pid, number)  # -: its whole group
    output, errors = run.communicate(timeout=8)  # the agent, by itself, would take 10 s
    assert run.returncode == 1
    assert errors == ""
    assert "ALL CHECKS PASSED" not in output
    assert beside_servers.authserver.clients() == before
    wait_until(lambda: not beside_servers.left(), "the end of every process of the run", 5)
