#!/usr/bin/env bash
# Registers the resource and a client, runs the agent with them, and checks that requests without a valid token for
# this resource are rejected. How it sends requests and where it runs the agent: tests/harness/common.sh.
set -euo pipefail
CDPATH='' cd "$(dirname "$0")"
. tests/harness/common.sh

# check NAME EXPECTED ACTUAL HELP: prints a line; ends the run unless ACTUAL matches EXPECTED, a regular expression.
check() {
  local actual
  actual=$(printable "$3")
  if [[ $actual =~ ^($2)$ ]]; then
    printf '✓ %-30s %s\n' "$1" "$actual"
  else
    printf '✗ %-30s %s\n' "$1" "$actual"
    fail "$1: expected $2, got ${actual:0:300}: $4"
  fi
}

# admin METHOD PATH [JSON]: sends a request to the admin API.
admin() {
  local headers="Authorization: Bearer $AUTHPLANE_ADMIN_API_KEY
Content-Type: application/json"
  request "$1" "$ADMIN_URL/admin/$2" "$headers" ${3+--data "$3"}
}

# delete_client: deletes the client, with the tokens that it still has.
delete_client() { admin DELETE "clients/$(jq -nr --arg id "$CLIENT_ID" '$id | @uri')?force=true"; }

# request_token SECRET SCOPE [RESOURCE]: sets actual to the status, with the error code if there is one. The client
# authenticates by HTTP Basic, with both halves percent-encoded: RFC 6749, section 2.3.1.
request_token() {
  local basic
  basic=$(ID=$CLIENT_ID SECRET=$1 jq -nr '"\(env.ID | @uri):\(env.SECRET | @uri)" | @base64')
  request POST "$AUTHSERVER_URL/oauth/token" "Authorization: Basic $basic" \
    --data grant_type=client_credentials --data-urlencode "scope=$2" ${3+--data-urlencode "resource=$3"}
  actual=$status
  if [ "$status" != 200 ]; then actual+=" $(json_field '.error | strings')"; fi
}

# clean_up: ends what this run has started and deletes its client, however the run ends.
clean_up() {
  local result=$?
  set +e
  trap '' HUP INT QUIT TERM
  if [ -n "$agent_pid" ]; then
    kill "$agent_pid" 2>/dev/null
    wait "$agent_pid" 2>/dev/null
    if [ -n "$network" ]; then docker rm --force "$container" >/dev/null 2>&1; fi
  fi
  if [ -z "$CLIENT_ID" ]; then # perhaps the last request has registered it
    CLIENT_ID=$(jq -r '.client_id | strings' "$work/body" 2>/dev/null)
  fi
  if [ -n "$CLIENT_ID" ]; then
    delete_client # 400 or 404: it is deleted already
    [[ $status =~ ^(204|400|404)$ ]] ||
      printf 'verify.sh: client %s was not deleted (%s): delete it manually\n' "$(printable "$CLIENT_ID")" "$status" >&2
  fi
  rm -rf "$work"
  exit "$result"
}

read_settings
CLIENT_ID='' # that of .env is not ours
scope=mcp:echo
network=''
agent_pid=''
container=02-agent-$$-$RANDOM
see_log="see the log of the authorization server"
work=$(mktemp -d "${TMPDIR:-/tmp}/tier02.XXXXXX")
trap clean_up EXIT
trap 'exit 1' HUP INT QUIT TERM

# The authorization server: where it is, and where the agent must run to reach it
request_metadata "$AUTHSERVER_URL"
check "discovery" 200 "$status" "is there an authorization server at $AUTHSERVER_URL? make run starts one"
issuer=$(json_field '.issuer | strings')
find_runtime "$issuer"
printf '  the agent runs %s\n' "$(printable "$runtime")"

# The MCP server rejects a request without a token
call_mcp ''
check "no token: rejected" "401 bearer resource_metadata" "$actual" "is there a protected MCP server at $MCP_URL?"

# The resource: registered once; 409 if it is there already
admin POST resources "$(jq -nc --arg uri "$RESOURCE_URI" --arg scope "$scope" '{slug: "demo-mcp", uri: $uri,
  backend_kind: "mint", display_name: "Demo MCP", scopes: [{name: $scope, description: "echo tool"}]}')"
check "resource: registered" "201|409" "$status" \
  "are AUTHPLANE_ADMIN_API_KEY and ADMIN_URL those of this tier 01? If make run has started it, make clean"

# The client: a new one for each run, since its secret is shown only once
admin POST clients "$(jq -nc --arg scope "$scope" '{client_name: "demo-agent-client", scope: $scope,
  grant_types: ["client_credentials"], token_endpoint_auth_method: "client_secret_basic"}')"
check "client: registered" 201 "$status" "$see_log"
CLIENT_ID=$(json_field '.client_id | strings')
CLIENT_SECRET=$(json_field '.client_secret | strings') # not in one line: bash can't run a trap between two $(…)
request_token "$CLIENT_SECRET" "$scope" "$RESOURCE_URI"
check "token: issued" 200 "$actual" \
  "if the resource demo-mcp was there already (409) with another uri, or without the scope $scope: make clean, or change it"
token=$(json_field .access_token)

# The agent
result=0
run_agent "$issuer" "$container" >"$work/agent" 2>&1 </dev/null &
agent_pid=$!
wait "$agent_pid" || result=$?
agent_pid=''
check "agent: accepted" "exit 0, MCP initialize OK" "exit $result, $(tail -n 1 "$work/agent")" \
  "see Troubleshooting in README.md"

# The authorization server issues a token only to this client, for its scope, for a registered resource
request_token not-the-secret "$scope" "$RESOURCE_URI"
check "wrong secret: rejected" "401 invalid_client" "$actual" "the authorization server must check the secret"
request_token "$CLIENT_SECRET" mcp:not-granted "$RESOURCE_URI"
check "scope not granted: rejected" "400 invalid_scope" "$actual" "the authorization server must not widen scopes"
request_token "$CLIENT_SECRET" "$scope" "$RESOURCE_URI/not-registered"
check "unknown resource: rejected" "400 invalid_(target|scope)" "$actual" \
  "the authorization server must reject a resource that is not registered"

# The MCP server accepts only tokens that were issued by this authorization server, for this resource
call_mcp "${token%??????????}AAAAAAAAAA"
check "tampered token: rejected" "401.*" "$actual" "the MCP server must verify the signature"
request_token "$CLIENT_SECRET" "$scope"
check "token without resource: issued" 200 "$actual" "$see_log"
call_mcp "$(json_field .access_token)"
check "different audience: rejected" "401.*" "$actual" "the MCP server must compare the audience with $RESOURCE_URI"

# The client is deleted, and gets no token any more
delete_client
check "client: deleted" 204 "$status" "delete the client manually"
request_token "$CLIENT_SECRET" "$scope" "$RESOURCE_URI"
check "deleted client: rejected" "401 invalid_client" "$actual" "the authorization server must reject a deleted client"
echo "ALL CHECKS PASSED"
