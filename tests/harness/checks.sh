# shellcheck shell=bash
# The checks of verify.sh, and the end of its run. Sourced after agent.sh.

# start_checks: names what a run makes. clean_up removes it, however the run ends.
start_checks() {
  client_id='' # of the client that the run registers, never that of .env
  agent_pid=''
  container=02-agent-$$-$RANDOM
  network=''
  work=$(mktemp -d "${TMPDIR:-/tmp}/tier02.XXXXXX")
  trap clean_up EXIT
  trap 'exit 1' HUP INT QUIT TERM
}

# check NAME EXPECTED HELP: prints result; exit 1 unless it is EXPECTED, a regular expression. An error of the server is
# shown then. Other responses are not, because they can have a token or a secret.
check() {
  local shown reason=''
  shown=$(printable "$result")
  if [[ $result =~ ^($2)$ ]]; then
    printf '✓ %-30s %s\n' "$1" "$shown"
    return
  fi
  printf '✗ %-30s %s\n' "$1" "$shown"
  case $status in
    "no response") reason=$curl_error ;;
    [45]??) reason=$(head -c 300 "$work/body") ;;
  esac
  fail "$1: expected $2, got ${shown:0:300}${reason:+ ($reason)}: $3"
}

# clean_up: ends the agent, deletes the client, and removes the files.
clean_up() {
  local exit_status=$?
  set +e
  trap '' HUP INT QUIT TERM
  if [ -n "$agent_pid" ]; then
    kill "$agent_pid" 2>/dev/null
    wait "$agent_pid" 2>/dev/null
    if [ -n "$network" ]; then docker rm --force "$container" >/dev/null 2>&1; fi
  fi
  if [ -z "$client_id" ]; then # it can be in the last response
    client_id=$(jq -r '.client_id | strings' "$work/body" 2>/dev/null)
  fi
  if [ -n "$client_id" ]; then
    delete_client "$client_id"
    case $status in
      204 | 400 | 404) ;; # deleted now, or before
      *) printf 'verify.sh: client %s was not deleted (%s): delete it manually\n' "$(printable "$client_id")" "$status" >&2 ;;
    esac
  fi
  rm -rf "$work"
  exit "$exit_status"
}
