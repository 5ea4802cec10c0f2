#!/usr/bin/env bash
# install.sh FOLDER NAME: installs tests/requirements/NAME.txt into the virtual environment FOLDER. Makes the environment if it
# is missing, and makes it again if it is incomplete, if its Python is gone or too old, or if PY names another version.
# Python runs with -I, so that it ignores PYTHONPATH and the like.
set -euo pipefail
folder=$1
requirements=tests/requirements/$2.txt
installed=$1/installed-$2.txt

# version_of PYTHON: prints its version, such as 3.12; fails if there is no such Python, or one that is too old.
version_of() {
  "$1" -I -c 'import sys; print("%d.%d" % sys.version_info[:2]); sys.exit(sys.version_info < (3, 12))' 2>/dev/null
}

# usable: true if the environment can be installed into.
usable() {
  version_of "$folder/bin/python" >/dev/null || return
  "$folder/bin/python" -I -c 'import pip' 2>/dev/null || return
  [ -z "${PY-}" ] || [ "$(version_of "$PY")" = "$(version_of "$folder/bin/python")" ]
}

if usable; then
  if cmp -s "$requirements" "$installed"; then exit; fi
else
  candidates=${PY:-python3.14 python3.13 python3.12 python3}
  for python in $candidates; do
    if version_of "$python" >/dev/null; then
      if [ -e "$folder" ]; then echo "making $folder again: it can't be used"; fi
      rm -rf "$folder"
      "$python" -I -m venv "$folder"
      break
    fi
  done
  if ! usable; then
    echo "install.sh: no Python 3.12 or newer: install one, or name it, as in make PY=python3.13 (tried: $candidates)" >&2
    exit 1
  fi
fi

echo "installing $requirements into $folder"
# pip's settings, of which some would make it install elsewhere, or not at all
unset PIP_CONSTRAINT PIP_DRY_RUN PIP_PREFIX PIP_ROOT PIP_TARGET
PIP_USER=0 "$folder/bin/python" -I -m pip install --quiet --disable-pip-version-check --no-compile \
  --require-hashes -r "$requirements"
cp "$requirements" "$installed"
