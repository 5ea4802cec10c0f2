#!/usr/bin/env bash
# Prepares the agent, and starts a stand-in for tier 01 unless a tier 01 is running.
set -euo pipefail
CDPATH='' cd "$(dirname "$0")/../.."
. tests/harness/settings.sh
. tests/harness/requests.sh
. tests/harness/agent.sh
. tests/harness/cleanup.sh

prepare_clean_up
read_settings
check_settings

request_metadata "$AUTHSERVER_URL"
if is_local "$AUTHSERVER_URL" && [ "$status" = "no response" ]; then
  bash tests/harness/install.sh tests/.venv tier01
  (
    trap '' INT # clean_up ends it, without a traceback
    export AUTHSERVER_URL ADMIN_URL MCP_URL AUTHPLANE_ADMIN_API_KEY RESOURCE_URI MCP_SERVER_NAME
    exec tests/.venv/bin/python -I tests/tier01/background.py start
  ) &
  wait "$!" || exit
  request_metadata "$AUTHSERVER_URL"
fi
[ "$status" = 200 ] || fail "no authorization server at AUTHSERVER_URL=$AUTHSERVER_URL ($status${curl_error:+, $curl_error}): \
start it; if you changed .env, run make clean first"
issuer=$(json_field issuer)
stand_in=''
if is_stand_in; then stand_in=" (a stand-in: see Run it in README.md)"; fi

find_network "$issuer"
if [ -z "$network" ]; then
  bash tests/harness/install.sh .venv agent
else
  docker compose --file docker-compose.yml --env-file /dev/null build --quiet
fi

request_mcp ''
[ "$status" = 401 ] ||
  fail "$MCP_URL is not a protected MCP server (expected 401, got $status${curl_error:+, $curl_error}): \
start it, or correct MCP_URL (no trailing slash)"
echo "tier 01 is running: $AUTHSERVER_URL$stand_in and $MCP_URL"
