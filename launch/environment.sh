# Sourced by the other scripts: makes the environment of this checkout and keeps it up to date. Sets ROOT, the checkout.
#
#   DISTIL_PYTHON   the interpreter to make it with, 3.11 or newer (default: python3)
#   DISTIL_VENV     its folder (default: .venv in this checkout)
# shellcheck shell=bash

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"

environment_python() { echo "${DISTIL_VENV:-$ROOT/.venv}/bin/python"; }

# is_new_enough INTERPRETER
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }

# make_environment WHAT: makes the environment if it does not exist, and installs WHAT, such as . or '.[test]', again if
# it or the project's metadata has changed. Sets PYTHON, the interpreter of the environment.
make_environment() {
  local interpreter="${DISTIL_PYTHON:-python3}" venv stamp made_from
  PYTHON="$(environment_python)"
  venv="${PYTHON%/bin/python}"
  stamp="$venv/.made-from"
  if [[ ! -x "$PYTHON" ]]; then
    is_new_enough "$interpreter" || {
      echo "distil_jax needs Python 3.11 or newer: set DISTIL_PYTHON to one." >&2
      return 2
    }
    echo "Making $venv"
    "$interpreter" -m venv "$venv"
  fi
  made_from="$(echo "$1" && cat "$ROOT/pyproject.toml" "$ROOT/setup.cfg")"
  if [[ "$(cat "$stamp" 2> /dev/null)" != "$made_from" ]]; then
    echo "Installing the packages (a few minutes the first time)"
    (cd "$ROOT" && "$PYTHON" -m pip install --quiet --disable-pip-version-check --editable "$1")
    echo "$made_from" > "$stamp"
  fi
}

# Goes to the checkout and makes an environment that computes on the CPU.
start_on_cpu() {
  cd "$ROOT" || return
  make_environment .
  # If the tests have installed libtpu here, JAX would look for a TPU and warn.
  export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
}
