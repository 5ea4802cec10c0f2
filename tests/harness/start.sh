#!/usr/bin/env bash
# Starts a stand-in for tier 01, unless a tier 01 is running, and prepares the agent.
set -euo pipefail
CDPATH='' cd "$(dirname "$0")/../.."
. tests/harness/common.sh

read_settings
work=$(mktemp -d "${TMPDIR:-/tmp}/tier02.XXXXXX")
trap 'rm -rf "$work"' EXIT
request_metadata "$AUTHSERVER_URL"
if is_local "$AUTHSERVER_URL" && [[ $status =~ curl:\ \((7|28)\) ]]; then # nothing is listening there, or it is silent
  bash tests/harness/install.sh tests/.venv tier01
  (
    export AUTHSERVER_URL ADMIN_URL MCP_URL AUTHPLANE_ADMIN_API_KEY RESOURCE_URI MCP_SERVER_NAME
    tests/.venv/bin/python -I tests/tier01/background.py start
  )
  request_metadata "$AUTHSERVER_URL"
fi
[ "$status" = 200 ] || fail "no authorization server at AUTHSERVER_URL=$AUTHSERVER_URL ($status)"
what=$(json_field 'if .stand_in then " (a stand-in: see Run it in README.md)" else "" end')
find_runtime "$(json_field '.issuer | strings')"
if [ -z "$network" ]; then
  bash tests/harness/install.sh .venv agent
else
  docker compose --env-file /dev/null build --quiet
fi
call_mcp ''
[ "$status" = 401 ] || fail "$MCP_URL is no protected MCP server (expected 401, got $status): correct MCP_URL (no trailing slash)"
echo "tier 01 is running: $AUTHSERVER_URL$what and $MCP_URL"
