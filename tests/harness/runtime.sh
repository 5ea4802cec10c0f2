# shellcheck shell=bash
# Where the agent runs, and how: on this host, or in tier 01's Docker network. It needs the settings and requests.

# docker_running: true if a Docker Engine is running, with Compose v2.
docker_running() { docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; }

# agent_compose ARGUMENT…: docker compose for the agent.
agent_compose() { TIER01_NETWORK=$network docker compose --env-file /dev/null --profile manual "$@"; }

# started_containers: prints the ids of the running containers that make run has started from this folder.
started_containers() {
  [ ! -f .started/project ] || docker ps --quiet --filter "label=com.docker.compose.project=$(cat .started/project)"
}

# find_runtime: sets issuer, network (empty if the agent runs on this host), runtime and reason (the same in words). The
# last response must be the metadata.
find_runtime() {
  network='' runtime="on this host"
  issuer=$(json_field '.issuer | strings')
  [ -n "$issuer" ] || fail "the metadata at $AUTHSERVER_URL has no issuer: is it an authorization server?"
  if [ -n "$TIER01_RUNTIME" ]; then
    reason="TIER01_RUNTIME=$TIER01_RUNTIME"
    [ "$TIER01_RUNTIME" = native ] || find_network
  elif is_local "$issuer"; then
    reason="the issuer is $issuer"
  elif request_metadata "$issuer" && [ "$status" = 200 ]; then
    reason="the issuer $issuer is reachable from this host"
  else
    reason="the issuer $issuer is not reachable from this host"
    find_network
  fi
}

# find_network: sets network and runtime: TIER01_NETWORK, else the network of the containers that make run has started,
# else the one that tier 01 has by default.
find_network() {
  docker_running || fail "the agent must run in tier 01's network ($reason): start Docker"
  if [ -n "$TIER01_NETWORK" ]; then
    network=$TIER01_NETWORK
  elif [ -n "$(started_containers)" ]; then
    network=$(cat .started/project)_default
  else
    network=01-mcp-server-basic_default
  fi
  runtime="in network $network"
  docker network inspect "$network" >/dev/null 2>&1 ||
    fail "there is no Docker network $network ($reason): set TIER01_NETWORK, or make clean and TIER01_RUNTIME=docker make verify"
}

# run_agent CONTAINER: runs the agent, with its own settings by name and no others; the container gets that name. On this
# host it gets no proxy and no certificates if both servers are on this host, too.
run_agent() {
  local connection="HTTP_PROXY http_proxy HTTPS_PROXY https_proxy ALL_PROXY all_proxy SSL_CERT_FILE SSL_CERT_DIR"
  # a copied .env has the development mode, which is for plain http only
  [[ $issuer = http://* || -n $dev_mode_given ]] || AUTHPLANE_DEV_MODE=''
  if [ -n "$network" ]; then
    MCP_URL=$NETWORK_MCP_URL
    export TIER01_NETWORK=$network
  elif is_local "$issuer" && is_local "$MCP_URL"; then
    keep_environment
  else
    # shellcheck disable=SC2086 # the names are words
    keep_environment $connection
  fi
  export NO_PROXY=$no_proxy_list no_proxy=$no_proxy_list # without these, Python asks macOS for its proxies
  export AUTHPLANE_ISSUER=$issuer CLIENT_ID CLIENT_SECRET RESOURCE_URI MCP_URL MCP_SERVER_NAME AUTHPLANE_DEV_MODE
  if [ -n "$network" ]; then
    exec docker compose --env-file /dev/null --profile manual run --rm --no-TTY --name "$1" agent
  else
    exec .venv/bin/python agent.py
  fi
}
