"""POST an `initialize` to an MCP server and check who answers (MCP 2025-11-25, Streamable HTTP)."""

import asyncio
import json
import logging
import os
import sys
import warnings

import httpx

with warnings.catch_warnings(record=True):  # the SDK imports authlib.jose, which is deprecated
    from authplane import ASCredentials, AuthplaneClient

logging.getLogger("authplane").addHandler(logging.NullHandler())  # what it logs, it raises too
REQUIRED = ["MCP_URL", "AUTHPLANE_ISSUER", "CLIENT_ID", "CLIENT_SECRET", "RESOURCE_URI"]
VERSION, CLIENT_INFO = "2025-11-25", {"name": "demo-agent", "version": "0.1.0"}
PARAMS = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": CLIENT_INFO}
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": PARAMS}
headers = {"Accept": "application/json, text/event-stream"}
steps = ["settings"]  # the last one is where a failure happened


def printable(text: str) -> str:
    """Return text as one line that may be shown: no control characters, no secrets."""
    for secret in [os.environ.get("CLIENT_SECRET"), headers.get("Authorization", "Bearer ")[7:]]:
        text = text.replace(secret, "[hidden]") if secret else text
    return "".join(c if c.isprintable() else " " for c in text)


async def read_reply(response: httpx.Response) -> str:
    """Return the reply from an SSE stream, else the whole body; raise ValueError if refused."""
    if response.status_code != 200:
        told = [response.headers.get(name, "") for name in ("WWW-Authenticate", "Location")]
        raise ValueError(" ".join([str(response.status_code), response.reason_phrase, *told]))
    body = b""
    async for chunk in response.aiter_bytes():
        if len(body := body + chunk) > 1_000_000:
            raise ValueError("no end of the reply after a megabyte")
        for event in body.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n\n")[:-1]:
            data = b"\n".join(line[5:] for line in event.split(b"\n") if line.startswith(b"data:"))
            match json.loads(data.strip() or b"null"):
                case {"id": 1, "result": _} | {"id": 1, "error": _}:
                    return data.decode().strip()
    return body.decode()


async def main() -> str:
    """Return the reply of the expected server; raise, with its last step in `steps`, otherwise."""
    if unset := [name for name in REQUIRED if not os.environ.get(name)]:
        raise ValueError(f"{', '.join(unset)} not set")
    url, issuer, client_id, client_secret, resource = (os.environ[name] for name in REQUIRED)
    async with asyncio.timeout(30), httpx.AsyncClient(timeout=10) as http:
        # authplane:begin
        # client_credentials (RFC 6749 section 4.4), for one resource and no other (RFC 8707)
        steps.append(f"access token from {issuer}")
        credentials = ASCredentials(client_id, client_secret)
        client = await AuthplaneClient.create(issuer, auth=credentials)
        token = await client.client_credentials(scopes=["mcp:echo"], resources=[resource])
        headers["Authorization"] = f"Bearer {token.access_token}"
        await client.aclose()
        # authplane:end
        steps.append(f"initialize at {url}")
        async with http.stream("POST", url, json=INITIALIZE, headers=headers) as response:
            reply = await read_reply(response)
        if session := response.headers.get("Mcp-Session-Id"):
            headers.update({"Mcp-Session-Id": session, "MCP-Protocol-Version": VERSION})
            await http.delete(url, headers=headers)  # 405 is fine: then it ends by itself
    steps.append(f"{steps[-1]}: {reply[:300]}")
    expected = os.environ.get("MCP_SERVER_NAME") or "demo-server"
    match json.loads(reply):
        case {"id": 1, "result": {"serverInfo": {"name": name}}} if name == expected:
            return reply
    raise ValueError(f"no result.serverInfo.name {expected!r}")


if __name__ == "__main__":
    try:
        print(printable(asyncio.run(main())), "authenticated MCP initialize OK", sep="\n")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        kind = getattr(error, "code", type(cause).__name__)
        sys.exit(printable(f"agent: {steps[-1]}: {str(error)[:500]} ({kind})"))
