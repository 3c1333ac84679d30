#!/usr/bin/env bash
# The whole path on this machine, from a bare clone, without a model hub: an environment, text from the docstrings of
# its packages, the embedded teacher, a distilled and an undistilled student, one table, curves, an exported folder.
#
#   launch/demo.sh [ARGUMENTS OF distil-jax demo]
#
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

make_environment .
# What it installs computes on the CPU; were libtpu there from the tests, JAX would look for a TPU and say so.
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
exec "$PYTHON" -m distil_jax demo "$@"
