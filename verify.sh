#!/usr/bin/env bash
# Goes through the steps of README.md, and checks what the servers accept and reject. The functions that it calls are in
# tests/harness: request_… and check in requests.sh, run_agent in agent.sh.
set -euo pipefail
CDPATH='' cd "$(dirname "$0")"
. tests/harness/settings.sh
. tests/harness/requests.sh
. tests/harness/agent.sh
. tests/harness/cleanup.sh

prepare_clean_up
read_settings
check_settings

# Step 1. Read the issuer from the metadata. The agent runs on this host if it can reach the issuer, and otherwise in a
# container.
request_metadata "$AUTHSERVER_URL"
check "discovery" 200 "is there an authorization server at $AUTHSERVER_URL? make run starts one"
issuer=$(json_field issuer)
verdict="ALL CHECKS PASSED"
if is_stand_in; then verdict+=" (by a stand-in)"; fi
find_network "$issuer"
runtime="on this host: the issuer is $issuer"
if [ -n "$network" ]; then runtime="in network $network: the issuer $issuer is not reachable from this host"; fi
printf '  the agent runs %s\n' "$(printable "$runtime")"

# The MCP server is protected: it rejects a request without a token, and its response has the URL of its metadata.
request_mcp ''
check "no token: rejected" "401 bearer resource_metadata" "is there a protected MCP server at $MCP_URL?"

# Step 2. Register the resource. Its uri becomes the audience of the tokens. 409 means that an earlier run has registered it.
request_admin POST resources --data '{
  "slug": "demo-mcp",
  "uri": "'"$RESOURCE_URI"'",
  "backend_kind": "mint",
  "display_name": "Demo MCP",
  "scopes": [{"name": "mcp:echo", "description": "echo tool"}]
}'
check "resource: registered" "201|409" "are AUTHPLANE_ADMIN_API_KEY and ADMIN_URL those of this authorization server?"

# Step 3. Register a new client, because the secret of an earlier one can't be read again.
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
  "if demo-mcp was registered earlier (409) with another uri or other scopes, change the slug in verify.sh, or restart a stand-in: make clean"
token=$(json_field access_token)

# Step 4. Run the agent, which requests a token of its own, and calls the MCP server with it.
run_agent "$issuer" "$client_id" "$client_secret"
check "agent: accepted" "exit 0, MCP initialize OK" "see When the agent fails in README.md; if the agent isn't installed, run make run"

# The authorization server issues a token only to this client, for its scope, and for a registered resource.
request_token "$client_id" not-the-secret scope=mcp:echo "resource=$RESOURCE_URI"
check "wrong secret: rejected" "401 invalid_client" "the authorization server must check the secret"
request_token "$client_id" "$client_secret" scope=mcp:not-granted "resource=$RESOURCE_URI"
check "scope not granted: rejected" "400 invalid_scope" "the authorization server must not widen scopes"
request_token "$client_id" "$client_secret" scope=mcp:echo "resource=$RESOURCE_URI/not-registered"
check "unknown resource: rejected" "400 invalid_(target|scope)" \
  "the authorization server must reject a resource that is not registered"

# The MCP server accepts only tokens that the authorization server has signed, and only those for its own audience. Without a
# resource, the audience of a token is the authorization server. The tampered token has the signature of another one.
request_token "$client_id" "$client_secret" scope=mcp:echo
check "token without resource: issued" 200 "see the log of the authorization server"
token_without_resource=$(json_field access_token)
request_mcp "${token%.*}.${token_without_resource##*.}"
check "tampered token: rejected" "401.*" "the MCP server must verify the signature"
request_mcp "$token_without_resource"
check "different audience: rejected" "401.*" "the MCP server must compare the audience with $RESOURCE_URI"

# A deleted client can't get a token.
delete_client "$client_id"
check "client: deleted" 204 "delete the client manually"
request_token "$client_id" "$client_secret" scope=mcp:echo "resource=$RESOURCE_URI"
check "deleted client: rejected" "401 invalid_client" "the authorization server must reject a deleted client"
echo "$verdict"
