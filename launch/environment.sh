# Sourced by the scripts beside it: makes the environment of this checkout, .venv, and keeps it up to date.
# Sets PYTHON. $1: what to install, such as . or '.[test]'.
#   DISTIL_PYTHON   the interpreter to make it with (default: python3; 3.11 or newer)
#   DISTIL_VENV     where it is (default: .venv in this checkout)
# shellcheck shell=bash

make_environment() {
  local root venv stamp
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  venv="${DISTIL_VENV:-$root/.venv}"
  PYTHON="$venv/bin/python"
  stamp="$venv/.made-from"
  if [[ ! -x "$PYTHON" ]]; then
    "${DISTIL_PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "distil_jax needs Python 3.11 or newer: set DISTIL_PYTHON to one." >&2
      return 2
    }
    echo "Making $venv"
    "${DISTIL_PYTHON:-python3}" -m venv "$venv"
  fi
  # Installed again when what is asked for, or what it is made from, has changed.
  if [[ "$(cat "$stamp" 2>/dev/null)" != "$(echo "$1"; cat "$root/pyproject.toml" "$root/setup.cfg")" ]]; then
    echo "Installing the packages (a few minutes the first time)"
    (cd "$root" && "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$1")
    (echo "$1"; cat "$root/pyproject.toml" "$root/setup.cfg") > "$stamp"
  fi
}
