# shellcheck shell=bash
# The settings of verify.sh and make run, and what both say when something fails. Sourced at the top of the repository.

SETTINGS="AUTHPLANE_ISSUER RESOURCE_URI MCP_URL MCP_SERVER_NAME AUTHPLANE_DEV_MODE AUTHSERVER_URL ADMIN_URL
  AUTHPLANE_ADMIN_API_KEY AUTHPLANE_SESSION_SECRET MCP_SCOPE TIER01_RUNTIME TIER01_NETWORK NETWORK_MCP_URL
  AUTHSERVER_IMAGE PYTHON_IMAGE"

# printable TEXT: prints at most 600 characters of it, without control characters, whoever wrote it.
printable() {
  local LC_ALL=C text=${1:0:600}
  printf '%s' "${text//[![:print:]]/ }"
}

# fail MESSAGE: prints one line on standard error; exit 1.
fail() {
  printf '%s: %s\n' "${0##*/}" "$(printable "$1")" >&2
  exit 1
}

# read_settings: sets each of SETTINGS, and exports none. The environment wins over .env, and .env over .env.example.
# The files are read, not executed. A value with spaces has quotes. Also sets dev_mode_given, for run_agent: not empty if
# AUTHPLANE_DEV_MODE is in the environment.
read_settings() {
  local LC_ALL=C file line name value not_in_environment=' ' # the C locale: a file may have any bytes
  local space='[[:space:]]*' quoted="\"[^\"]*\"|'[^']*'" unquoted='[^[:space:]#][^[:space:]]*'
  for name in $SETTINGS; do
    [ -n "${!name+set}" ] || not_in_environment+="$name "
    export -n "${name?}"
  done
  dev_mode_given=${AUTHPLANE_DEV_MODE+yes}
  for file in .env.example .env; do
    [ -f "$file" ] || continue
    while IFS= read -r line || [ -n "$line" ]; do
      [ "$file" = .env ] || line=${line#\# } # there, a default may be a comment
      [[ $line =~ ^$space(export[[:space:]]+)?([A-Z0-9_]+)$space=$space($quoted|$unquoted)? ]] || continue
      name=${BASH_REMATCH[2]} value=${BASH_REMATCH[3]}
      if [[ $value = \"*\" || $value = \'*\' ]]; then value=${value:1:${#value}-2}; fi
      [[ $not_in_environment != *" $name "* ]] || printf -v "$name" '%s' "$value"
    done <"$file"
  done
}

# check_settings: ends the run if a tool is missing, or if a setting can't be right; a trailing slash is removed.
check_settings() {
  local name
  for name in curl jq; do
    command -v "$name" >/dev/null || fail "$name is missing: install it, for example with apt-get or brew install $name"
  done
  for name in AUTHSERVER_URL ADMIN_URL MCP_URL; do
    [[ ${!name} =~ ^https?://[^/?#]+ ]] || fail "$name=${!name}: it must begin with http:// or https:// and a host"
  done
  [[ $TIER01_RUNTIME =~ ^(native|docker)?$ ]] || fail "TIER01_RUNTIME=$TIER01_RUNTIME: it can be native or docker"
  AUTHSERVER_URL=${AUTHSERVER_URL%/} ADMIN_URL=${ADMIN_URL%/}
}

# keep_environment NAME…: of what is exported, keeps these only.
keep_environment() {
  local name
  for name in $(compgen -e); do
    [[ " $* " = *" $name "* ]] || export -n "${name?}"
  done
}

# is_local URL: true if its host is this machine.
is_local() { [[ $1 =~ ^https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?(/.*)?$ ]]; }
