#!/usr/bin/env bash
# What each part of the recipe is worth: trains every file of configs/ablation with several seeds on the docstrings of
# the installed packages, from the embedded teacher, and ends with one table of means and spreads. Started again, it
# goes on where it was.
#
#   launch/ablation.sh [FOLDER] [ARGUMENTS OF distil-jax train]      FOLDER: where to work (default: ablation)
#
#   DISTIL_SEEDS    the seeds (default: 0 1 2)
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

make_environment .
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
folder="${1:-ablation}"
shift || true
teacher=distil_jax/teacher
[[ -d "$folder/rows" ]] ||
  "$PYTHON" -m distil_jax prepare docstrings --tokenizer "$teacher" --sequence-length 128 --held-out 0.05 \
    --output "$folder/rows"
runs=()
for config in configs/ablation/*.toml; do
  for seed in ${DISTIL_SEEDS:-0 1 2}; do
    run="$folder/$(basename "$config" .toml)-$seed"
    "$PYTHON" -m distil_jax train "$config" --output "$run" --set "teacher.path=$teacher" \
      --set "data.path=$folder/rows" --set "seed=$seed" "$@"
    runs+=("$run")
  done
done
"$PYTHON" -m distil_jax report "${runs[@]}" --output "$folder"
