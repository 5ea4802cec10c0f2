# shellcheck shell=bash
# Requests to the three servers. Sourced after settings.sh; $work is a folder for what they write.
#
# Each function sets what the next lines of a script look at:
#   url         where the request went
#   status      the HTTP status, or "no response"
#   result      what check compares: the status, and what else matters of this response
#   curl_error  why there was no response
# The response is in the files headers and body of $work.

# request METHOD URL HEADERS [CURL OPTION]…: sends any request.
request() {
  local method=$1 headers=$3
  local options=(--disable --silent --show-error --max-time 10 --globoff) # a URL with [1-9] in it is one URL
  url=$2
  shift 3
  if is_local "$url"; then options+=(--noproxy '*'); fi
  options+=(--request "$method" --url "$url" --header @- "$@")
  options+=(--dump-header "$work/headers" --output "$work/body" --write-out '%{http_code}')
  : >"$work/headers"
  : >"$work/body"
  # The headers reach curl by standard input, because other processes can read arguments. While curl runs, signals are
  # ignored: the response to a registration has the id of the client that must be deleted.
  status=$(
    trap '' HUP INT QUIT TERM
    printf '%s\n' "$headers" | curl "${options[@]}" 2>"$work/curl"
  ) || status="no response"
  curl_error=$(tail -n 1 "$work/curl")
  result=$status
}

# json_field NAME: prints this string of the last response, a JSON object; exit 1 if it isn't there.
json_field() {
  jq -er --arg name "$1" '.[$name] | strings | select(. != "")' "$work/body" 2>/dev/null ||
    fail "$url: the response ($status) is not a JSON object with \"$1\""
}

# request_metadata URL: requests an authorization server's metadata; RFC 8414, section 3.1, inserts the path.
request_metadata() {
  [[ $1 =~ ^(https?://[^/]+)(.*)$ ]] || fail "the issuer $1: it must begin with http:// or https:// and a host"
  request GET "${BASH_REMATCH[1]}/.well-known/oauth-authorization-server${BASH_REMATCH[2]%/}" ''
}

# is_stand_in: true if the last response is the metadata of the stand-in.
is_stand_in() { [ "$(jq .stand_in "$work/body" 2>/dev/null)" = true ]; }

# request_admin METHOD PATH [CURL OPTION]…: sends a request to the admin API.
request_admin() {
  local method=$1 path=$2
  local headers="Authorization: Bearer $AUTHPLANE_ADMIN_API_KEY
Content-Type: application/json"
  shift 2
  request "$method" "$ADMIN_URL/admin/$path" "$headers" "$@"
}

# delete_client ID: deletes the client, although it can have valid tokens.
delete_client() { request_admin DELETE "clients/$(jq -nr --arg id "$1" '$id | @uri')?force=true"; }

# request_token ID SECRET [FIELD]…: requests an access token; each FIELD is a name=value of the form (RFC 6749, section
# 4.4.2). The client authenticates by HTTP Basic, with both halves percent-encoded (section 2.3.1). result has the error
# code, if there is one.
request_token() {
  local basic error field
  local form=(--data grant_type=client_credentials)
  basic=$(ID=$1 SECRET=$2 jq -nr '"\(env.ID | @uri):\(env.SECRET | @uri)" | @base64')
  shift 2
  for field in "$@"; do form+=(--data-urlencode "$field"); done
  request POST "$AUTHSERVER_URL/oauth/token" "Authorization: Basic $basic" "${form[@]}"
  error=$(jq -r '.error | strings' "$work/body" 2>/dev/null) || error=''
  if [ -n "$error" ]; then result+=" $error"; fi
}

# request_mcp TOKEN: POSTs what the agent POSTs, without a token if it is empty. result has what the challenge names of
# RFC 6750 and RFC 9728.
request_mcp() {
  local challenge word
  local headers="Accept: application/json, text/event-stream
Content-Type: application/json"
  if [ -n "$1" ]; then headers+="
Authorization: Bearer $1"; fi
  request POST "$MCP_URL" "$headers" --data '{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
    "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "demo-agent", "version": "0.1.0"}}}'
  challenge=$(grep -i '^www-authenticate:' "$work/headers" | tr '[:upper:]' '[:lower:]') || challenge=''
  for word in bearer invalid_token resource_metadata; do
    if [[ $challenge = *"$word"* ]]; then result+=" $word"; fi
  done
}
