# shellcheck shell=bash
# Cleans up at the end of a run. Uses requests.sh and agent.sh.

# prepare_clean_up: creates the folder $work. From here on, clean_up is called at the end of the run, however it ends.
prepare_clean_up() {
  client_id='' # of the client that this run registers
  work=''
  trap clean_up EXIT
  trap 'exit 1' HUP INT QUIT TERM
  # a signal that comes meanwhile is handled when work is set
  work=$(
    trap '' HUP INT QUIT TERM
    mktemp -d "${TMPDIR:-/tmp}/tier02.XXXXXX"
  )
}

# clean_up: ends the agent, deletes the client, removes the files, and ends with the exit status of the run. If the run has
# failed, it also stops the stand-in, if this process has started it.
clean_up() {
  local exit_status=$?
  local job
  set +e
  trap '' HUP INT QUIT TERM
  job=$(jobs -p) # the agent, or the start of the stand-in
  if [ -n "$job" ]; then
    kill "$job" 2>/dev/null
    wait "$job" 2>/dev/null
    if [ -n "$network" ]; then docker rm --force "$container" >/dev/null 2>&1; fi
  fi
  # the last request may have registered the client, although its id has not been read yet
  if [ -z "$client_id" ] && [ "$url" = "${ADMIN_URL-}/admin/clients" ] && [[ $status = 2?? ]]; then
    client_id=$(jq -r '.client_id | strings' "$work/body" 2>/dev/null)
  fi
  if [ -n "$client_id" ]; then
    delete_client "$client_id"
    case $status in
      204) ;;       # it is deleted
      400 | 404) ;; # there is no such client: it was deleted before
      *) printf '%s: client %s was not deleted (%s): delete it manually\n' "${0##*/}" "$(printable "$client_id")" "$status" >&2 ;;
    esac
  fi
  if [ "$exit_status" != 0 ] && grep -qx "started by $$" .stand-in.log 2>/dev/null; then
    tests/.venv/bin/python -I tests/tier01/background.py stop
  fi
  rm -rf "$work"
  exit "$exit_status"
}
