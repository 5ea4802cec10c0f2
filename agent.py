"""Call a protected MCP server: POST `initialize`, and check that the expected server responds."""

import asyncio
import contextlib
import json
import logging
import re
from os import environ

import httpx

CLIENT_INFO = {"name": "demo-agent", "version": "0.1.0"}
PARAMS = {"protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": CLIENT_INFO}
INITIALIZE = {"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": PARAMS}


async def main() -> None:
    """Print the response. Raise an exception if another server responds."""
    url = environ["MCP_URL"]
    expected = environ.get("MCP_SERVER_NAME") or "demo-server"
    headers = {"Accept": "application/json, text/event-stream"}
    # authplane:begin
    # all that authentication adds is between the two marks: see `make diff`
    from authplane import ASCredentials, AuthplaneClient

    credentials = ASCredentials(environ["CLIENT_ID"], environ["CLIENT_SECRET"])
    authplane = await AuthplaneClient.create(environ["AUTHPLANE_ISSUER"], auth=credentials)
    async with contextlib.aclosing(authplane):
        token = await authplane.client_credentials(
            scopes=["mcp:echo"], resources=[environ["RESOURCE_URI"]]
        )
    headers["Authorization"] = f"Bearer {token.access_token}"
    # authplane:end
    async with httpx.AsyncClient(timeout=10) as http:
        async with http.stream("POST", url, json=INITIALIZE, headers=headers) as response:
            reply = await read_reply(response)
        if session := response.headers.get("Mcp-Session-Id"):
            with contextlib.suppress(httpx.HTTPError):
                await http.delete(url, headers=headers | {"Mcp-Session-Id": session})
    match reply:
        case {"id": 1, "result": {"serverInfo": {"name": str(name)}}} if name == expected:
            print(json.dumps(reply))
            print("MCP initialize OK")
        case _:
            raise ValueError(f"expected the server {expected}, got {json.dumps(reply)}")


async def read_reply(response: httpx.Response) -> object:
    """Return the JSON-RPC response: the body, or the data of an event in a stream (SSE)."""
    if response.status_code != 200:
        await response.aread()
        reason = response.headers.get("WWW-Authenticate") or response.headers.get("Location")
        raise ValueError(f"HTTP {response.status_code}: {(reason or response.text)[:300]}")
    if not response.headers.get("Content-Type", "").lower().startswith("text/event-stream"):
        return json.loads(await response.aread())
    stream = b""
    async for chunk in response.aiter_bytes():
        *events, stream = re.split(rb"\r\n\r\n|\n\n|\r\r", stream + chunk)  # at blank lines
        for event in events:
            data = b"".join(line[5:] for line in event.splitlines() if line.startswith(b"data:"))
            if data.lstrip().startswith(b"{"):  # skips what is no JSON object
                reply = json.loads(data)
                if reply.get("id") == 1 and ("result" in reply or "error" in reply):
                    return reply
    raise ValueError("the stream ended without a response")


if __name__ == "__main__":
    # a failure is one line: no log and no warnings of libraries
    logging.disable()
    logging.captureWarnings(True)
    try:
        asyncio.run(asyncio.wait_for(main(), timeout=30))
    except (TimeoutError, UnicodeError, httpx.LocalProtocolError) as error:
        # these have no text, or one that can contain the token
        raise SystemExit(f"agent: {type(error).__name__}") from None
    except httpx.RequestError as error:
        raise SystemExit(f"agent: {error.request.url}: {error!r}") from None
    except Exception as error:
        raise SystemExit(f"agent: {error!r}") from None
