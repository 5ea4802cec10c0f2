# shellcheck shell=bash
# Where the agent runs, and how. Sourced after requests.sh.

# find_network ISSUER: sets network to the Docker network in which the agent must run to reach the issuer, empty if it runs
# on this host; and runtime to the same in words. It is the network of the container that publishes the port of AUTHSERVER_URL.
find_network() {
  network=''
  runtime="on this host: the issuer is $1"
  if [ "$1" = "$AUTHSERVER_URL" ]; then return; fi # it has just responded
  request_metadata "$1"
  # a company's proxy can respond for every name: only the same issuer counts
  if [ "$status" = 200 ] && [ "$(jq -r .issuer "$work/body" 2>/dev/null)" = "$1" ]; then return; fi
  network=$(docker ps --filter "publish=${AUTHSERVER_URL##*:}" --format '{{.Networks}}' 2>/dev/null) || network=''
  runtime="in network $network: the issuer $1 is not reachable from this host"
  [ -n "$network" ] || fail "the issuer $1 is not reachable from this host, and no container has the port of $AUTHSERVER_URL"
}

# run_agent ISSUER ID SECRET: runs the agent as this client. Sets result to its exit status and the last line that it prints.
# In the background, because bash runs a trap only between commands, or while it waits; agent_pid is for clean_up.
run_agent() {
  local exit_status=0
  become_agent "$@" >"$work/agent" 2>&1 </dev/null &
  agent_pid=$!
  wait "$agent_pid" || exit_status=$?
  agent_pid=''
  result="exit $exit_status, $(tail -n 1 "$work/agent")"
  status='' # there is no response for check to show
}

# become_agent ISSUER ID SECRET: replaces this process by the agent, with its settings, on this host or in a container.
become_agent() {
  export AUTHPLANE_ISSUER=$1 CLIENT_ID=$2 CLIENT_SECRET=$3
  export RESOURCE_URI MCP_URL MCP_SERVER_NAME AUTHPLANE_DEV_MODE
  if [ -n "$network" ]; then
    export TIER01_NETWORK=$network
    exec docker compose --env-file /dev/null run --rm --no-TTY --name "$container" agent
  fi
  if is_local "$1" && is_local "$MCP_URL"; then # whatever proxy and certificates are configured
    export no_proxy='*'                         # Python prefers lower case
    unset SSL_CERT_FILE SSL_CERT_DIR
  fi
  exec .venv/bin/python -I agent.py
}
