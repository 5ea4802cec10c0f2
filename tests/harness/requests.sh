# shellcheck shell=bash
# Requests with curl. They need the settings, and a folder of their own in $work.

no_proxy_list="localhost,127.0.0.1,::1,${no_proxy-${NO_PROXY-}}"

# request METHOD URL HEADERS [CURL OPTION]…: sets status, 000 without a complete response; writes the files headers, body
# and error in $work. The headers reach curl by standard input: other processes can read arguments. The URL can come from a
# server: with --globoff, brackets in it don't make it many.
request() {
  local method=$1 url=$2 headers=$3
  shift 3
  status=$(printf '%s\n' "$headers" | curl --disable --silent --show-error --max-time 10 --max-filesize 1000000 \
    --noproxy "$no_proxy_list" --dump-header "$work/headers" --output "$work/body" --write-out '%{http_code}' \
    --request "$method" --header @- "$@" --globoff --url "$url" 2>"$work/error") || status=000
}

# json_field [JQ OPTION]… FILTER: prints what the filter finds in the last response, or nothing.
json_field() { jq -r "$@" "$work/body" 2>/dev/null || :; }

# request_metadata URL: requests an authorization server's metadata; RFC 8414, section 3.1, inserts the path.
request_metadata() {
  [[ $1 =~ ^(https?://[^/]+)(.*)$ ]] || fail "$1: it must begin with http:// or https:// and a host"
  request GET "${BASH_REMATCH[1]}/.well-known/oauth-authorization-server${BASH_REMATCH[2]%/}" ''
}

# call_mcp TOKEN: POSTs what the agent POSTs, without a token if it is empty. Sets actual to the status, followed by what
# the challenge has of RFC 6750 and RFC 9728.
call_mcp() {
  local challenge word headers="Accept: application/json, text/event-stream
Content-Type: application/json"
  [ -z "$1" ] || headers+="
Authorization: Bearer $1"
  request POST "$MCP_URL" "$headers" --data '{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion":
    "2025-11-25", "capabilities": {}, "clientInfo": {"name": "demo-agent", "version": "0.1.0"}}}'
  actual=$status
  challenge=$(grep -is '^www-authenticate:' "$work/headers") || challenge=''
  for word in Bearer invalid_token resource_metadata; do
    [[ $challenge != *"$word"* ]] || actual+=" $word"
  done
}
