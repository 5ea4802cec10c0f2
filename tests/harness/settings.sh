# shellcheck shell=bash
# Reads and checks the settings. Also has printable, fail and is_local, which the other files use. Sourced by verify.sh and
# start.sh, in the top folder of the repository.
umask 077
export LC_ALL=C # files and responses can contain any bytes

# printable TEXT: prints at most 900 characters of it, with ? for each that isn't printable ASCII: what a server sends must not
# control the terminal.
printable() {
  local text=${1:0:900}
  printf '%s' "${text//[![:print:]]/?}"
}

# fail MESSAGE: prints one line on standard error; exit 1.
fail() {
  printf '%s: %s\n' "${0##*/}" "$(printable "$1")" >&2
  exit 1
}

# read_settings: sets the variables of .env and .env.example that are not set yet. So the environment wins over .env, and .env
# over .env.example. The files are not executed, and nothing is exported.
read_settings() {
  local file line name value
  local setting='^ *(export )?([A-Z][A-Z0-9_]*) *= *(.*)$'
  for file in .env .env.example; do
    [ -f "$file" ] || continue
    while IFS= read -r line || [ -n "$line" ]; do
      line=${line#$'\xef\xbb\xbf'} # a byte order mark
      [[ $line =~ $setting ]] || continue
      name=${BASH_REMATCH[2]}
      value=${BASH_REMATCH[3]}
      case $value in
        \"*) value=$(cut -d '"' -f 2 <<<"$value") ;;
        \'*) value=$(cut -d "'" -f 2 <<<"$value") ;;
        \#*) value='' ;; # a comment
        *) value=${value%%[[:space:]]*} ;;
      esac
      if [ -z "${!name+set}" ]; then printf -v "$name" '%s' "$value"; fi
    done <"$file"
  done
  AUTHSERVER_URL=${AUTHSERVER_URL%/}
  ADMIN_URL=${ADMIN_URL%/}
  export -n AUTHPLANE_ADMIN_API_KEY # the agent doesn't need it
}

# check_settings: fails if a tool is missing, or if a setting that must be a URL isn't one.
check_settings() {
  local name
  local url='^https?://[^/?#[:space:]"]+[^[:space:]"]*$'
  for name in curl jq; do
    "$name" --version >/dev/null 2>&1 || fail "$name is missing: install it, for example with apt-get or brew install $name"
  done
  for name in AUTHSERVER_URL ADMIN_URL MCP_URL RESOURCE_URI; do
    [[ ${!name} =~ $url ]] || fail "$name=${!name}: it must be an http or https URL, without spaces and quotes"
  done
}

# is_local URL: true if its host is localhost or its loopback address.
is_local() { [[ $1 =~ ^https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]+)?(/.*)?$ ]]; }
