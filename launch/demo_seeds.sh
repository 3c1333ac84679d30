#!/usr/bin/env bash
# The demonstration with three seeds: makes the README's table of distilled against undistilled, with its spread.
#
#   launch/demo_seeds.sh [ARGUMENTS OF distil-jax demo]
set -euo pipefail
exec "$(dirname "${BASH_SOURCE[0]}")/demo.sh" --seeds 0 1 2 --output demo/seeds "$@"
