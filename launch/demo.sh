#!/usr/bin/env bash
# Runs the demonstration on this machine, from a fresh clone and without a model hub: makes an environment, trains a
# student on the docstrings of its packages, with and without the embedded teacher, and writes a report and a model.
#
#   launch/demo.sh [ARGUMENTS OF distil-jax demo]
#
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

start_on_cpu
exec "$PYTHON" -m distil_jax demo "$@"
