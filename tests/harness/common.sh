# shellcheck shell=bash
# What verify.sh and run.sh share: settings, requests, and where the agent runs. Sourced at the top of the repository.
umask 077
export LC_ALL=C # a file or a response may have any bytes

# printable TEXT: prints at most 600 characters of it, without control characters, whoever wrote it.
printable() {
  local text=${1:0:600}
  printf '%s' "${text//[![:print:]]/?}"
}

# fail MESSAGE: prints one line on standard error; exit 1.
fail() {
  printf '%s: %s\n' "${0##*/}" "$(printable "$1")" >&2
  exit 1
}

# read_settings: sets what .env.example names. The environment wins over .env, and .env over .env.example: the first that
# sets a name. The files are read, not executed, and nothing is exported.
read_settings() {
  local file line name
  local pattern='^(export )?([A-Z][A-Z0-9_]*)=("([^"]*)"|'\''([^'\'']*)'\''|([^[:space:]]*))'
  for file in .env .env.example; do
    [ -f "$file" ] || continue
    while IFS= read -r line || [ -n "$line" ]; do
      [[ ${line#$'\xef\xbb\xbf'} =~ $pattern ]] || continue # it can begin with a byte order mark
      name=${BASH_REMATCH[2]}
      if [ -z "${!name+set}" ]; then printf -v "$name" '%s' "${BASH_REMATCH[4]}${BASH_REMATCH[5]}${BASH_REMATCH[6]}"; fi
    done <"$file"
  done
  export -n AUTHPLANE_ADMIN_API_KEY
  for name in curl jq; do
    command -v "$name" >/dev/null || fail "$name is missing: install it, for example with apt-get or brew install $name"
  done
  for name in AUTHSERVER_URL ADMIN_URL MCP_URL; do
    [[ ${!name} =~ ^https?://[^/?#]+ ]] || fail "$name=${!name}: it must begin with http:// or https:// and a host"
  done
  AUTHSERVER_URL=${AUTHSERVER_URL%/} ADMIN_URL=${ADMIN_URL%/}
}

# is_local URL: true if its host is this machine.
is_local() { [[ $1 =~ ^https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?(/.*)?$ ]]; }

# request METHOD URL HEADERS [CURL OPTION]…: sets status, to what curl says if there is no complete response; writes the
# files headers and body in $work. The headers reach curl by standard input: other processes can read arguments. curl
# ignores signals, so that what was done is known. The URL can come from a server: with --globoff, brackets in it don't make
# it many.
request() {
  local method=$1 headers=$3
  url=$2
  shift 3
  : >"$work/headers" >"$work/body"
  if is_local "$url"; then set -- "$@" --noproxy '*'; fi
  status=$(trap '' HUP INT QUIT TERM && printf '%s\n' "$headers" | curl --disable --silent --show-error --max-time 10 \
    --dump-header "$work/headers" --output "$work/body" --write-out '%{http_code}' \
    --request "$method" --header @- "$@" --globoff --url "$url" 2>&1) || status="no response, "${status%$'\n'*}
}

# json_field FILTER: prints what the filter finds in the last response; exit 1 if that is not JSON.
json_field() { jq -r "$1" "$work/body" 2>"$work/error" || fail "$url: $status, but $(tail -n 1 "$work/error")"; }

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
  if [ -n "$1" ]; then headers+=$'\n'"Authorization: Bearer $1"; fi
  request POST "$MCP_URL" "$headers" --data '{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion":
    "2025-11-25", "capabilities": {}, "clientInfo": {"name": "demo-agent", "version": "0.1.0"}}}'
  actual=$status
  challenge=$(grep -is '^www-authenticate:' "$work/headers" | tr '[:upper:]' '[:lower:]') || challenge=''
  for word in bearer invalid_token resource_metadata; do
    if [[ $challenge = *"$word"* ]]; then actual+=" $word"; fi
  done
}

# find_runtime ISSUER: sets network, empty if the agent runs on this host, and runtime, the same in words. The network is
# that of the container which publishes the port of AUTHSERVER_URL.
find_runtime() {
  network='' runtime="on this host: the issuer is $1"
  [ -n "$1" ] || fail "the metadata at $AUTHSERVER_URL has no issuer: is it an authorization server?"
  request_metadata "$1"
  # a company's proxy can have a page for every name, which need not be JSON
  if [ "$status" = 200 ] && [ "$(json_field '.issuer | strings' 2>/dev/null)" = "$1" ]; then return; fi
  network=$(docker ps --filter "publish=${AUTHSERVER_URL##*:}" --format '{{.Networks}}' 2>/dev/null) || network=''
  runtime="in network $network: the issuer $1 is not reachable from this host"
  [ -n "$network" ] || fail "the issuer $1 is not reachable from this host, and no container has the port of $AUTHSERVER_URL"
}

# run_agent ISSUER CONTAINER: runs the agent with its settings; the container gets that name. exec, so that a signal reaches
# it.
run_agent() {
  export AUTHPLANE_ISSUER=$1 CLIENT_ID CLIENT_SECRET RESOURCE_URI MCP_URL MCP_SERVER_NAME AUTHPLANE_DEV_MODE
  if [[ $1 = https://* ]]; then AUTHPLANE_DEV_MODE=''; fi # it is for plain http, and .env.example has it
  if [ -n "$network" ]; then
    export TIER01_NETWORK=$network
    exec docker compose --env-file /dev/null run --rm --no-TTY --name "$2" agent
  fi
  if is_local "$1" && is_local "$MCP_URL"; then
    # whatever proxy and certificates are configured; Python prefers lower case
    export no_proxy='*'
    unset SSL_CERT_FILE SSL_CERT_DIR
  fi
  exec .venv/bin/python -I agent.py
}
