"""POST an `initialize` to an MCP server and check who answers (MCP 2025-11-25, Streamable HTTP)."""

import asyncio
import json
import os
import sys

import httpx

REQUIRED = ["MCP_URL"]
VERSION, CLIENT_INFO = "2025-11-25", {"name": "demo-agent", "version": "0.1.0"}
PARAMS = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": CLIENT_INFO}
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": PARAMS}
headers = {"Accept": "application/json, text/event-stream"}
steps = ["settings"]  # the last one is where a failure happened


def printable(text: str) -> str:
    """Return text as one line that may be shown: no control characters, no secrets."""
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
    url = os.environ["MCP_URL"]
    async with asyncio.timeout(30), httpx.AsyncClient(timeout=10) as http:
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
        print(printable(asyncio.run(main())), "MCP initialize OK", sep="\n")
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        cause = error.__cause__ if isinstance(error.__cause__, Exception) else error
        kind = getattr(error, "code", type(cause).__name__)
        sys.exit(printable(f"agent: {steps[-1]}: {str(error)[:500]} ({kind})"))
