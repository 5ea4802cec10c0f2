# shellcheck shell=bash
# Requests with curl. They need the settings, and a folder of their own in $work.

# request METHOD URL HEADERS [CURL OPTION]…: sets status, 000 without a complete response; writes the files headers, body
# and error in $work. The headers reach curl by standard input: other processes can read arguments. A URL may come from a
# server: it is one URL, whatever brackets it has. An endless response ends at the size of a file that ulimit allows.
request() {
  local method=$1 url=$2 sent=$3
  shift 3
  rm -f "$work/headers" "$work/body"
  status=$(
    ulimit -f 128
    printf '%s\n' "$sent" | curl --disable --silent --show-error --max-time 10 --noproxy "$no_proxy_list" \
      --suppress-connect-headers --dump-header "$work/headers" --output "$work/body" --write-out '%{http_code}' \
      --request "$method" --header @- "$@" --globoff --url "$url" 2>"$work/error"
  ) || status=000
  [ "$status" != 000 ] || [ -s "$work/error" ] || echo "the response is too large" >"$work/error"
}
no_proxy_list="localhost,127.0.0.1,::1,${no_proxy-${NO_PROXY-}}"

# json_field [JQ OPTION]… FILTER: prints what the filter finds in the last response, or nothing.
json_field() { jq -r "$@" "$work/body" 2>/dev/null || :; }

# request_metadata URL: asks an authorization server for its metadata; RFC 8414, section 3.1, inserts the path.
request_metadata() {
  [[ $1 =~ ^(https?://[^/]+)(.*)$ ]] || fail "$1: it must begin with http:// or https:// and a host"
  request GET "${BASH_REMATCH[1]}/.well-known/oauth-authorization-server${BASH_REMATCH[2]%/}" ''
}

# call_mcp TOKEN: POSTs what the agent POSTs, without a token if it is empty. Sets actual to the status, followed by what
# the challenge has of RFC 6750 and RFC 9728.
call_mcp() {
  local challenge word
  request POST "$MCP_URL" "Accept: application/json, text/event-stream
Content-Type: application/json${1:+
Authorization: Bearer $1}" --data '{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion":
    "2025-11-25", "capabilities": {}, "clientInfo": {"name": "demo-agent", "version": "0.1.0"}}}'
  actual=$status
  challenge=$(LC_ALL=C sed -n 's/^[Ww][Ww][Ww]-[Aa]uthenticate://p' "$work/headers" 2>/dev/null) || challenge=''
  for word in ' Bearer ' invalid_token resource_metadata; do
    [[ $challenge != *"$word"* ]] || actual+=" ${word// /}"
  done
}
