# shellcheck shell=bash
# Sourced by verify.sh and tests/tier01/tier01.sh, at the top of the repository.

# setting NAME DEFAULT: gives NAME its value in the environment, else in .env, else DEFAULT. .env is read, never run.
setting() {
  local value=${!1-}
  if [ -z "$value" ] && [ -f .env ]; then
    value=$(sed -nE "s/^[[:space:]]*(export[[:space:]]+)?$1[[:space:]]*=[[:space:]]*//p" .env | tail -n 1)
    case $value in
      \"*) value=${value#\"} value=${value%%\"*} ;;
      \'*) value=${value#\'} value=${value%%\'*} ;;
      *) value=${value%%[[:space:]]#*} value=${value%"${value##*[![:space:]]}"} ;;
    esac
  fi
  printf -v "$1" '%s' "${value:-$2}"
}

# printable TEXT: as one line that can do nothing to a terminal, whoever wrote it.
printable() { printf '%s' "${1//[![:print:]]/ }"; }

# fail MESSAGE: one line on standard error, exit 1.
fail() {
  printf '%s: %s\n' "${0##*/}" "$(printable "$1")" >&2
  exit 1
}

# ask METHOD URL HEADERS [CURL OPTION]…: sets status (000 when nothing came), headers and body to what was answered.
# The headers reach curl by standard input, because every process of the machine can read an argument. An address may
# come from a server: it can name neither another scheme nor an option.
ask() {
  local answer method=$1 url=$2 sent=$3
  shift 3
  answer=$(
    [ -z "${unstoppable-}" ] || trap '' HUP INT TERM
    printf '%s\n' "$sent" | curl --disable --silent --show-error --include --suppress-connect-headers \
      --connect-timeout 3 --max-time 10 --write-out '\n%{http_code}' --request "$method" --header @- "$@" --globoff --proto =http,https --url "$url" 2>&1 |
      head -c 65536 # what has no end must not fill the memory
  ) || : # the status tells
  answer=${answer//$'\r'/}
  status=${answer##*$'\n'}
  [[ $status =~ ^[0-9]{3}$ ]] || status=000
  answer=${answer%$'\n'*}
  headers=${answer%%$'\n\n'*}
  body=${answer#*$'\n\n'}
}

# docker_answers: is there an engine, with Compose v2?
docker_answers() { docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; }

# agent_image: the name of the image that docker-compose.yml builds.
agent_image() { docker compose --profile manual config --images; }

# find_place: sets place to where the agent has to run, and why; the last body must be the metadata.
find_place() {
  local name network
  issuer=$(printf '%s' "$body" | jq -r '.issuer | strings' 2>/dev/null) || issuer=''
  [ -n "$issuer" ] || fail "the metadata at $ISSUER_URL names no issuer: is that an authorization server?"
  name=${issuer#*://} name=${name%%[:/]*} place="on this host" network="in network $TIER01_NETWORK"
  case $TIER01,$name in
    native,*) why="TIER01=native" ;;
    docker,*) place=$network why="TIER01=docker" ;;
    *,localhost | *,127.0.0.1) why="the issuer is $issuer" ;;
    *)
      ask GET "$issuer/.well-known/oauth-authorization-server" ''
      why="the issuer $issuer answers here"
      [ "$status" = 200 ] || place=$network why="the issuer $issuer is out of reach here"
      ;;
  esac
  [ "$place" != "$network" ] || docker_answers || fail "the agent must run $place ($why): start the Docker engine"
}

for tool in curl jq; do
  command -v "$tool" >/dev/null || fail "$tool is missing: install it, for example with apt-get or brew install $tool"
done
setting ISSUER_URL http://localhost:9000
setting ADMIN_URL http://localhost:9001
setting MCP_URL http://localhost:8080/mcp
setting RESOURCE_URI http://localhost:8080/mcp
setting AUTHPLANE_ADMIN_API_KEY dev-admin-key-change-me
setting TIER01 ''
setting TIER01_NETWORK 01-mcp-server-basic_default
export TIER01_NETWORK # for docker-compose.yml
ISSUER_URL=${ISSUER_URL%/} ADMIN_URL=${ADMIN_URL%/}
for name in ISSUER_URL ADMIN_URL MCP_URL; do
  [[ ${!name} =~ ^https?://[^/]+ ]] || fail "$name=${!name}: it must begin with http:// or https:// and a host"
done
case $TIER01 in '' | native | docker) ;; *) fail "TIER01=$TIER01: it can be native or docker" ;; esac
METADATA_URL=$ISSUER_URL/.well-known/oauth-authorization-server
export NO_PROXY="localhost,127.0.0.1,::1${NO_PROXY:+,$NO_PROXY}" no_proxy="localhost,127.0.0.1,::1${no_proxy:+,$no_proxy}"
