#!/usr/bin/env bash
# Tier 01 for a machine where none runs: tier01.sh start | status | logs | clean.
set -euo pipefail
umask 077
cd "$(dirname "$0")/../.."
# shellcheck source=tests/settings.sh
. tests/settings.sh
setting AUTHSERVER_IMAGE authplane/authserver:0.2.2
setting AUTHPLANE_SESSION_SECRET dev-session-secret-change-me
setting PYTHON_IMAGE python:3.12-slim
export AUTHSERVER_IMAGE AUTHPLANE_SESSION_SECRET PYTHON_IMAGE AUTHPLANE_ADMIN_API_KEY RESOURCE_BASE_URL=${RESOURCE_URI%/mcp}
state=.tier01 # what was started: logs, and process ids or the name of the network
servers=(authserver mcp-server)

# port URL: its port.
port() {
  local rest=${1#*://}
  rest=${rest%%/*}
  echo "${rest##*:}"
}

# compose ARGUMENT…: docker compose for tier 01, in the project that the network is named after.
compose() {
  local network=$TIER01_NETWORK
  [ ! -f "$state/network" ] || network=$(cat "$state/network")
  ISSUER_PORT=$(port "$ISSUER_URL") ADMIN_PORT=$(port "$ADMIN_URL") MCP_PORT=$(port "$MCP_URL") docker compose \
    --ansi never --progress quiet --project-name "${network%_default}" --file tests/tier01/docker-compose.yml "$@"
}

# log LINES SERVER…: the end of the logs; without the escape sequences that Compose 2.26 writes into pipes too.
log() {
  local lines=$1
  shift
  if [ -f "$state/network" ]; then
    compose logs --tail "$lines" "$@" | sed $'s/\e\\[2K//'
  else
    (cd "$state" && tail -n "$lines" "${@/%/.log}")
  fi
}

# running SERVER: is what this script started still there?
running() {
  local pid
  if [ -f "$state/network" ]; then
    [ -n "$(compose ps --quiet --status running "$1" 2>/dev/null)" ]
  else
    pid=$(cat "$state/$1.pid" 2>/dev/null) || return 1
    { ps -o args= -p "$pid" || tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -q "tests/tier01/${1/-/_}.py"
  fi
}

# await SERVER STATUS METHOD URL: waits until the server answers with that status.
await() {
  local deadline=$((SECONDS + 30))
  until ask "$3" "$4" '' && [ "$status" = "$2" ]; do
    if ! running "$1" || [ "$SECONDS" -ge "$deadline" ]; then
      log 5 "$1" >&2
      fail "the $1 did not come up at $4: its log ends above"
    fi
    sleep 0.1
  done
}

# prepare TARGET…: what the Makefile knows how to make.
prepare() { "${MAKE:-make}" -s --no-print-directory -j2 "$@"; }

# launch SERVER: starts its program, out of reach of this terminal's Ctrl-C; bytecode makes the next start fast.
launch() {
  set -m
  nohup env -u PYTHONDONTWRITEBYTECODE tests/.venv/bin/python "tests/tier01/${1/-/_}.py" \
    >"$state/$1.log" 2>&1 </dev/null &
  echo $! >"$state/$1.pid"
  set +m
}

# use_containers: shall tier 01 run in containers? Says so when they were to be expected and can't be.
use_containers() {
  if [ "$TIER01" = native ]; then
    return 1
  elif ! docker_answers; then
    [ "$TIER01" != docker ] || fail "TIER01=docker, but no Docker engine with Compose v2 answers: start one"
    return 1
  elif ! docker image inspect "$AUTHSERVER_IMAGE" >/dev/null 2>&1 && ! docker pull --quiet "$AUTHSERVER_IMAGE" >/dev/null 2>&1; then
    [ "$TIER01" != docker ] || fail "$AUTHSERVER_IMAGE can't be pulled: set AUTHSERVER_IMAGE to one that is here, see README"
    echo "$AUTHSERVER_IMAGE can't be pulled: starting the stand-in for tier 01 as processes instead"
    return 1
  fi
}

start_tier01() {
  stop
  mkdir "$state" 2>/dev/null || fail "another make run is at work here: wait for it"
  trap '[ $? = 0 ] || stop' EXIT
  trap 'exit 129' HUP
  trap 'exit 130' INT
  trap 'exit 143' TERM
  if use_containers; then
    [ -z "$(compose ps --all --quiet; docker volume ls --quiet --filter "name=^${TIER01_NETWORK%_default}_data$")" ] ||
      fail "there is a tier 01 in project ${TIER01_NETWORK%_default} that does not answer: start or remove it, or set TIER01=native"
    echo "$TIER01_NETWORK" >"$state/network"
    compose up --detach --build >"$state/up.log" 2>&1 || fail "tier 01 did not come up: $(tail -n 1 "$state/up.log")"
  else
    prepare .venv/ready tests/.venv/tier01
    export AUTHPLANE_SERVER_ISSUER=$ISSUER_URL AUTHPLANE_ISSUER=$ISSUER_URL AUTHPLANE_BASE_URL=$RESOURCE_BASE_URL
    export AUTHPLANE_SERVER_ADDRESS AUTHPLANE_ADMIN_ADDRESS PORT
    AUTHPLANE_SERVER_ADDRESS=:$(port "$ISSUER_URL") AUTHPLANE_ADMIN_ADDRESS=:$(port "$ADMIN_URL") PORT=$(port "$MCP_URL")
    launch authserver
    export -n AUTHPLANE_ADMIN_API_KEY AUTHPLANE_SESSION_SECRET # not for the MCP server
    launch mcp-server
  fi
  await authserver 200 GET "$METADATA_URL"
  await mcp-server 401 POST "$MCP_URL"
}

start() {
  local whose="someone else"
  ask GET "$METADATA_URL" ''
  if [ "$status" != 200 ]; then
    start_tier01
    ask GET "$METADATA_URL" ''
  fi
  ! running authserver || whose="make run"
  find_place
  if [ "$place" != "on this host" ]; then
    docker compose --progress quiet --profile manual build --quiet || fail "the agent's image could not be built: see above"
  else
    prepare .venv/ready
  fi
  ask POST "$MCP_URL" ''
  [ "$status" = 401 ] || fail "tier 01 answers at $ISSUER_URL, but $MCP_URL answers ${status/000/nothing} instead of 401: set MCP_URL, or begin anew with make clean"
  echo "tier 01: $ISSUER_URL and $MCP_URL, started by $whose"
  echo "agent: $place, since $(printable "$why")"
}

# stop: ends what was started, and nothing else.
stop() {
  local server deadline=$((SECONDS + 5))
  if [ -f "$state/network" ]; then
    docker_answers || fail "the containers in $(cat "$state/network") are still there, and no Docker engine answers: start it"
    compose down --volumes
    remove_image "$(compose config --images mcp-server)"
  else
    for server in "${servers[@]}"; do
      if running "$server"; then kill "$(cat "$state/$server.pid")"; fi
      while running "$server"; do
        [ "$SECONDS" -lt "$deadline" ] || kill -9 "$(cat "$state/$server.pid")"
        sleep 0.05
      done
    done
  fi
  rm -rf "$state"
}

remove_image() {
  if docker image inspect "$1" >/dev/null 2>&1; then docker image rm "$1" >/dev/null; fi
}

# clean: stops tier 01 if it was started here, and removes the agent's image.
clean() {
  stop
  if docker_answers; then remove_image "$(agent_image)"; fi
}

status() {
  local server
  for server in "${servers[@]}"; do
    if running "$server"; then echo "$server: started by make run"; else echo "$server: not started by make run"; fi
  done
  ask GET "$METADATA_URL" ''
  echo "$ISSUER_URL: ${status/000/no answer}"
  ask POST "$MCP_URL" ''
  echo "$MCP_URL: ${status/000/no answer}"
}

logs() {
  [ -d "$state" ] || fail "no logs: make run has started nothing that is still there"
  log 50 "${servers[@]}"
}

case ${1-} in
  start | status | logs | clean) "$1" ;;
  *) fail "usage: tier01.sh start | status | logs | clean" ;;
esac
