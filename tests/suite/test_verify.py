"""verify.sh: it passes only for correct servers, and leaves nothing."""

import json
import os
import re
import shutil
import signal
import ssl
import threading
import time
from base64 import b64decode, urlsafe_b64decode
from collections.abc import Mapping

import pytest
import trustme

from authserver_client import ADMIN_KEY, Credentials
from fakes import (
    Change,
    Forward,
    Request,
    Response,
    StartFake,
    http_response,
    proxy_to,
    replacing,
    respond_to,
)
from pages import README, blocks, section
from sandbox import Sandbox, wait_until

PATHS = {"AUTHSERVER_URL": "", "ADMIN_URL": "", "MCP_URL": "/mcp"}


def without_ports(output: str) -> str:
    """Return the output with the ports of this run replaced."""
    return re.sub(r"localhost:\d+", "localhost:PORT", output)


[TRANSCRIPT] = blocks(section(README, "Run it"), "text")
# what verify.sh prints if the resource is registered already
CHECKS = without_ports(TRANSCRIPT[TRANSCRIPT.index("✓") :]).replace(" 201\n", " 409\n", 1)


def behind_fakes(
    sandbox: Sandbox, start_fake: StartFake, changes: Mapping[str, Change]
) -> dict[str, str]:
    """Return the settings for the servers of the sandbox behind fakes with these changes."""
    settings: dict[str, str] = {}
    for (name, path), port in zip(PATHS.items(), sandbox.ports, strict=True):
        if name in changes:
            settings[name] = start_fake(proxy_to(port, changes[name])).url + path
    return settings


def test_checks_everything_and_leaves_nothing(guest: Sandbox, servers: Sandbox) -> None:
    """Two runs at once don't disturb each other. Each program requests the metadata once."""
    before = guest.authserver.clients()
    metadata_requests = servers.log.read_text().count("oauth-authorization-server")
    runs = [guest.start("bash", "verify.sh") for _ in range(2)]
    for run in runs:
        output, errors = run.communicate(timeout=60)
        assert (without_ports(output), errors, run.returncode) == (CHECKS, "", 0)
    assert guest.authserver.clients() == before
    assert guest.leftovers() == []
    requested = servers.log.read_text().count("oauth-authorization-server") - metadata_requests
    assert requested == 4  # one by each verify.sh, and one by each agent


def test_ignores_the_environment(guest: Sandbox, sandbox: Sandbox) -> None:
    """Proxies, missing certificates, a missing locale, and what changes curl, cd and Python."""
    (guest.folder / ".curlrc").write_text("url = http://localhost:1\n")
    (guest.folder / "httpx.py").write_text("raise SystemExit(1)")
    proxies = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy")
    settings = dict.fromkeys(proxies, "socks5://localhost:1")
    settings |= {"NO_PROXY": "b51a:cc66:f0::/48", "LC_ALL": "not_installed"}
    settings |= {"SSL_CERT_FILE": "/nowhere", "SSL_CERT_DIR": "/nowhere"}
    settings |= {"CDPATH": str(sandbox.folder), "PYTHONPATH": str(guest.folder)}
    result = guest.run("sh", "-c", "cd .. && bash project/verify.sh", **settings)
    assert result.returncode == 0, result
    assert result.stderr.count("\n") <= 1  # a warning of bash


def test_settings_precedence(guest: Sandbox) -> None:
    """.env is read, not executed, whatever its line ends, its byte order mark and its bytes."""
    lines = [
        f"\xef\xbb\xbfAUTHSERVER_URL={guest.issuer}/",
        "AUTHSERVER_URL=http://localhost:1",
        f'ADMIN_URL="{guest.authserver.admin_url}/"  # caf\xe9',
        " export MCP_SERVER_NAME = '$(touch ran)'",
    ]
    dotenv = "".join(f"{line}\r\n" for line in lines)
    (guest.project / ".env").write_text(dotenv, encoding="latin-1")
    result = guest.verify(MCP_SERVER_NAME="")
    assert (result.returncode, result.stderr) == (0, "")
    assert "expected the server $(touch ran), got " in guest.verify().stderr
    assert not (guest.project / "ran").exists()
    (guest.project / ".env").write_text("MCP_SERVER_NAME= # a comment\n")
    assert guest.verify().returncode == 0


ACCEPTED = http_response("200 OK", '{"id": 1, "result": {"serverInfo": {"name": "demo-server"}}}')
HTML = http_response("200 OK", "<html>")
REDIRECT = http_response("302 Found", "A-SECRET", location="/")
OTHER_ERROR = http_response("400 Bad Request", '{"error": "invalid_request"}')
EMPTY_ERROR = http_response("400 Bad Request")
CONTROLS = "\x1b[31m\r\nALL\u202e" + "\x01" * 5_000
CONTROL_CHARACTERS = http_response("400 No", json.dumps({"error": CONTROLS}))
UNAUTHORIZED = http_response("401 Unauthorized")
FORBIDDEN = http_response("403 Forbidden")
NOT_FOUND = http_response("404 Not Found", "the page")
INVALID_URI = http_response("500 Oops", '{"detail": "the uri is invalid"}')
OTHER_STATUS = http_response("200 OK", '{"client_id": "x", "client_secret": "A-SECRET"}')
WITHOUT_SECRET = http_response("201 Created", '{"client_id": "A-SECRET"}')


def with_issuer(text: str) -> Change:
    return respond_to(b"GET", http_response("200 OK", json.dumps({"issuer": text})))


# by the setting of a server: what verify.sh says, and what is wrong with the server
WRONG: dict[str, list[tuple[str, Change]]] = {
    "MCP_URL": [
        ("rejected: expected 401 bearer resource_metadata, got 200: ", respond_to(b"", ACCEPTED)),
        ("got 401 bearer: ", replacing(b"resource_metadata", b"resource_document")),
        ("got no response (curl: (28) ", respond_to(b"", None)),
        (
            "got exit 1, agent: ValueError('expected the server ",
            replacing(b"demo-server", b"DEMO-SERVER"),
        ),
        ("tampered token: rejected: expected 401.*, got 403: ", respond_to(b"POST", FORBIDDEN, 3)),
        ("audience: rejected: expected 401.*, got 403: ", respond_to(b"POST", FORBIDDEN, 4)),
    ],
    "AUTHSERVER_URL": [
        ("got 404 (the page): is there an authorization server", respond_to(b"GET", NOT_FOUND)),
        ("discovery: expected 200, got 302: ", respond_to(b"GET", REDIRECT)),
        ('the response (200) is not a JSON object with "issuer"', respond_to(b"GET", HTML)),
        ('the response (200) is not a JSON object with "issuer"', with_issuer("")),
        ("ftp://x?[31m??ALL: it must begin with http", with_issuer("ftp://x\x1b[31m\r\nALL")),
        ("http://no.invalid is not reachable from this host", with_issuer("http://no.invalid")),
        ("issued: expected 200, got 400 ?[31m??ALL?", respond_to(b"POST", CONTROL_CHARACTERS)),
        (
            "wrong secret: rejected: expected 401 invalid_client, got 401 invalid_target",
            replacing(b"invalid_client", b"invalid_target"),
        ),
        (
            "deleted client: rejected: expected 401 invalid_client, got 401 invalid_target",
            replacing(b"invalid_client", b"invalid_target", 2),
        ),
        ("not granted: rejected: expected 400 invalid_scope", respond_to(b"%3Anot", OTHER_ERROR)),
        ("unknown resource: rejected: expected 400 ", respond_to(b"not-reg", EMPTY_ERROR)),
    ],
    "ADMIN_URL": [
        ("got 401: are AUTHPLANE_ADMIN_API_KEY", respond_to(b"", UNAUTHORIZED)),
        ('got 500 ({"detail": "the uri is invalid"})', respond_to(b"/resources", INVALID_URI)),
        ("client: registered: expected 201, got 200: ", respond_to(b"/clients ", OTHER_STATUS)),
        ('not a JSON object with "client_secret"', respond_to(b"/clients ", WITHOUT_SECRET)),
        ("client: deleted: expected 204, got 500: ", replacing(b" 204 ", b" 500 ")),
    ],
}


@pytest.mark.parametrize(
    ("server", "message", "change"),
    [(server, message, change) for server, rows in WRONG.items() for message, change in rows],
)
def test_wrong_servers_are_reported(
    start_fake: StartFake,
    guest: Sandbox,
    credentials: Credentials,
    server: str,
    message: str,
    change: Change,
) -> None:
    """verify.sh says why in one line, sends no control character to a terminal, and leaves nothing.

    The client that is in the environment or in .env stays.
    """
    curl = shutil.which("curl")
    guest.make_tool("curl", f'exec {curl} "$@" --max-time 2')  # the last one counts
    before = guest.authserver.clients()
    settings = behind_fakes(guest, start_fake, {server: change})
    result = guest.verify(CLIENT_ID=credentials[0], **settings)
    assert result.returncode == 1
    [error] = result.stderr.splitlines()
    assert error.startswith("verify.sh: ")
    assert message in error
    assert len(error) < 1_000
    if ": expected " in error:
        assert "✗" in result.stdout
    assert (result.stderr + result.stdout).replace("\n", "").isprintable()
    assert "A-SECRET" not in result.stderr + result.stdout
    assert guest.authserver.clients() == before
    assert guest.leftovers() == []


@pytest.mark.parametrize(
    ("exit_status", "last_line"),
    [(0, "MCP initialize OK?"), (0, ""), (1, "exit 0, MCP initialize OK")],
)
def test_the_agent_fails(guest: Sandbox, exit_status: int, last_line: str) -> None:
    agent = f"print({last_line!r}); raise SystemExit({exit_status})"
    (guest.project / "agent.py").write_text(agent)
    result = guest.verify()
    assert result.returncode == 1
    assert f"got exit {exit_status}, {last_line}: see When the agent fails in " in result.stderr
    assert section(README, "When the agent fails")


FAILED_DELETIONS = {
    "500 Oops": "client {} was not deleted (500): delete it manually",
    "403 Forbidden": "client {} was not deleted (403): delete it manually",
    "204 No Content": "deleted client: rejected: expected 401 invalid_client, got 200",
}


@pytest.mark.parametrize(("status", "message"), FAILED_DELETIONS.items())
def test_a_client_that_was_not_deleted_is_reported(
    start_fake: StartFake, guest: Sandbox, status: str, message: str
) -> None:
    stays = {"ADMIN_URL": respond_to(b"DELETE", http_response(status))}
    result = guest.verify(**behind_fakes(guest, start_fake, stays))
    client = guest.authserver.clients()[0]
    guest.authserver.delete_client(client)
    assert result.returncode == 1
    assert message.format(client) in result.stderr


def test_metadata_of_the_issuer(start_fake: StartFake, guest: Sandbox) -> None:
    """RFC 8414, section 3.1: the path comes last. It is one request, whatever brackets it has."""
    other = start_fake(lambda _: http_response("200 OK", "<html>"))
    url = f"{other.url.replace('localhost', '0.0.0.0')}/[1-9]/"  # noqa: S104
    result = guest.verify(**behind_fakes(guest, start_fake, {"AUTHSERVER_URL": with_issuer(url)}))
    [error] = result.stderr.splitlines()
    assert "is not reachable from this host" in error  # what responds is no such issuer
    [request] = other.requests
    assert request.path == "/.well-known/oauth-authorization-server/[1-9]"


def test_the_agent_runs_in_a_network(start_fake: StartFake, guest: Sandbox) -> None:
    """The network is the first of those that the container is in."""
    guest.make_tool("docker", "echo first,second")
    issuer = {"AUTHSERVER_URL": with_issuer("http://no.invalid/\x1b[2J")}
    result = guest.verify(**behind_fakes(guest, start_fake, issuer))
    assert "\n  the agent runs in network first: the issuer http://no.invalid/?[2J" in result.stdout


def test_uses_a_proxy_for_other_machines(start_fake: StartFake, guest: Sandbox) -> None:
    def to_mcp_server(request: Request, forward: Forward) -> bytes:
        assert request.path == "http://mcp.invalid/mcp"
        return forward(request._replace(path="/mcp"))

    proxy = start_fake(proxy_to(guest.ports[2], to_mcp_server))
    result = guest.verify(MCP_URL="http://mcp.invalid/mcp", http_proxy=proxy.url)
    assert result.returncode == 0, result


def test_unknown_certificates_are_rejected(start_fake: StartFake, guest: Sandbox) -> None:
    """verify.sh and the agent reject one, until they are told its authority."""
    fake = start_fake(proxy_to(guest.ports[2], lambda request, forward: forward(request)))
    authority, context = trustme.CA(), ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)  # pyright: ignore[reportUnknownMemberType]
    fake.socket = context.wrap_socket(fake.socket, server_side=True)
    known = str(guest.folder / "authority.pem")
    authority.cert_pem.write_to_path(known)
    url = fake.url.replace("http", "https") + "/mcp"
    by_curl = guest.verify(MCP_URL=url).stderr
    assert "no token: rejected: expected 401 bearer" in by_curl
    assert "(curl: (60) " in by_curl
    by_agent = guest.verify(MCP_URL=url, CURL_CA_BUNDLE=known).stderr
    assert f"agent: {url}: ConnectError(" in by_agent
    accepted = guest.verify(MCP_URL=url, CURL_CA_BUNDLE=known, SSL_CERT_FILE=known)
    assert accepted.returncode == 0, accepted


def test_passes_for_other_correct_servers(start_fake: StartFake, guest: Sandbox) -> None:
    """An older authserver, and an MCP server whose challenge has capital letters.

    Only the stand-in is named in the verdict.
    """

    def older(request: Request, forward: Forward) -> bytes:
        response = forward(request).replace(b'"stand_in":true', b'"stand_in":null')
        return response.replace(b'"invalid_target"', b'"invalid_scope" ')

    capitals = replacing(b"www-authenticate: Bearer", b"WWW-Authenticate: BEARER")
    changes = {"AUTHSERVER_URL": older, "MCP_URL": capitals}
    result = guest.verify(**behind_fakes(guest, start_fake, changes))
    expected = CHECKS.replace("invalid_target", "invalid_scope").replace(" (by a stand-in)", "")
    assert without_ports(result.stdout) == expected


def test_an_id_and_a_secret_of_any_characters(start_fake: StartFake, guest: Sandbox) -> None:
    """Both are percent-encoded: RFC 6749, section 2.3.1, and RFC 3986, section 2.1."""
    client = http_response("201 Created", '{"client_id": "../x", "client_secret": "+/=&%: x"}')
    public_port, admin_port, _ = guest.ports
    public = start_fake(proxy_to(public_port, respond_to(b"POST", UNAUTHORIZED)))
    admin = start_fake(proxy_to(admin_port, respond_to(b"/admin/clients", client)))
    guest.verify(AUTHSERVER_URL=public.url, ADMIN_URL=admin.url)
    basic = "Basic Li4lMkZ4OiUyQiUyRiUzRCUyNiUyNSUzQSUyMHg="  # ..%2Fx:%2B%2F%3D%26%25%3A%20x
    assert public.requests[-1].headers["authorization"] == basic
    assert admin.requests[-1].path == "/admin/clients/..%2Fx?force=true"


def test_deletes_no_client_that_it_did_not_register(
    start_fake: StartFake, guest: Sandbox, credentials: Credentials
) -> None:
    body = json.dumps({"client_id": credentials[0]})
    named, conflict = http_response("200 OK", body), http_response("409 Conflict", body)
    guest.verify(**behind_fakes(guest, start_fake, {"MCP_URL": respond_to(b"", named)}))
    not_registered = {"ADMIN_URL": respond_to(b"/clients ", conflict)}
    guest.verify(**behind_fakes(guest, start_fake, not_registered))
    assert credentials[0] in guest.authserver.clients()


def test_its_requests_to_the_mcp_server_are_the_agents(
    start_fake: StartFake, guest: Sandbox
) -> None:
    received: list[Request] = []

    def recorded(request: Request, forward: Forward) -> Response:
        received.append(request)
        return forward(request)

    guest.verify(**behind_fakes(guest, start_fake, {"MCP_URL": recorded}))
    without_token, from_agent, _, *others = received  # the third ends the agent's session
    for request in (without_token, *others):
        assert json.loads(request.body) == json.loads(from_agent.body)
        for name in ("accept", "content-type"):
            assert request.headers[name] == from_agent.headers[name]
    tampered, other = (each.headers["authorization"].split(".") for each in others)
    audiences = [json.loads(urlsafe_b64decode(f"{x[1]}=="))["aud"] for x in (tampered, other)]
    assert audiences == [[guest.mcp_url], [guest.issuer]]
    assert (tampered[0], tampered[2]) == (other[0], other[2])  # the header, the signature


SECRET = r'(?:client_secret":|access_token":|authorization: \w+ )"?([^"\r]+)'
RECORDING = 'import os, sys\nprint(sys.orig_argv, [*os.environ], file=open("../record", "a"))\n'


def test_shows_no_secret(start_fake: StartFake, guest: Sandbox) -> None:
    """None is in an argument or in the output; the agent doesn't get the admin API key."""
    messages: list[bytes] = []

    def kept(request: Request, forward: Forward) -> Response:
        response = forward(request)
        messages.extend([bytes(request), response])
        return response

    record = guest.folder / "record"
    for tool in ("curl", "jq"):
        guest.make_tool(tool, f'echo {tool} "$@" >>{record}; exec {shutil.which(tool)} "$@"')
    with (guest.project / "agent.py").open("a") as agent:
        agent.write(RECORDING)
    settings = behind_fakes(guest, start_fake, dict.fromkeys(PATHS, kept))
    result = guest.verify(AUTHPLANE_ADMIN_API_KEY=ADMIN_KEY, **settings)
    assert result.returncode == 0, result
    sent = b"\n".join(messages).decode()
    client_secrets = {
        b64decode(basic).split(b":")[1] for basic in re.findall(r"authorization: Basic (\S+)", sent)
    }
    assert len(client_secrets - {b""}) == 2  # the right one and a wrong one
    secrets = {*re.findall(SECRET, sent)}
    assert len(secrets) == 8  # admin key, client secret, two Basic credentials, four tokens
    shown = result.stdout + result.stderr + record.read_text()
    assert [secret for secret in secrets if secret in shown] == []
    for recorded in ("curl --disable", "--max-time 10", "jq -nr", "'agent.py'", "'CLIENT_SECRET'"):
        assert recorded in shown
    for name in ("AUTHPLANE_ADMIN_API_KEY", "client_secret", "token"):
        assert f"'{name}'" not in shown


@pytest.mark.parametrize(("moment", "seconds"), [(b"POST /admin/clients", 1), (b"Bearer ey", 20)])
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM])
def test_cleans_up_when_interrupted(
    start_fake: StartFake, guest: Sandbox, moment: bytes, seconds: int, number: int
) -> None:
    """The signal comes after a server has acted, and before it responds.

    verify.sh waits for curl, and ends the agent. A second signal doesn't end the clean-up.
    """
    before = guest.authserver.clients()
    reached = threading.Event()

    def slow(request: Request, forward: Forward) -> Response:
        response = forward(request)
        if moment in bytes(request):
            reached.set()
            time.sleep(seconds)
        if request.path.startswith("/admin") and request.method == "DELETE":
            send_signal()
        return response

    def send_signal() -> None:
        os.kill(run.pid if number == signal.SIGTERM else -run.pid, number)  # -: its whole group

    changes = dict.fromkeys(PATHS, slow)
    settings = behind_fakes(guest, start_fake, changes)
    run = guest.start("bash", "verify.sh", **settings)
    assert reached.wait(20)
    assert len(guest.authserver.clients()) == len(before) + 1
    send_signal()
    output, errors = run.communicate(timeout=8)  # the agent, by itself, would take 10 s
    assert run.returncode == 1
    assert errors == ""
    assert "ALL CHECKS PASSED" not in output
    assert guest.authserver.clients() == before
    wait_until(lambda: not guest.leftovers(), "the end of every process", 5)
