"""POST an MCP `initialize` and check which server answers (MCP 2025-11-25, Streamable HTTP)."""

import asyncio
import json
import re
from contextlib import redirect_stderr, suppress
from os import environ

import httpx

REQUIRED = ["MCP_URL"]
VERSION, CLIENT_INFO = "2025-11-25", {"name": "demo-agent", "version": "0.1.0"}
PARAMS = {"protocolVersion": VERSION, "capabilities": {}, "clientInfo": CLIENT_INFO}
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": PARAMS}
EVENT_END, DATA = re.compile(rb"(?>\r\n|\r|\n){2}"), re.compile(rb"(?<![^\r\n])data:([^\r\n]*)")


async def read_response(response: httpx.Response) -> object:
    """Return the first JSON-RPC response with our id of an SSE stream, else the JSON body."""
    if response.status_code != 200:
        details = response.headers.get("WWW-Authenticate") or response.headers.get("Location", "")
        raise ValueError(f"{response.status_code} {response.reason_phrase} {details}")
    body, start, chunks = b"", 0, 0
    async for chunk in response.aiter_bytes():
        # a tiny chunk costs time as well, so that each counts 16 bytes more
        if len(body := body + chunk) + 16 * (chunks := chunks + 1) > 256 * 1024:
            raise ValueError("the response exceeds 256 KiB")
        # what ends an event may have begun in the chunk before
        while end := EVENT_END.search(body, max(start, len(body) - len(chunk) - 3)):
            data, start = b"\n".join(DATA.findall(body, start, end.start())), end.end()
            match json.loads(data.strip() or b"null"):
                case {"id": 1, "result": _} | {"id": 1, "error": _} as reply:
                    return reply
    return json.loads(body)


async def main() -> str | None:
    """Print the response of the expected server, or return the one line that says what failed."""
    step, headers = "settings", {"Accept": "application/json, text/event-stream"}
    try:
        if unset := [name for name in REQUIRED if not environ.get(name)]:
            raise ValueError(f"{', '.join(unset)} not set")
        async with asyncio.timeout(30), httpx.AsyncClient(timeout=10) as http:
            url = environ["MCP_URL"]
            step, server = f"initialize at {url}", environ.get("MCP_SERVER_NAME") or "demo-server"
            async with http.stream("POST", url, json=INITIALIZE, headers=headers) as response:
                reply = await read_response(response)
            if session := response.headers.get("Mcp-Session-Id"):
                headers |= {"Mcp-Session-Id": session, "MCP-Protocol-Version": VERSION}
                # the response is not read; 405 means that the server ends its sessions by itself
                await http.send(http.build_request("DELETE", url, headers=headers), stream=True)
        match reply:
            case {"id": 1, "result": {"serverInfo": {"name": str(name)}}} if name == server:
                return print(json.dumps(reply), "MCP initialize OK", sep="\n")
        raise ValueError(f"no result.serverInfo.name {server!r} in {json.dumps(reply)}")
    except Exception as e:
        why = next(type(x).__name__ for x in (e.__cause__, e) if isinstance(x, Exception))
        return re.sub("[^ -~]", " ", f"agent: {step}: {e!s:.500} ({getattr(e, 'code', why)})"[:999])


if __name__ == "__main__":
    with suppress(KeyboardInterrupt), redirect_stderr(None):  # libraries log what they also raise
        raise SystemExit(asyncio.run(main()))
    raise SystemExit(130)
