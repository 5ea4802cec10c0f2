# shellcheck shell=bash
# Compares what the servers respond, and cleans up. Sourced after agent.sh.

# prepare_clean_up: makes the folder $work, and calls clean_up at the end of the run, however it ends. Sets the variables that
# clean_up reads.
prepare_clean_up() {
  client_id='' # the client that this run registers, never the one in .env
  agent_pid=''
  container=02-agent-$$-$RANDOM
  network=''
  url=''
  work=''
  trap clean_up EXIT
  trap 'exit 1' HUP INT QUIT TERM
  make_work_folder
}

# check NAME EXPECTED HELP: prints result, and fails unless it matches EXPECTED, a regular expression. The message has HELP, and
# the response if it is an error. Other responses are not shown: they can contain a token or a secret.
check() {
  local reason=''
  local shown
  shown=$(printable "$result")
  if [[ $result =~ ^($2)$ ]]; then
    printf '✓ %-30s %s\n' "$1" "$shown"
    return
  fi
  printf '✗ %s\n' "$1"
  case $status in
    "no response") reason=$curl_error ;;
    [45]??) reason=$(head -c 300 "$work/body") ;;
  esac
  fail "$1: expected $2, got ${shown:0:600}${reason:+ ($reason)}: $3"
}

# clean_up: ends the agent, deletes the client, removes the files, and ends with the exit status of the run.
clean_up() {
  local exit_status=$?
  set +e
  trap '' HUP INT QUIT TERM
  if [ -n "$agent_pid" ]; then
    kill "$agent_pid" 2>/dev/null
    wait "$agent_pid" 2>/dev/null
    if [ -n "$network" ]; then docker rm --force "$container" >/dev/null 2>&1; fi
  fi
  # the run may have ended before it read the id in the response to its registration
  if [ -z "$client_id" ] && [ "$url" = "${ADMIN_URL-}/admin/clients" ]; then
    client_id=$(jq -r '.client_id | strings' "$work/body" 2>/dev/null)
  fi
  if [ -n "$client_id" ]; then
    delete_client "$client_id"
    case $status in
      204) ;;       # it is deleted
      400 | 404) ;; # there is no such client: it was deleted before
      *) printf 'verify.sh: client %s was not deleted (%s): delete it manually\n' "$(printable "$client_id")" "$status" >&2 ;;
    esac
  fi
  rm -rf "$work"
  exit "$exit_status"
}
