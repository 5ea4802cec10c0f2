#!/usr/bin/env bash
# Tier 01 for a machine where none is running, and the agent's packages or image: tier01.sh start | logs | clean.
# The folder .started has what was started: a pid and a log, or a Compose project.
set -euo pipefail
umask 077
CDPATH='' cd "$(dirname "$0")/../.."
. tests/harness/settings.sh
. tests/harness/requests.sh
. tests/harness/runtime.sh

# logged COMMAND…: runs it without output; if it fails, prints the end of its output on standard error.
logged() {
  if ! "$@" >"$work/log" 2>&1; then
    tail -n 20 "$work/log" >&2
    return 1
  fi
}

# docker_running: true if a Docker Engine is running, with Compose v2.
docker_running() { docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; }

# compose ARGUMENT…: docker compose for the containers that were started from this folder.
compose() {
  docker compose --ansi never --project-name "$(cat .started/project)" --env-file /dev/null \
    --file tests/tier01/docker-compose.yml "$@"
}

# server_running: true if the process that was started from this folder is running; sets pid. The command is compared,
# because the number can be another program's after a restart of the machine.
server_running() {
  local command
  pid=$(cat .started/pid 2>/dev/null) || return
  if [ -e /proc/self/cmdline ]; then
    command=$(tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline") || return
  else
    command=$(ps -o args= -p "$pid") || return
  fi
  [[ $command = *"$PWD/tests/tier01/serve.py"* ]]
}

# responding: true if both servers respond as they should.
responding() {
  call_mcp ''
  [ "$status" = 401 ] || return
  request_metadata "$AUTHSERVER_URL"
  [ "$status" = 200 ]
}

# check_ports: sets AUTHSERVER_PORT, ADMIN_PORT and MCP_PORT; ends the run unless tier 01 can be started there.
check_ports() {
  local name url port
  for name in AUTHSERVER ADMIN MCP; do
    url=${name}_URL
    [[ ${!url} =~ ^http://(localhost|127\.0\.0\.1):([0-9]+)(/.*)?$ ]] ||
      fail "no authorization server at $AUTHSERVER_URL, and one can be started here only if $url is http://localhost:PORT"
    port=${BASH_REMATCH[2]}
    # true if something accepts a connection
    if (: <"/dev/tcp/localhost/$port") 2>/dev/null; then
      fail "another program is listening on port $port: set $url to another port"
    fi
    printf -v "${name}_PORT" '%s' "$port"
  done
  # without scheme and host
  [ "${MCP_URL#*://*/}" = "${RESOURCE_URI#*://*/}" ] ||
    fail "the MCP server that is started here has the path of RESOURCE_URI=$RESOURCE_URI: set MCP_URL to the same path"
}

# choose_servers: sets why_native to the reason to start the stand-in as a process; if it is empty, tier 01 is started in
# containers, and the authserver's image is here.
choose_servers() {
  why_native=''
  if [ "$TIER01_RUNTIME" = native ]; then
    why_native="TIER01_RUNTIME=native"
  elif ! docker_running; then
    why_native="no Docker Engine with Compose v2 is running"
  elif ! docker image inspect "$AUTHSERVER_IMAGE" >/dev/null 2>&1; then
    echo "pulling $AUTHSERVER_IMAGE"
    logged docker pull --quiet "$AUTHSERVER_IMAGE" || why_native="$AUTHSERVER_IMAGE can't be pulled"
  fi
  if [ -n "$why_native" ] && [ "$TIER01_RUNTIME" = docker ]; then fail "TIER01_RUNTIME=docker, but $why_native"; fi
}

start_process() {
  echo "starting a stand-in for tier 01 as a process: $why_native"
  tests/harness/install.sh tests/.venv tier01
  mkdir .started
  set -m # in a process group of its own, which Ctrl-C in this terminal does not reach
  (
    trap '' HUP
    keep_environment HOME TOKEN_SECONDS
    export AUTHPLANE_SERVER_ISSUER=$AUTHSERVER_URL AUTHPLANE_ISSUER=$AUTHSERVER_URL AUTHPLANE_DEV_MODE=true
    export AUTHPLANE_SERVER_ADDRESS=:$AUTHSERVER_PORT AUTHPLANE_ADMIN_ADDRESS=:$ADMIN_PORT MCP_ADDRESS=:$MCP_PORT
    export AUTHPLANE_ADMIN_API_KEY RESOURCE_URI MCP_SERVER_NAME MCP_SCOPE
    export NO_PROXY=localhost,127.0.0.1,::1 # without it, Python uses the proxies of macOS
    exec 3>&- 4>&- 5>&- 6>&- 7>&- 8>&- 9>&- # a pipe of make, which would wait until the server ends
    exec tests/.venv/bin/python "$PWD/tests/tier01/serve.py" >.started/log 2>&1 </dev/null
  ) &
  set +m
  echo $! >.started/pid
}

start_containers() {
  echo "starting tier 01 in containers; the image of the MCP server is built first"
  mkdir .started
  echo "${COMPOSE_PROJECT_NAME:-02-calling-another-resource}-tier01-$RANDOM$RANDOM" >.started/project
  (
    export AUTHSERVER_IMAGE PYTHON_IMAGE AUTHPLANE_ADMIN_API_KEY AUTHPLANE_SESSION_SECRET RESOURCE_URI MCP_SERVER_NAME \
      MCP_SCOPE AUTHSERVER_PORT ADMIN_PORT MCP_PORT
    logged compose up --build --detach
  ) || fail "tier 01 did not start: the end of the log is above"
}

# start_tier01: starts both servers, and waits until they respond.
start_tier01() {
  local deadline
  stop
  check_ports
  choose_servers
  starting=yes
  if [ -n "$why_native" ]; then start_process; else start_containers; fi
  deadline=$((SECONDS + 30))
  until responding; do
    if [ "$SECONDS" -ge "$deadline" ] || { [ -f .started/pid ] && ! server_running; }; then
      show_logs 20 >&2
      fail "tier 01 did not start: the end of the log is above"
    fi
    sleep 0.1
  done
}

start() {
  local what=''
  request_metadata "$AUTHSERVER_URL"
  if [ "$status" != 200 ]; then
    start_tier01
    request_metadata "$AUTHSERVER_URL"
  fi
  find_runtime "$(json_field '.issuer | strings')"
  if [ -z "$network" ]; then
    tests/harness/install.sh .venv agent
  else
    echo "building the agent's image"
    PYTHON_IMAGE=$PYTHON_IMAGE logged agent_compose build ||
      fail "the agent's image was not built: the end of the log is above"
  fi
  call_mcp ''
  [ "$status" = 401 ] ||
    fail "$MCP_URL is no protected MCP server (expected 401, got ${status/000/no response}): correct MCP_URL (no trailing slash), or make clean"
  if server_running; then what=" (a stand-in)"; fi
  starting=''
  echo "tier 01 is running: $AUTHSERVER_URL$what and $MCP_URL"
}

# stop: ends what was started from this folder, and nothing else. If something does not end, it says so, keeps .started
# for the next try, and fails.
stop() {
  if server_running; then
    kill -KILL "$pid" # it has nothing to save, and it may be suspended
    for _ in {1..50}; do
      server_running || break
      sleep 0.1
    done
    if server_running; then
      echo "tier01.sh: process $pid does not end: try make clean again" >&2
      return 1
    fi
  fi
  if [ -f .started/project ] && ! logged compose down --volumes --rmi local; then
    echo "tier01.sh: the containers of $(cat .started/project) can't be removed: is Docker running? Then make clean" >&2
    return 1
  fi
  rm -rf .started
}

# show_logs LINES: prints the end of the logs of what was started from this folder.
show_logs() {
  if [ -f .started/log ]; then
    tail -n "$1" .started/log
  elif [ -f .started/project ]; then
    compose logs --no-color --tail "$1"
  else
    fail "no logs: make run has started nothing from this folder"
  fi
}

# clean_up: removes what this run has started if it fails, and its lock; others' locks name another process.
clean_up() {
  local result=$?
  set +e
  trap '' HUP INT TERM
  [ -z "$starting" ] || stop
  [ "$(readlink .started.lock)" != $$ ] || rm -f .started.lock
  rm -rf "$work"
  exit "$result"
}

starting='' work=$(mktemp -d "${TMPDIR:-/tmp}/tier02.XXXXXX")
trap clean_up EXIT
trap 'exit 129' HUP
trap 'exit 130' INT
trap 'exit 143' TERM
case ${1-} in
  start)
    read_settings
    check_settings
    ln -s $$ .started.lock 2>/dev/null ||
      fail "process $(readlink .started.lock) is running in this folder: wait for its end; if it was killed, make clean"
    start
    ;;
  logs) show_logs 100 ;;
  clean)
    stop
    if docker_running; then logged agent_compose down --rmi local; fi
    rm -f .started.lock
    ;;
  *) fail "it takes start, logs or clean" ;;
esac
