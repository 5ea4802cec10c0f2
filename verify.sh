#!/usr/bin/env bash
# Registers the resource and a client, runs the agent with them, and checks that requests without a valid token for
# this resource are rejected. How it sends requests, checks and cleans up: tests/harness/functions.sh.
set -euo pipefail
umask 077
cd "$(dirname "$0")"
# shellcheck source=tests/harness/functions.sh
. tests/harness/functions.sh
setting MCP_SERVER_NAME
setting NETWORK_MCP_URL
slug=demo-mcp scope=mcp:echo log="see the log of the authorization server"

# The authorization server: where it is, and where the agent must run to reach it
request GET "$ISSUER_URL/.well-known/oauth-authorization-server" ''
check "discovery" 200 "$status" "no authorization server at $ISSUER_URL: make run starts one"
find_runtime
find_agent
printf '  the agent runs %s: %s\n' "$runtime" "${reason//[![:print:]]/ }"

# The MCP server rejects a request without a token
call_mcp ''
check "no token: rejected" "401 Bearer resource_metadata" "$actual" "is there a protected MCP server at $MCP_URL?"

# The resource: registered once, and compared if it is there already
admin GET "resources?slug=$slug"
if [ "$status" = 404 ]; then
  admin POST resources "$(jq -nc --arg slug "$slug" --arg uri "$RESOURCE_URI" --arg scope "$scope" '{slug: $slug,
    uri: $uri, backend_kind: "mint", display_name: "Demo MCP", scopes: [{name: $scope, description: "echo tool"}]}')"
  [ "$status" != 409 ] || admin GET "resources?slug=$slug" # another run was faster
fi
# shellcheck disable=SC2016 # the variables are jq's
actual="$status $(json_field --arg uri "$RESOURCE_URI" --arg scope "$scope" 'if .uri == $uri and
  any(.scopes[]; .name == $scope) then .slug elif .uri then "\(.id): \(.uri) \([.scopes[]?.name])" else empty end')"
help="are AUTHPLANE_ADMIN_API_KEY and ADMIN_URL those of this tier 01?"
[ "$status" != 200 ] || help="set RESOURCE_URI, or PATCH $ADMIN_URL/admin/resources/ID to that uri and scope, or make clean"
check "resource: registered" "20[01] $slug" "${actual% }" "$help"

# The client: a new one for each run, since its secret is shown only once
register_client '{"client_name": "demo-agent-client", "grant_types": ["client_credentials"],
  "token_endpoint_auth_method": "client_secret_basic", "scope": "'"$scope"'"}'
check "client: registered" 201 "$status" "$log"

# The agent
run_agent
check "agent: accepted" "exit 0, authenticated MCP initialize OK" "$actual" "see README, troubleshooting"

# The authorization server issues a token only to this client, for its scope, for a registered resource
request_token "$client_secret" "$scope" "$RESOURCE_URI"
check "token: issued" 200 "$actual" "$log"
token=$(json_field .access_token)
request_token not-the-secret "$scope" "$RESOURCE_URI"
check "wrong secret: rejected" "401 invalid_client" "$actual" "the authorization server must check the secret"
request_token "$client_secret" mcp:not-granted "$RESOURCE_URI"
check "scope not granted: rejected" "400 invalid_scope" "$actual" "the authorization server must not widen scopes"
request_token "$client_secret" "$scope" "$RESOURCE_URI/not-registered"
check "unknown resource: rejected" "400 invalid_(target|scope)" "$actual" "the authorization server must reject a resource that is not registered"

# The MCP server accepts only tokens that were issued by this authorization server, for this resource
call_mcp "${token%??????????}AAAAAAAAAA"
check "tampered token: rejected" "401.*" "$actual" "the MCP server must verify the signature"
request_token "$client_secret" "$scope"
check "different audience: issued" 200 "$actual" "$log"
call_mcp "$(json_field .access_token)"
check "different audience: rejected" "401.*" "$actual" "the MCP server must compare the audience with $RESOURCE_URI"

# The client is deleted, and gets no token any more
delete_client
check "client: deleted" 204 "$status" "delete $client_id manually"
request_token "$client_secret" "$scope" "$RESOURCE_URI"
check "deleted client: rejected" "401 invalid_client" "$actual" "the authorization server must reject a deleted client"
printf '%sALL CHECKS PASSED%s\n' "$green" "$plain"
