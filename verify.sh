#!/usr/bin/env bash
# The steps of README.md, with a check of what the servers accept and reject. What it calls is in tests/harness:
# request_… in requests.sh, run_agent in agent.sh, check in checks.sh.
set -euo pipefail
CDPATH='' cd "$(dirname "$0")"
. tests/harness/settings.sh
. tests/harness/requests.sh
. tests/harness/agent.sh
. tests/harness/checks.sh

read_settings
check_settings
start_checks

# Step 1. The metadata name the issuer, which the agent must reach: so it decides where the agent runs.
request_metadata "$AUTHSERVER_URL"
check "discovery" 200 "is there an authorization server at $AUTHSERVER_URL? make run starts one"
issuer=$(json_field issuer)
verdict="ALL CHECKS PASSED"
reset=''
if is_stand_in; then
  verdict="ALL CHECKS PASSED (by a stand-in)"
  reset=" make clean also resets the stand-in."
fi
find_network "$issuer"
printf '  the agent runs %s\n' "$(printable "$runtime")"

# The MCP server is protected: it rejects a request without a token, and names its metadata.
request_mcp ''
check "no token: rejected" "401 bearer resource_metadata" "is there a protected MCP server at $MCP_URL?"

# Step 2. The uri of the resource becomes the audience of tokens. 409: an earlier run has registered it.
request_admin POST resources --data '{
  "slug": "demo-mcp",
  "uri": "'"$RESOURCE_URI"'",
  "backend_kind": "mint",
  "display_name": "Demo MCP",
  "scopes": [{"name": "mcp:echo", "description": "echo tool"}]
}'
check "resource: registered" "201|409" "are AUTHPLANE_ADMIN_API_KEY and ADMIN_URL those of this authorization server?$reset"

# Step 3. Each run registers a new client, because a client's secret is shown only once.
request_admin POST clients --data '{
  "client_name": "demo-agent-client",
  "grant_types": ["client_credentials"],
  "token_endpoint_auth_method": "client_secret_basic",
  "scope": "mcp:echo"
}'
check "client: registered" 201 "see the log of the authorization server"
client_id=$(json_field client_id)
client_secret=$(json_field client_secret)
request_token "$client_id" "$client_secret" scope=mcp:echo "resource=$RESOURCE_URI"
check "token: issued" 200 \
  "if the resource was registered before (409), its uri or its scopes can be different from those in verify.sh.$reset"
token=$(json_field access_token)

# Step 4. The agent requests a token of its own, and calls the MCP server with it.
run_agent "$issuer" "$client_id" "$client_secret"
check "agent: accepted" "exit 0, MCP initialize OK" "see When the agent fails in README.md"

# The authorization server issues a token only to this client, for its scope, and for a registered resource.
request_token "$client_id" not-the-secret scope=mcp:echo "resource=$RESOURCE_URI"
check "wrong secret: rejected" "401 invalid_client" "the authorization server must check the secret"
request_token "$client_id" "$client_secret" scope=mcp:not-granted "resource=$RESOURCE_URI"
check "scope not granted: rejected" "400 invalid_scope" "the authorization server must not widen scopes"
request_token "$client_id" "$client_secret" scope=mcp:echo "resource=$RESOURCE_URI/not-registered"
check "unknown resource: rejected" "400 invalid_(target|scope)" \
  "the authorization server must reject a resource that is not registered"

# The MCP server accepts only what the authorization server has signed, and only for this audience. Without a resource, the
# audience of a token is the authorization server. The tampered token has the signature of that other one.
request_token "$client_id" "$client_secret" scope=mcp:echo
check "token without resource: issued" 200 "see the log of the authorization server"
other_token=$(json_field access_token)
request_mcp "${token%.*}.${other_token##*.}"
check "tampered token: rejected" "401.*" "the MCP server must verify the signature"
request_mcp "$other_token"
check "different audience: rejected" "401.*" "the MCP server must compare the audience with $RESOURCE_URI"

# A deleted client gets no token any more.
delete_client "$client_id"
check "client: deleted" 204 "delete the client manually"
request_token "$client_id" "$client_secret" scope=mcp:echo "resource=$RESOURCE_URI"
check "deleted client: rejected" "401 invalid_client" "the authorization server must reject a deleted client"
echo "$verdict"
