#!/usr/bin/env bash
# install.sh FOLDER/MARK REQUIREMENTS: installs pinned packages into the virtual environment FOLDER, with UV if there is
# one, else with pip, and makes the file MARK. PY names the Python.
set -euo pipefail
fail() { echo "make: $1" >&2 && exit 1; }
folder=${1%/*}
for python in ${PY:-python3.14 python3.13 python3.12 python3} ''; do
  [ -n "$python" ] || fail "no Python 3.12 or newer: install one, or name it: make PY=…"
  ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || break
done
echo "installing $2 into $folder"
[ -e "$folder/ready" ] || [ -e "$folder/tier01" ] || rm -rf "$folder" # what an interrupted run has left
if [ -n "${UV-}" ]; then
  "$UV" venv --quiet --allow-existing --python "$python" "$folder"
  "$UV" pip install --quiet --python "$folder/bin/python" --requirement "$2"
else
  "$python" -c 'import ensurepip' 2>/dev/null ||
    fail "$("$python" -c 'import sys; print("Python has no venv: install it, on Debian and Ubuntu python%d.%d-venv" % sys.version_info[:2])')"
  "$python" -m venv "$folder"
  "$folder/bin/pip" install --quiet --disable-pip-version-check --no-compile --requirement "$2"
fi
touch "$1"
