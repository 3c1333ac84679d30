#!/usr/bin/env bash
# Runs the demonstration with three seeds, for the README's table of distilled and undistilled students.
#
#   launch/demo_seeds.sh [ARGUMENTS OF distil-jax demo]
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/demo.sh" --seeds 0 1 2 --output demo/seeds "$@"
