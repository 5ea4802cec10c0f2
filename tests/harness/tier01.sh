#!/usr/bin/env bash
# Tier 01 for a machine where none is running, and the agent's packages or image: tier01.sh start | logs | clean.
# The folder .tier01 has the log of what was started, and its pid or its project.
set -euo pipefail
umask 077
cd "$(dirname "$0")/../.."
# shellcheck source=tests/harness/functions.sh
. tests/harness/functions.sh
for name in AUTHSERVER_IMAGE AUTHPLANE_SESSION_SECRET PYTHON_IMAGE MCP_SERVER_NAME; do setting "$name"; done
export AUTHSERVER_IMAGE AUTHPLANE_SESSION_SECRET PYTHON_IMAGE AUTHPLANE_ADMIN_API_KEY RESOURCE_URI MCP_SERVER_NAME
project=${TIER01_NETWORK%_default} server='' metadata=$ISSUER_URL/.well-known/oauth-authorization-server

# compose ARGUMENT…: docker compose for tier 01, in the project that was started, else in that of TIER01_NETWORK.
compose() {
  [ ! -f .tier01/project ] || project=$(cat .tier01/project)
  docker compose --ansi never --project-name "$project" --env-file /dev/null --file tests/tier01/docker-compose.yml "$@"
}

# lock: waits until no other process starts or stops tier 01 in this folder. The lock is a link to our process id.
lock() {
  local holder=''
  until ln -s "$$" .tier01.lock 2>/dev/null; do
    [ -n "$holder" ] || echo "waiting for process $(readlink .tier01.lock), which starts or stops tier 01 in this folder"
    holder=$(readlink .tier01.lock) || holder=gone
    kill -0 "$holder" 2>/dev/null || rm -f .tier01.lock # its process was killed
    sleep 0.2
  done
  on_exit=unlock
}
unlock() {
  [ "$result" = 0 ] || [ -z "$server" ] || stop
  rm -f .tier01.lock
}

# find_ports: exports ISSUER_PORT, ADMIN_PORT and MCP_PORT; ends the run unless tier 01 can be started there.
find_ports() {
  local name url port taken='' instead=''
  for name in ISSUER ADMIN MCP; do
    url=${name}_URL
    [[ ${!url} =~ ^http://(localhost|127\.0\.0\.1):([0-9]+)(/.*)?$ ]] ||
      fail "no authorization server at $ISSUER_URL, and one can be started here only if $url is http://localhost:PORT"
    port=${BASH_REMATCH[2]}
    export "${name}_PORT=$port"
    if (: <"/dev/tcp/localhost/$port") 2>/dev/null; then
      taken+=" $port" instead+="$url=${!url/:$port/:$((port % 50000 + 10000))} "
    fi
  done
  [ -z "$instead" ] || fail "another program is listening on port$taken; with another one in .env, or: ${instead}make verify"
  [ "${MCP_URL#*://*/}" = "${RESOURCE_URI#*://*/}" ] ||
    fail "the MCP server that is started here has the path of RESOURCE_URI=$RESOURCE_URI: set MCP_URL to the same path"
}

# use_containers: true if tier 01 is to run in containers; prints why not if that is a surprise.
use_containers() {
  local why=''
  [ "$TIER01" != native ] || return
  if ! docker_running; then
    why="no Docker Engine with Compose v2 is running"
  elif ! docker image inspect "$AUTHSERVER_IMAGE" >/dev/null 2>&1; then
    echo "pulling $AUTHSERVER_IMAGE"
    if [ -t 1 ]; then docker pull "$AUTHSERVER_IMAGE"; else docker pull --quiet "$AUTHSERVER_IMAGE"; fi 2>"$work/error" ||
      why="$AUTHSERVER_IMAGE can't be pulled"
    [ -z "$why" ] || [ "$TIER01" = docker ] || echo "$why: starting the stand-in for tier 01 as a process instead"
  fi
  [ -z "$why" ] || [ "$TIER01" != docker ] || fail "TIER01=docker, but $why"
  [ -z "$why" ]
}

# start_tier01: starts both servers, and waits until they respond.
start_tier01() {
  local deadline
  stop
  find_ports
  if use_containers; then
    [ -z "$(compose ps --all --quiet && docker volume ls --quiet --filter "name=^${project}_data$")" ] ||
      fail "the tier 01 in project $project does not respond: start or remove it, or set TIER01=native"
    [ "$project" != "$TIER01_NETWORK" ] || fail "TIER01_NETWORK=$TIER01_NETWORK: a network that is started here ends in _default"
    echo "starting tier 01 in containers; the image of the MCP server is built first"
    mkdir .tier01 && server=containers && echo "$project" >.tier01/project
    compose --progress plain up --detach --build >.tier01/log 2>&1 || fail "tier 01 did not start: $(tail -n 1 .tier01/log)"
  else
    "${MAKE:-make}" -s --no-print-directory .venv/ready tests/.venv/tier01
    mkdir .tier01
    set -m # out of reach of this terminal's Ctrl-C
    AUTHPLANE_SERVER_ISSUER=$ISSUER_URL AUTHPLANE_ISSUER=$ISSUER_URL AUTHPLANE_DEV_MODE=true \
      AUTHPLANE_SERVER_ADDRESS=:$ISSUER_PORT AUTHPLANE_ADMIN_ADDRESS=:$ADMIN_PORT \
      MCP_ADDRESS=:$MCP_PORT nohup env -u PYTHONDONTWRITEBYTECODE tests/.venv/bin/python tests/tier01/serve.py \
      >.tier01/log 2>&1 </dev/null &
    server=$!
    set +m
    echo "$server" >.tier01/pid
  fi
  deadline=$((SECONDS + 30))
  until call_mcp '' && [ "$status" = 401 ] && request GET "$metadata" '' && [ "$status" = 200 ]; do
    if [ "$SECONDS" -ge "$deadline" ] || { [ -f .tier01/pid ] && ! kill -0 "$server" 2>/dev/null; }; then
      logs 5 >&2
      fail "tier 01 did not start: its log ends above"
    fi
    sleep 0.1
  done
}

start() {
  lock
  request GET "$metadata" ''
  [ "$status" = 200 ] || start_tier01
  find_runtime
  if [ "$runtime" = "on this host" ]; then
    "${MAKE:-make}" -s --no-print-directory .venv/ready
  else
    find_agent_image
    echo "building the agent's image"
    docker compose --progress quiet --profile manual build --quiet || fail "the agent's image was not built: see above"
  fi
  call_mcp ''
  [ "$status" = 401 ] || fail "there is an authorization server at $ISSUER_URL, but the response of $MCP_URL is ${status/000/missing} instead of 401: set MCP_URL, or run make clean first"
  if [ -d .tier01 ]; then reason="started by make run"; else reason="already running"; fi
  echo "tier 01: $ISSUER_URL and $MCP_URL, $reason"
}

# stop: ends what was started from this folder, and nothing else.
stop() {
  local pid=none
  if [ -f .tier01/project ]; then
    docker_running || fail "the containers of project $(cat .tier01/project) are still there: start Docker to remove them"
    compose down --volumes >/dev/null 2>&1 || fail "the containers of project $project can't be removed: see docker compose ls"
    remove_image "$(compose config --images mcp-server)"
  fi
  [ ! -f .tier01/pid ] || pid=$(cat .tier01/pid)
  rm -rf .tier01 # the process ends when its log is gone
  for _ in {1..50}; do kill -0 "$pid" 2>/dev/null || break; sleep 0.1; done
}

# logs [LINES]: prints the end of the logs of what was started from this folder; Compose 2.26 colours them in pipes too.
logs() {
  [ -d .tier01 ] || fail "no logs: make run has started nothing from this folder"
  if [ -f .tier01/pid ]; then tail -n "${1:-100}" .tier01/log; else compose logs --tail "${1:-100}" | sed $'s/\e\\[2K//'; fi
}

remove_image() { if docker image inspect "$1" >/dev/null 2>&1; then docker image rm "$1" >/dev/null; fi; }

clean() {
  lock
  stop
  if docker_running; then find_agent_image && remove_image "$agent_image"; fi
}

"${1:?start, logs or clean}"
