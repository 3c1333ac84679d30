#!/usr/bin/env bash
# Measures what each part of the recipe contributes: trains a student with every file of configs/ablation and several
# seeds, on the docstrings of the installed packages and from the embedded teacher, and writes one table of means and
# standard deviations. Start it again to resume.
#
#   launch/ablation.sh [FOLDER] [ARGUMENTS OF distil-jax train]      FOLDER: for all files (default: ablation)
#
#   DISTIL_SEEDS    the seeds, separated by spaces (default: 0 1 2)
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

start_on_cpu
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
