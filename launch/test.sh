#!/usr/bin/env bash
# Runs the whole test suite, in an environment that it makes itself: lint, then tests. No network once that is made.
#
#   launch/test.sh [PYTEST ARGUMENTS]
#
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh. Where PyTorch 2.13.0 has no build for that Python (or
#   DISTIL_TORCH=no), the tests that compare with PyTorch skip visibly.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

if [[ "${DISTIL_TORCH:-yes}" == no ]]; then
  make_environment ".[test]"
else
  make_environment ".[test,torch]"
fi
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
exec "$PYTHON" -m pytest --numprocesses "$(nproc)" --dist worksteal "$@"
