# shellcheck shell=bash
# Where the agent runs, and how: on this host, or in tier 01's Docker network. It needs the settings and requests.

# agent_compose ARGUMENT…: docker compose for the agent.
agent_compose() { docker compose --env-file /dev/null --profile manual "$@"; }

# find_runtime ISSUER: sets network, empty if the agent runs on this host, and runtime, the same in words. The network is
# TIER01_NETWORK, else that of the container which publishes the port of AUTHSERVER_URL.
find_runtime() {
  local port reason
  [ -n "$1" ] || fail "the metadata at $AUTHSERVER_URL has no issuer: is it an authorization server?"
  request_metadata "$1"
  # a company's proxy can have a page for every name
  if [ "$status" = 200 ] && [ "$(json_field '.issuer | strings')" = "$1" ]; then
    network='' runtime="on this host: the issuer is $1"
    return
  fi
  network=$TIER01_NETWORK
  if [[ -z $network && $AUTHSERVER_URL =~ :([0-9]+)(/.*)?$ ]]; then
    port=${BASH_REMATCH[1]}
    network=$(docker ps --filter "publish=$port" --format '{{.Networks}}' 2>/dev/null) || network=''
  fi
  reason="the issuer $1 is not reachable from this host"
  [ -n "$network" ] ||
    fail "the agent must run in tier 01's Docker network ($reason): start Docker, or set TIER01_NETWORK"
  runtime="in network $network: $reason"
}

# run_agent ISSUER CONTAINER: runs the agent, with its own settings by name and no others; the container gets that name. On
# this host it gets no proxy and no certificates if both servers are on this host, too.
run_agent() {
  local names="AUTHPLANE_ISSUER CLIENT_ID CLIENT_SECRET RESOURCE_URI MCP_URL MCP_SERVER_NAME AUTHPLANE_DEV_MODE"
  AUTHPLANE_ISSUER=$1
  # a copied .env has the development mode, which is for plain http only
  if [[ $1 = https://* && -z $dev_mode_given ]]; then AUTHPLANE_DEV_MODE=''; fi
  # shellcheck disable=SC2086,SC2163 # the names are words
  export $names
  if [ -n "$network" ]; then
    MCP_URL=$NETWORK_MCP_URL
    export TIER01_NETWORK=$network
    # exec, so that a signal reaches it; that can't call agent_compose
    exec docker compose --env-file /dev/null --profile manual run --rm --no-TTY --name "$2" agent
  fi
  if ! is_local "$1" || ! is_local "$MCP_URL"; then
    names+=" HTTP_PROXY http_proxy HTTPS_PROXY https_proxy ALL_PROXY all_proxy SSL_CERT_FILE SSL_CERT_DIR"
  fi
  # shellcheck disable=SC2086 # the names are words
  keep_environment $names
  export NO_PROXY=$no_proxy_list no_proxy=$no_proxy_list # without these, Python uses the proxies of macOS
  exec .venv/bin/python agent.py
}
