#!/usr/bin/env bash
# install.sh FOLDER NAME: installs tests/requirements/NAME.txt into the virtual environment FOLDER, with UV if there is
# one, else with pip. An environment that was left half-made, or whose Python was upgraded, is gone, or is not PY, is made
# anew.
set -euo pipefail
. tests/harness/settings.sh
folder=$1 requirements=tests/requirements/$2.txt installed=$1/installed-$2.txt complete=$1/complete

# version_of PYTHON: prints its version, such as 3.12; fails if there is no such Python, or one that is too old.
version_of() {
  "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

# usable: true if the environment is complete, with the Python that it has now, and with PY if that is set.
usable() {
  local version
  version=$(version_of "$folder/bin/python") || return
  [ "$(cat "$complete" 2>/dev/null)" = "$version" ] || return
  [ -z "${PY-}" ] || [ "$(version_of "$PY")" = "$version" ]
}

if usable; then
  if cmp -s "$requirements" "$installed"; then exit; fi
else
  candidates=(python3.14 python3.13 python3.12 python3)
  [ -z "${PY-}" ] || candidates=("$PY")
  python=''
  for candidate in "${candidates[@]}"; do
    if version_of "$candidate" >/dev/null; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || fail "no Python 3.12 or newer: install one, or name it: make PY=…"
  rm -rf "$folder"
fi

echo "installing $requirements into $folder"
rm -f "$complete"
if [ -n "${UV-}" ]; then
  [ -d "$folder" ] || "$UV" venv --quiet --python "$python" "$folder"
  "$UV" pip install --quiet --python "$folder/bin/python" --requirement "$requirements"
else
  if [ ! -d "$folder" ]; then
    "$python" -c 'import ensurepip' 2>/dev/null ||
      fail "Python has no venv: install it, on Debian and Ubuntu the package python$(version_of "$python")-venv"
    "$python" -m venv "$folder"
  fi
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --requirement "$requirements"
fi
cp "$requirements" "$installed"
version_of "$folder/bin/python" >"$complete"
