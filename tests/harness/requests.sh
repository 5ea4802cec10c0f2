# shellcheck shell=bash
# Sends requests to the authorization server, its admin API and the MCP server, and checks the responses. Uses settings.sh; $work
# is a folder for the responses.
#
# Each function that sends a request sets
#   url         where the request went
#   status      the HTTP status, or "no response"
#   actual      what check compares: the status, and what else matters in this response
#   curl_error  why there was no response
# and leaves the response in the files headers and body of $work.
url=''

# request METHOD URL HEADERS [CURL OPTION]…: sends any request.
request() {
  local method=$1 headers=$3
  # --disable: curl must not read ~/.curlrc. --globoff: it must not expand brackets in a URL
  local options=(--disable --silent --show-error --max-time 10 --globoff)
  url=$2
  shift 3
  if is_local "$url"; then options+=(--noproxy '*'); fi
  options+=(--request "$method" --url "$url" --header @- "$@")
  options+=(--dump-header "$work/headers" --output "$work/body" --write-out '%{http_code}')
  : >"$work/headers"
  : >"$work/body"
  # The headers reach curl through its standard input, because other processes can read its arguments. Signals are ignored while
  # curl runs, because the response to a registration has the id of the client, which clean_up has to delete.
  status=$(
    trap '' HUP INT QUIT TERM
    printf '%s\n' "$headers" | curl "${options[@]}" 2>"$work/curl"
  ) || status="no response"
  curl_error=$(head -n 1 "$work/curl")
  actual=$status
}

# json_field NAME: prints this string of the last response, a JSON object; exit 1 if it isn't there.
json_field() {
  jq -er --arg name "$1" '.[$name] | strings | select(. != "")' "$work/body" 2>/dev/null ||
    fail "$url: the response ($status) is not a JSON object with \"$1\""
}

# request_metadata ISSUER: requests the metadata of an authorization server. The path of the issuer comes last (RFC 8414,
# section 3.1).
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

# delete_client ID: deletes a client. force=true, because it can have valid tokens.
delete_client() { request_admin DELETE "clients/$(jq -nr --arg id "$1" '$id | @uri')?force=true"; }

# request_token ID SECRET [FIELD]…: requests an access token; each FIELD is a name=value of the form (RFC 6749, section
# 4.4.2). The client authenticates with HTTP Basic, with its id and its secret percent-encoded (section 2.3.1). actual also has
# the error code, if there is one.
request_token() {
  local basic error field
  local form=(--data grant_type=client_credentials)
  basic=$(ID=$1 SECRET=$2 jq -nr '"\(env.ID | @uri):\(env.SECRET | @uri)" | @base64')
  shift 2
  for field in "$@"; do form+=(--data-urlencode "$field"); done
  request POST "$AUTHSERVER_URL/oauth/token" "Authorization: Basic $basic" "${form[@]}"
  error=$(jq -r '.error | strings' "$work/body" 2>/dev/null) || error=''
  if [ -n "$error" ]; then actual+=" $error"; fi
}

# request_mcp TOKEN: POSTs what the agent POSTs, with this token unless it is empty. actual also has the words of RFC 6750 and
# RFC 9728 that are in the challenge (WWW-Authenticate).
request_mcp() {
  local challenge word
  local headers="Accept: application/json, text/event-stream
Content-Type: application/json"
  if [ -n "$1" ]; then headers+=$'\n'"Authorization: Bearer $1"; fi
  request POST "$MCP_URL" "$headers" --data '{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {
    "protocolVersion": "2025-11-25", "capabilities": {}, "clientInfo": {"name": "demo-agent", "version": "0.1.0"}}}'
  challenge=$(grep -i '^www-authenticate:' "$work/headers" | tr '[:upper:]' '[:lower:]') || challenge=''
  for word in bearer invalid_token resource_metadata; do
    if [[ $challenge = *"$word"* ]]; then actual+=" $word"; fi
  done
}

# check NAME EXPECTED HELP: prints actual, and fails unless it matches EXPECTED, a regular expression. The message has HELP, and
# the response if it is an error. Other responses are not shown: they can contain a token or a secret.
check() {
  local reason=''
  if [[ $actual =~ ^($2)$ ]]; then
    printf '✓ %-30s %s\n' "$1" "$actual"
    return
  fi
  printf '✗ %s\n' "$1"
  case $status in
    "no response") reason=$curl_error ;;
    [45]??) reason=$(head -c 300 "$work/body") ;;
  esac
  fail "$1: expected $2, got ${actual:0:600}${reason:+ ($reason)}: $3"
}
