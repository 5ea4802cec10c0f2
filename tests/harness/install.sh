#!/usr/bin/env bash
# install.sh FOLDER NAME: installs tests/requirements/NAME.txt into the virtual environment FOLDER, with UV if there is
# one, else with pip. An environment whose Python is gone, or is not PY, and one that was left half-made, is made anew.
set -euo pipefail
. tests/harness/settings.sh
folder=$1 requirements=tests/requirements/$2.txt installed=$1/installed-$2.txt

# version_of PYTHON: prints its version, such as 3.12; fails if there is no such Python, or one that is too old.
version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 12))' 2>/dev/null; }

version=$(version_of "$folder/bin/python") || version=none
if [ -e "$folder/half-made" ] || [ ! -d "$folder/lib/python$version" ] ||
  { [ -n "${PY-}" ] && [ "$(version_of "$PY")" != "$version" ]; }; then
  python=''
  for candidate in ${PY:-python3.14 python3.13 python3.12 python3}; do
    if version_of "$candidate" >/dev/null; then
      python=$candidate
      break
    fi
  done
  [ -n "$python" ] || fail "no Python 3.12 or newer: install one, or name it: make PY=…"
  rm -rf "$folder"
elif cmp -s "$requirements" "$installed"; then
  exit
fi

echo "installing $requirements into $folder"
mkdir -p "$folder"
touch "$folder/half-made"
if [ -n "${UV-}" ]; then
  [ -e "$folder/bin/python" ] || "$UV" venv --quiet --allow-existing --python "$python" "$folder"
  "$UV" pip install --quiet --python "$folder/bin/python" --requirement "$requirements"
else
  if [ ! -e "$folder/bin/python" ]; then
    "$python" -c 'import ensurepip' 2>/dev/null ||
      fail "Python has no venv: install it, on Debian and Ubuntu the package python$(version_of "$python")-venv"
    "$python" -m venv "$folder"
  fi
  "$folder/bin/python" -m pip install --quiet --disable-pip-version-check --no-compile --requirement "$requirements"
fi
cp "$requirements" "$installed"
rm "$folder/half-made"
