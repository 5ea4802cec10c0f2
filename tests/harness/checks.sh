# shellcheck shell=bash
# Compares what the servers respond. Uses requests.sh.

# check NAME EXPECTED HELP: prints actual, and fails unless it matches EXPECTED, a regular expression. The message has HELP, and
# the response if it is an error. Other responses are not shown: they can contain a token or a secret.
check() {
  local reason=''
  local shown
  shown=$(printable "$actual")
  if [[ $actual =~ ^($2)$ ]]; then
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
