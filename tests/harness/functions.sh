# shellcheck shell=bash
# What verify.sh and tier01.sh share: settings, requests, checks, where the agent runs, and one end for every run.
# Sourced at the top of the repository.

# value_in FILE NAME [PREFIX]: prints what the file sets NAME to. The file is read, not executed.
value_in() {
  [ ! -f "$1" ] || sed -nE "s/^${3-}[[:space:]]*(export[[:space:]]+)?$2[[:space:]]*=//p" "$1" | tail -n 1 |
    sed -E -e "s/^[[:space:]]*(\"([^\"]*)\"|'([^']*)').*/\2\3/" -e t -e 's/[[:space:]]+(#.*)?$//' -e 's/^[[:space:]]+//'
}

# setting NAME: sets NAME to its value in the environment, else in .env, else to its default in .env.example.
setting() {
  local value=${!1-}
  [ -n "$value" ] || value=$(value_in .env "$1")
  [ -n "$value" ] || value=$(value_in .env.example "$1" '(# )?')
  printf -v "$1" '%s' "$value"
}

# fail MESSAGE: prints one line without control characters, whoever wrote it, on standard error; exit 1.
fail() {
  printf '%s: %s\n' "${0##*/}" "${1//[![:print:]]/ }" >&2
  exit 1
}

# request METHOD URL HEADERS [CURL OPTION]…: sets status, 000 without a complete response; writes $headers and $body.
# The headers reach curl by standard input: other processes can read arguments. A URL may come from a server: it can
# name no other scheme, option or file. An endless response ends at the size of a file that ulimit allows.
request() {
  local method=$1 url=$2 sent=$3
  shift 3
  rm -f "$headers" "$body"
  status=$({
    ulimit -f 128
    printf '%s\n' "$sent" | curl --disable --silent --show-error --connect-timeout 3 --max-time 10 \
      --suppress-connect-headers --dump-header "$headers" --output "$body" --write-out '%{http_code}' \
      --request "$method" --header @- "$@" --globoff --proto =http,https --url "$url"
  } 2>"$work/error") || status=000
}

# json_field [JQ OPTION]… FILTER: prints what the filter finds in the last response, or nothing.
json_field() { jq -r "$@" "$body" 2>/dev/null || :; }

# admin METHOD PATH [JSON]: sends a request to the admin API.
admin() {
  request "$1" "$ADMIN_URL/admin/$2" "Authorization: Bearer $AUTHPLANE_ADMIN_API_KEY
Content-Type: application/json" ${3+--data "$3"}
}

# register_client JSON: sets status, client_id and client_secret. A signal can't come between the registration and the
# record of it in $work/client, which clean_up reads.
register_client() {
  status=$(trap '' HUP INT TERM && body=$work/client && admin POST clients "$1" && printf '%s' "$status")
  client_id=$(client_field client_id) client_secret=$(client_field client_secret)
  [ -n "$client_id$client_secret" ] || status+=" without client_id and client_secret"
}
client_field() { jq -r ".$1 | strings | select(test(\"^[A-Za-z0-9._~-]+$\"))" "$work/client" 2>/dev/null || :; }

# delete_client: deletes the client with the tokens that it still has, and the record of it.
delete_client() {
  admin DELETE "clients/$client_id?force=true"
  [ "$status" != 204 ] || rm -f "$work/client"
}

# request_token SECRET SCOPE [RESOURCE]: sets actual to the status, with the error code if there is one.
request_token() {
  request POST "$ISSUER_URL/oauth/token" "Authorization: Basic $(printf '%s:%s' "$client_id" "$1" | base64 | tr -d '\n')" \
    --data grant_type=client_credentials --data-urlencode "scope=$2" ${3+--data-urlencode "resource=$3"}
  actual=$status
  [ "$status" = 200 ] || actual+=" $(json_field '.error // empty')"
}

# call_mcp TOKEN: POSTs what the agent POSTs, without a token if it is empty; sets actual to the status, with the
# challenge in short.
call_mcp() {
  request POST "$MCP_URL" "Accept: application/json, text/event-stream
Content-Type: application/json${1:+
Authorization: Bearer $1}" --data '{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion":
    "2025-11-25", "capabilities": {}, "clientInfo": {"name": "demo-agent", "version": "0.1.0"}}}'
  actual="$status$(sed -n 's/^[Ww][Ww][Ww]-[Aa]uthenticate://p' "$headers" 2>/dev/null |
    grep -oE ' Bearer |invalid_token|resource_metadata' | tr -d ' ' | awk '{ printf " %s", $0 }' || :)"
}

# check NAME EXPECTED ACTUAL HELP: prints a line; ends the run unless ACTUAL matches EXPECTED, a regular expression.
check() {
  local actual=$3 mark="$green✓$plain"
  [[ $actual != 000* ]] || actual="no response ($(tail -n 1 "$work/error"))"
  [[ $actual =~ ^($2)$ ]] || mark="$red✗$plain"
  printf '%s %-30s %s\n' "$mark" "$1" "${actual//[![:print:]]/ }"
  [[ $actual =~ ^($2)$ ]] || fail "$1: expected $2, got $actual: $4"
}

# docker_running: true if a Docker Engine is running, with Compose v2.
docker_running() { docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; }

# find_agent_image: sets agent_image to the name of the image that docker-compose.yml builds.
find_agent_image() {
  agent_image=$(docker compose --profile manual config --images 2>"$work/error") ||
    fail "docker compose can't parse .env or docker-compose.yml: $(tail -n 1 "$work/error")"
}

# find_runtime: sets issuer, runtime (where the agent runs) and reason; the last response must be the metadata.
find_runtime() {
  local network="in network $TIER01_NETWORK"
  issuer=$(json_field '.issuer | strings') runtime="on this host" reason="TIER01=$TIER01"
  case $TIER01,$issuer in
    *,) fail "the metadata at $ISSUER_URL has no issuer: is it an authorization server?" ;;
    docker,*) runtime=$network ;;
    ,http*://localhost | ,http*://localhost[:/]* | ,http*://127.0.0.1[:/]*) reason="the issuer is $issuer" ;;
    ,*)
      request GET "$issuer/.well-known/oauth-authorization-server" ''
      reason="the issuer $issuer is reachable from this host"
      [ "$status" = 200 ] || runtime=$network reason="the issuer $issuer is not reachable from this host"
      ;;
  esac
  case $AUTHPLANE_DEV_MODE,$issuer in ,http://*) AUTHPLANE_DEV_MODE=true ;; esac
  [ "$runtime" = "on this host" ] || docker_running || fail "the agent must run $runtime ($reason): start Docker"
}

# find_agent: sets run to the command that runs the agent, container to the name of its container, and agent_url.
find_agent() {
  run=(.venv/bin/python agent.py) agent_url=$MCP_URL
  if [ "$runtime" = "on this host" ]; then
    [ -x .venv/bin/python ] || fail "the agent has no .venv: make run prepares it"
  else
    docker network inspect "$TIER01_NETWORK" >/dev/null 2>&1 ||
      fail "there is no Docker network $TIER01_NETWORK: make clean, then TIER01=docker make verify; or set TIER01_NETWORK"
    find_agent_image
    docker image inspect "$agent_image" >/dev/null 2>&1 || fail "the agent's image is missing: make run builds it"
    agent_url=$NETWORK_MCP_URL container=02-agent-$$-$RANDOM
    run=(docker compose run --rm --no-TTY --name "$container" -e AUTHPLANE_ISSUER -e CLIENT_ID -e CLIENT_SECRET
      -e RESOURCE_URI -e MCP_URL -e MCP_SERVER_NAME -e AUTHPLANE_DEV_MODE agent)
  fi
}

# run_agent: sets actual to the exit status of the agent and the last line that it printed.
run_agent() {
  local result=0
  AUTHPLANE_ISSUER=$issuer CLIENT_ID=$client_id CLIENT_SECRET=$client_secret RESOURCE_URI=$RESOURCE_URI \
    MCP_URL=$agent_url MCP_SERVER_NAME=$MCP_SERVER_NAME AUTHPLANE_DEV_MODE=$AUTHPLANE_DEV_MODE \
    "${run[@]}" >"$work/agent" 2>&1 </dev/null &
  agent=$!
  wait "$agent" || result=$?
  agent='' actual="exit $result, $(tail -n 1 "$work/agent")"
}

# clean_up: ends what this run has started and deletes its client, however the run ends. on_exit is tier01.sh's.
clean_up() {
  if [ -n "$agent" ]; then kill "$agent" && wait "$agent" || :; fi 2>/dev/null
  [ -z "$container" ] || docker rm --force "$container" >/dev/null 2>&1 || :
  client_id=$(client_field client_id)
  if [ -n "$client_id" ] && delete_client && [ "$status" != 204 ]; then
    echo "${0##*/}: client $client_id was not deleted (${status/000/no response}): delete it manually" >&2
  fi
  "$on_exit"
  rm -rf "$work"
}

for tool in curl jq; do
  command -v "$tool" >/dev/null || fail "$tool is missing: install it, for example with apt-get or brew install $tool"
done
for name in ISSUER_URL ADMIN_URL MCP_URL RESOURCE_URI AUTHPLANE_ADMIN_API_KEY TIER01 TIER01_NETWORK; do setting "$name"; done
for name in ISSUER_URL ADMIN_URL MCP_URL; do
  [[ ${!name} =~ ^https?://[^/]+ ]] || fail "$name=${!name}: it must begin with http:// or https:// and a host"
done
case $TIER01 in '' | native | docker) ;; *) fail "TIER01=$TIER01: it can be native or docker" ;; esac
ISSUER_URL=${ISSUER_URL%/} ADMIN_URL=${ADMIN_URL%/} AUTHPLANE_DEV_MODE=${AUTHPLANE_DEV_MODE:-$(value_in .env AUTHPLANE_DEV_MODE)}
export -n AUTHPLANE_ADMIN_API_KEY # for the authorization server and its admin API only
export TIER01_NETWORK             # for docker-compose.yml
export NO_PROXY="localhost,127.0.0.1,::1${NO_PROXY:+,$NO_PROXY}" no_proxy="localhost,127.0.0.1,::1${no_proxy:+,$no_proxy}"

work=$(mktemp -d) headers=$work/headers body=$work/body agent='' container='' on_exit=: green='' red='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR-}" ]; then green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'; fi
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'result=$?; trap "" HUP INT TERM; clean_up; exit "$result"' EXIT
