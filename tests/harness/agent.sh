# shellcheck shell=bash
# Finds out where the agent has to run, and runs it there. Uses requests.sh.

network='' # the Docker network in which the agent runs; empty if it runs on this host
container=02-agent-$$-$RANDOM # the name of the agent's container in this network

# find_network ISSUER: sets network. If this host can't reach the issuer, it is the network of the container that publishes the
# port of AUTHSERVER_URL.
find_network() {
  if [ "$1" = "$AUTHSERVER_URL" ]; then return; fi # this URL has just responded
  request_metadata "$1"
  # a company's proxy can respond to any URL, so the response has to name this issuer
  if [ "$status" = 200 ] && [ "$(jq -r .issuer "$work/body" 2>/dev/null)" = "$1" ]; then return; fi
  network=$(docker ps --filter "publish=${AUTHSERVER_URL##*:}" --format '{{.Networks}}' 2>/dev/null) || network=''
  network=${network%%,*} # the container can be in several
  [ -n "$network" ] || fail "the issuer $1 is not reachable from this host, and no container has the port of $AUTHSERVER_URL"
}

# run_agent ISSUER ID SECRET: runs the agent as this client. Sets actual to its exit status and the last line that it prints.
# The agent runs in the background, because bash runs a trap during wait, and not during a foreground command. clean_up ends it.
run_agent() {
  local exit_status=0
  exec_agent "$@" >"$work/agent" 2>&1 &
  wait "$!" || exit_status=$?
  actual="exit $exit_status, $(tail -n 1 "$work/agent")"
  status='' # check has no response to show
}

# exec_agent ISSUER ID SECRET: replaces this process with the agent, on this host or in a container.
exec_agent() {
  export AUTHPLANE_ISSUER=$1 CLIENT_ID=$2 CLIENT_SECRET=$3
  export RESOURCE_URI MCP_URL MCP_SERVER_NAME AUTHPLANE_DEV_MODE
  if [ -n "$network" ]; then
    export TIER01_NETWORK=$network
    # Compose must read neither .env, because the settings are exported, nor the file that COMPOSE_FILE names
    exec docker compose --file docker-compose.yml --env-file /dev/null run --rm --no-TTY --name "$container" agent
  fi
  # servers on this host need no proxy, and with http no certificates, whatever is configured
  if is_local "$1" && is_local "$MCP_URL"; then
    export no_proxy='*' # Python prefers it to NO_PROXY
    if [[ $1$MCP_URL != *https:* ]]; then unset SSL_CERT_FILE; fi
  fi
  exec .venv/bin/python -I agent.py
}
