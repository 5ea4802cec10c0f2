#!/usr/bin/env bash
# Tier 01 for a machine that has none: tier01.sh start | stop | status | logs.
set -euo pipefail
umask 077
cd "$(dirname "$0")/../.."
# shellcheck source=tests/settings.sh
. tests/settings.sh
state=.tier01

# running NAME: is the program that this script started still there?
running() {
  local pid
  pid=$(cat "$state/$1.pid" 2>/dev/null) || return 1
  { ps -o args= -p "$pid" || tr '\0' ' ' <"/proc/$pid/cmdline"; } 2>/dev/null | grep -q "tests/tier01/$1.py"
}

# launch NAME: runs tests/tier01/NAME.py, out of reach of this terminal's Ctrl-C; bytecode makes the next start fast.
launch() {
  set -m
  nohup env -u PYTHONDONTWRITEBYTECODE tests/.venv/bin/python "tests/tier01/$1.py" >"$state/$1.log" 2>&1 </dev/null &
  echo $! >"$state/$1.pid"
  set +m
}

# await NAME STATUS METHOD URL: waits until NAME answers with STATUS.
await() {
  local deadline=$((SECONDS + 20))
  until ask "$3" "$4" '' && [ "$status" = "$2" ]; do
    if ! running "$1" || [ "$SECONDS" -ge "$deadline" ]; then
      tail -n 5 "$state/$1.log" >&2
      fail "the $1 did not come up at $4: its log ends above"
    fi
    sleep 0.1
  done
}

start() {
  local whose="someone else" port_and_path
  ask GET "$METADATA_URL" ''
  if [ "$status" = 200 ]; then
    ! running authserver || whose="make run"
    ask POST "$MCP_URL" ''
    [ "$status" = 401 ] || fail "tier 01 answers at $ISSUER_URL, but $MCP_URL answered $status instead of 401: set MCP_URL"
    echo "tier 01 answers at $ISSUER_URL and $MCP_URL: started by $whose"
    return
  fi
  stop
  trap '[ $? = 0 ] || stop' EXIT
  trap 'exit 130' INT
  trap 'exit 143' TERM
  mkdir "$state"
  export AUTHPLANE_ADMIN_API_KEY AUTHPLANE_SERVER_ISSUER=$ISSUER_URL AUTHPLANE_ISSUER=$ISSUER_URL
  export AUTHPLANE_SERVER_ADDRESS=:${ISSUER_URL##*:} AUTHPLANE_ADMIN_ADDRESS=:${ADMIN_URL##*:}
  export AUTHPLANE_BASE_URL=${RESOURCE_URI%/mcp} PORT
  port_and_path=${MCP_URL##*:} PORT=${port_and_path%%/*}
  launch authserver
  launch mcp_server
  await authserver 200 GET "$METADATA_URL"
  await mcp_server 401 POST "$MCP_URL"
  echo "started a stand-in for tier 01 at $ISSUER_URL and $MCP_URL: make logs, make clean"
}

stop() {
  local name deadline=$((SECONDS + 5))
  for name in mcp_server authserver; do
    if running "$name"; then
      kill "$(cat "$state/$name.pid")"
      while running "$name"; do
        [ "$SECONDS" -lt "$deadline" ] || kill -9 "$(cat "$state/$name.pid")"
        sleep 0.05
      done
    fi
  done
  rm -rf "$state"
}

status() {
  local name
  for name in authserver mcp_server; do
    if running "$name"; then echo "$name: running, process $(cat "$state/$name.pid")"; else echo "$name: not started by make run"; fi
  done
  ask GET "$METADATA_URL" ''
  echo "$ISSUER_URL: ${status/000/no answer}"
  ask POST "$MCP_URL" ''
  echo "$MCP_URL: ${status/000/no answer}"
}

logs() {
  [ -d "$state" ] || fail "no logs: make run started nothing that is still there"
  tail -n 50 "$state"/*.log
}

case ${1-} in
  start | stop | status | logs) "$1" ;;
  *) fail "usage: tier01.sh start | stop | status | logs" ;;
esac
