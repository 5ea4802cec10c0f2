#!/usr/bin/env bash
# Registers the resource and a client, runs the agent with them, and proves that everybody else is turned away.
set -euo pipefail
umask 077
cd "$(dirname "$0")"
# shellcheck source=tests/settings.sh
. tests/settings.sh
setting MCP_SERVER_NAME demo-server
setting AUTHPLANE_DEV_MODE true
setting NETWORK_MCP_URL http://mcp-server:8080/mcp
export -n AUTHPLANE_ADMIN_API_KEY # the agent has no use for it

slug=demo-mcp scope=mcp:echo client_id='' agent='' container=''
green='' red='' plain=''
if [ -t 1 ] && [ -z "${NO_COLOR-}" ]; then green=$'\e[32m' red=$'\e[31m' plain=$'\e[0m'; fi

# prove WHAT EXPECTED CAME HELP: prints a line; ends the run unless CAME matches EXPECTED, a regular expression.
prove() {
  local came
  came=$(printable "${3/#000/no answer}")
  if [[ $3 =~ ^($2)$ ]]; then
    printf '%s✓%s %-30s %s\n' "$green" "$plain" "$1" "$came"
  else
    printf '%s✗%s %-30s %s\n' "$red" "$plain" "$1" "$came"
    fail "$1: expected $2, got $came: $4"
  fi
}

# member [JQ OPTION]… FILTER: what the filter finds in the body of the last answer, or nothing.
member() { printf '%s' "$body" | jq -r "$@" 2>/dev/null || :; }

# admin METHOD PATH [JSON]: asks the admin API.
admin() {
  ask "$1" "$ADMIN_URL/admin/$2" "Authorization: Bearer $AUTHPLANE_ADMIN_API_KEY
Content-Type: application/json" ${3+--data "$3"}
}

# mint SCOPE [RESOURCE]: asks for an access token; came is the status, with the error code if there is one.
mint() {
  ask POST "$ISSUER_URL/oauth/token" "Authorization: Basic $basic" --data grant_type=client_credentials \
    --data-urlencode "scope=$1" ${2+--data-urlencode "resource=$2"}
  came=$status
  [ "$status" = 200 ] || came+=" $(member '.error // empty')"
}

# call_mcp [TOKEN]: POSTs what the agent POSTs; came is the status, with what matters of the challenge.
call_mcp() {
  ask POST "$MCP_URL" "Accept: application/json, text/event-stream
Content-Type: application/json${1+
Authorization: Bearer $1}" --data "$initialize"
  came="$status$(grep -i '^www-authenticate:' <<<"$headers" |
    grep -oE ' Bearer |invalid_token|resource_metadata' | tr -d ' ' | awk '{ printf " %s", $0 }' || :)"
}

# delete_client: takes the client away, with the tokens that it still has.
delete_client() {
  admin DELETE "clients/$client_id?force=true"
  [ "$status" != 204 ] || client_id=''
}

# However the run ends, neither the agent nor the client outlives it.
clean_up() {
  local result=$?
  trap '' HUP INT TERM
  if [ -n "$agent" ]; then kill "$agent" && wait "$agent" || :; fi 2>/dev/null
  [ -z "$container" ] || docker rm --force "$container" >/dev/null 2>&1 || :
  if [ -n "$client_id" ]; then
    delete_client
    [ -z "$client_id" ] || echo "verify.sh: client $client_id stays: DELETE was answered ${status/000/not at all}: delete it by hand" >&2
  fi
  rm -rf "$work"
  exit "$result"
}
work=$(mktemp -d)
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM

deadline=$((SECONDS + 10)) status=000
until [ "$status" = 200 ] || [ "$SECONDS" -ge "$deadline" ]; do
  ask GET "$METADATA_URL" ''
  [ "$status" = 200 ] || sleep 0.2
done
prove "discovery" 200 "$status" "no authorization server at $ISSUER_URL: make run starts one"
find_place
if [ "$place" = "on this host" ]; then
  [ -x .venv/bin/python ] || fail "the agent has no .venv: make run prepares it"
  run=(.venv/bin/python agent.py)
else
  docker network inspect "$TIER01_NETWORK" >/dev/null 2>&1 ||
    fail "there is no Docker network $TIER01_NETWORK: start tier 01 in containers, or set TIER01_NETWORK"
  docker image inspect "$(agent_image)" >/dev/null 2>&1 ||
    fail "the agent's image is missing: make run builds it"
  container=02-agent-$$-$RANDOM
  run=(docker compose run --rm --no-TTY --name "$container" -e AUTHPLANE_ISSUER -e CLIENT_ID -e CLIENT_SECRET
    -e RESOURCE_URI -e MCP_URL -e MCP_SERVER_NAME -e AUTHPLANE_DEV_MODE agent)
fi
printf '  agent %s: %s\n' "$place" "$(printable "$why")"

initialize='{"jsonrpc": "2.0", "id": 1, "method": "initialize", "params": {"protocolVersion": "2025-11-25",
  "capabilities": {}, "clientInfo": {"name": "demo-agent", "version": "0.1.0"}}}'
call_mcp
prove "no token: refused" "401 Bearer resource_metadata" "$came" "is there a protected MCP server at $MCP_URL?"

admin GET "resources?slug=$slug"
if [ "$status" = 404 ]; then
  admin POST resources "$(jq -nc --arg slug "$slug" --arg uri "$RESOURCE_URI" --arg scope "$scope" '{slug: $slug,
    uri: $uri, backend_kind: "mint", display_name: "Demo MCP", scopes: [{name: $scope, description: "echo tool"}]}')"
  [ "$status" != 409 ] || admin GET "resources?slug=$slug" # another run was faster
fi
case $status in
  000) help="the admin API does not answer at ADMIN_URL=$ADMIN_URL" ;;
  401) help="AUTHPLANE_ADMIN_API_KEY is not the key of $ADMIN_URL" ;;
  20?) help="PATCH $ADMIN_URL/admin/resources/$(member .id) to $RESOURCE_URI with $scope, or set RESOURCE_URI" ;;
  *) help="see the log of the authorization server" ;;
esac
# shellcheck disable=SC2016 # the variables are jq's
came="$status $(member --arg uri "$RESOURCE_URI" --arg scope "$scope" \
  'if .uri == $uri and any(.scopes[]; .name == $scope) then .slug elif .uri then "\(.uri) \([.scopes[]?.name])" else empty end')"
came=${came% } # an error has no uri
prove "resource: registered" "20[01] $slug" "$came" "$help"

caught='' # from here until its id is known, an interrupt would leave a client behind
trap 'caught=129' HUP
trap 'caught=130' INT
trap 'caught=143' TERM
unstoppable=yes admin POST clients '{"client_name": "demo-agent-client", "grant_types": ["client_credentials"],
  "token_endpoint_auth_method": "client_secret_basic", "scope": "'"$scope"'"}'
credentials=$(trap '' HUP INT TERM && member 'select((.client_id // "") | test("^[A-Za-z0-9._~-]+$")) | "\(.client_id):\(.client_secret)"')
client_id=${credentials%%:*} client_secret=${credentials#*:}
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
[ -z "$caught" ] || exit "$caught"
prove "client: registered" 201 "$status" "see the log of the authorization server"
basic=$(printf '%s' "$credentials" | base64 | tr -d '\n')

agent_url=$MCP_URL
[ "$place" = "on this host" ] || agent_url=$NETWORK_MCP_URL
AUTHPLANE_ISSUER=$issuer CLIENT_ID=$client_id CLIENT_SECRET=$client_secret RESOURCE_URI=$RESOURCE_URI \
  MCP_URL=$agent_url MCP_SERVER_NAME=$MCP_SERVER_NAME AUTHPLANE_DEV_MODE=$AUTHPLANE_DEV_MODE \
  "${run[@]}" >"$work/agent" 2>&1 </dev/null &
agent=$!
result=0
wait "$agent" || result=$?
agent=''
prove "agent: let in" "0 authenticated MCP initialize OK" "$result $(tail -n 1 "$work/agent")" "see README, troubleshooting"

mint "$scope" "$RESOURCE_URI"
prove "right credentials: minted" 200 "$came" "see the log of the authorization server"
token=$(member .access_token)

right=$basic basic=$(printf '%s:%s' "$client_id" not-the-secret | base64 | tr -d '\n')
mint "$scope" "$RESOURCE_URI"
prove "wrong secret: refused" "401 invalid_client" "$came" "the authorization server must check the secret"
basic=$right
mint mcp:not-granted "$RESOURCE_URI"
prove "scope not granted: refused" "400 invalid_scope" "$came" "the authorization server must not widen scopes"
mint "$scope" "$RESOURCE_URI/not-registered"
prove "unknown resource: refused" "400 invalid_(target|scope)" "$came" "the authorization server must know the resource"

call_mcp "${token%??????????}AAAAAAAAAA"
prove "tampered token: refused" "401.*" "$came" "the MCP server must verify the signature"
mint "$scope"
prove "other audience: minted" 200 "$came" "see the log of the authorization server"
call_mcp "$(member .access_token)"
prove "other audience: refused" "401.*" "$came" "the MCP server must compare the audience with $RESOURCE_URI"

deleted=$client_id
delete_client
prove "client: deleted" 204 "$status" "delete $deleted by hand"
mint "$scope" "$RESOURCE_URI"
prove "deleted client: refused" "401 invalid_client" "$came" "the authorization server must forget $deleted"
printf '%sALL CHECKS PASSED%s\n' "$green" "$plain"
