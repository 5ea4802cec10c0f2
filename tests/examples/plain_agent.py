"""POST an MCP `initialize` and check which server responds (MCP 2025-11-25, Streamable HTTP)."""

import asyncio
import json
import logging
import re
from os import environ

import httpx

REQUIRED = ["MCP_URL"]
CLIENT_INFO = {"name": "demo-agent", "version": "0.1.0"}
PARAMS = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": CLIENT_INFO}
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": PARAMS}
WAIT_SECONDS = 10  # for a connection, and for each part of a response
TOTAL_SECONDS = 30


async def read_response(response: httpx.Response, limit: int = 256 * 1024) -> object:
    """Return the JSON body, or the first JSON-RPC response with our id of an SSE stream."""
    if response.status_code != 200:
        details = response.headers.get("WWW-Authenticate") or response.headers.get("Location", "")
        raise ValueError(f"{response.status_code} {response.reason_phrase} {details}")
    is_stream = response.headers.get("Content-Type", "").lower().startswith("text/event-stream")
    body = bytearray()
    async for chunk in response.aiter_bytes():
        limit -= len(chunk) + 16  # so that many tiny chunks end, too
        if limit < 0:
            raise ValueError("the response is too large, or in too many chunks")
        for byte in chunk:
            body.append(byte)
            # an event ends with a blank line; CR LF CR LF contains LF CR
            if is_stream and body.endswith((b"\n\n", b"\n\r", b"\r\r")):
                data = [line[5:] for line in body.splitlines() if line.startswith(b"data:")]
                body.clear()
                # an event without data, such as a comment, is null
                match json.loads(b"\n".join(data).strip() or b"null"):
                    case {"id": 1, "result": _} | {"id": 1, "error": _} as reply:
                        return reply
    if is_stream:
        raise ValueError("the stream ended without a response")
    return json.loads(body)


async def main() -> None:
    """Print the response of the expected server; raise SystemExit with one line if that fails."""
    unset = [name for name in REQUIRED if not environ.get(name)]
    if unset:
        raise SystemExit(f"agent: settings: {', '.join(unset)} not set")
    url = environ["MCP_URL"]
    server = environ.get("MCP_SERVER_NAME") or "demo-server"
    headers = {"Accept": "application/json, text/event-stream"}
    accepted = False
    step = "HTTP client (check SSL_CERT_FILE, SSL_CERT_DIR, HTTP_PROXY, HTTPS_PROXY, ALL_PROXY)"
    try:
        async with asyncio.timeout(TOTAL_SECONDS), httpx.AsyncClient(timeout=WAIT_SECONDS) as http:
            step = f"initialize at {url}"
            async with http.stream("POST", url, json=INITIALIZE, headers=headers) as response:
                reply = await read_response(response)
            match reply:
                case {"id": 1, "result": {"serverInfo": {"name": str(name)}}} if name == server:
                    print(json.dumps(reply), "MCP initialize OK", sep="\n")
                case _:
                    raise ValueError(f"no result.serverInfo.name {server!r} in {json.dumps(reply)}")
            accepted = True
            session = response.headers.get("Mcp-Session-Id")
            if session:
                headers |= {"Mcp-Session-Id": session, "MCP-Protocol-Version": "2025-11-25"}
                async with http.stream("DELETE", url, headers=headers):
                    pass  # nothing of the response is needed
    except Exception as error:
        if not accepted:  # otherwise only the end of the session has failed
            kind = getattr(error, "code", type(error).__name__)
            reason = str(error)
            # a time limit has no text, and an error of the SDK may end with the text of its cause
            if not str(error.__cause__ or error):
                reason += "no complete response"
            line = f"agent: {step}: {reason} ({kind})"
            # printable ASCII only, since a server may have chosen the text
            raise SystemExit(re.sub("[^ -~]", " ", line[:999])) from None


if __name__ == "__main__":
    logging.disable()  # the SDK logs what it also raises
    logging.captureWarnings(True)  # a module that it imports is deprecated
    try:
        asyncio.run(main())
    except KeyboardInterrupt:
        raise SystemExit(130) from None
