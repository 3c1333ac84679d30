#!/usr/bin/env bash
# Trains on this host, in an environment that it makes itself: a CPU, one or more GPUs, or the chips of a TPU VM.
# One process drives all of them. Started again with the same variables, it goes on from the newest checkpoint.
#
#   launch/train.sh [--dry-run] [--setup]
#
#   --dry-run   prints what would run, and does nothing
#   --setup     mounts the bucket, makes the environment and the local copies, and stops. Where python3 is older than
#               3.11, it fetches a Python 3.12 with uv.
#
#   DISTIL_CONFIG    a preset of configs/ or a TOML file (needed)
#   DISTIL_OUTPUT    the run folder, on storage that all hosts of the run share (needed)
#   DISTIL_DATA      the folder that `distil-jax prepare` wrote; becomes --set data.path=
#   DISTIL_TEACHER   a model folder or a hub id; becomes --set teacher.path=
#   DISTIL_SET       more overrides, section.key=value, separated by spaces
#   DISTIL_EXTRA     what JAX is to run on: tpu, cuda12, cuda13, or empty for a CPU
#   DISTIL_LOCAL     a folder on this host's own disk: rows and teacher that are named by an absolute path are copied
#                    there first, because rows are memory-mapped and shared storage is slow at that (default: no copy)
#   DISTIL_BUCKET    a Cloud Storage bucket that --setup mounts at /mnt/DISTIL_BUCKET with gcsfuse (default: none)
#   DISTIL_COORDINATOR, DISTIL_NUM_PROCESSES, DISTIL_PROCESS_ID
#                    for several hosts that nothing else introduces to each other: host:port of the first one, how many
#                    there are, and which one this is, from 0. TPU VMs, GKE and SLURM need none of the three.
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh
#
# Exit status: that of `distil-jax train`; see README.md.
set -euo pipefail
LAUNCH="$(dirname "${BASH_SOURCE[0]}")"
# shellcheck source=launch/contract.sh
source "$LAUNCH/contract.sh"
# shellcheck source=launch/environment.sh
source "$LAUNCH/environment.sh"

read_arguments --setup "$@"
((${#REST[@]} == 0)) || die "nothing goes after -- here: use DISTIL_SET."
read_run
case "${DISTIL_COORDINATOR:+c}${DISTIL_NUM_PROCESSES:+n}${DISTIL_PROCESS_ID:+i}" in
  "") ;;
  cni)
    need_match DISTIL_COORDINATOR ".+:[0-9]+" "host:port"
    need_number DISTIL_NUM_PROCESSES 1
    need_number DISTIL_PROCESS_ID 0
    ((DISTIL_PROCESS_ID < DISTIL_NUM_PROCESSES)) ||
      die "DISTIL_PROCESS_ID $DISTIL_PROCESS_ID must be below DISTIL_NUM_PROCESSES $DISTIL_NUM_PROCESSES."
    ;;
  *) die "DISTIL_COORDINATOR, DISTIL_NUM_PROCESSES and DISTIL_PROCESS_ID go together: set all three or none." ;;
esac

# copy_folder FROM TO: whole or not at all, and not again while the files that it was copied from are the same.
copy_folder() {
  local files
  files="$(cd "$1" && find -L . -type f -printf '%p %s %T@\n' | sort)" || die "cannot read the folder $(quoted "$1")."
  [[ "$(cat "$2.copied" 2> /dev/null)" != "$1"$'\n'"$files" ]] || return 0
  echo "Copying $1 to $2"
  rm -rf "$2" "$2.copied" "$2.partial"
  mkdir -p "$(dirname "$2")"
  cp -RL "$1" "$2.partial"
  mv "$2.partial" "$2"
  printf '%s\n' "$1" "$files" > "$2.copied"
}

mount_bucket() {
  local folder="/mnt/$DISTIL_BUCKET" packages="https://packages.cloud.google.com/apt"
  if ! command -v gcsfuse > /dev/null; then
    run sudo bash -c "curl -fsS $packages/doc/apt-key.gpg > /usr/share/keyrings/cloud.google.asc && echo deb \
      '[signed-by=/usr/share/keyrings/cloud.google.asc]' $packages gcsfuse-\$(lsb_release -cs) main \
      > /etc/apt/sources.list.d/gcsfuse.list && apt-get -q -o DPkg::Lock::Timeout=600 update &&
      apt-get -q -y -o DPkg::Lock::Timeout=600 install gcsfuse"
  fi
  ! mountpoint -q "$folder" || return 0
  run sudo install -d -o "$(id -u)" "$folder"
  # Nothing remembered: what one host has written, the others must see at once.
  run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$DISTIL_BUCKET" "$folder"
}

find_python() {
  ! python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || return 0
  run python3 -m pip install --quiet --user uv
  run python3 -m uv python install --quiet 3.12
  [[ -n "$DRY_RUN" ]] || DISTIL_PYTHON="$(python3 -m uv python find 3.12)"
}

if [[ "$VERB" == --setup ]]; then
  [[ -z "${DISTIL_BUCKET:-}" ]] || mount_bucket
  [[ -n "${DISTIL_PYTHON:-}" ]] || find_python
fi
# The environment's interpreter, as make_environment sets it.
PYTHON="${DISTIL_VENV:-$ROOT/.venv}/bin/python"
run make_environment ".${DISTIL_EXTRA:+[$DISTIL_EXTRA]}"
data="${DISTIL_DATA:-}" teacher="${DISTIL_TEACHER:-}"
if [[ -n "$DISTIL_LOCAL" && "$data" == /* ]]; then
  run copy_folder "$data" "$DISTIL_LOCAL/data"
  data="$DISTIL_LOCAL/data"
fi
if [[ -n "$DISTIL_LOCAL" && "$teacher" == /* ]]; then
  run copy_folder "$teacher" "$DISTIL_LOCAL/teacher"
  teacher="$DISTIL_LOCAL/teacher"
fi
[[ "$VERB" != --setup ]] || exit 0

command=("$PYTHON" -m distil_jax train "$DISTIL_CONFIG" --output "$DISTIL_OUTPUT")
[[ -z "$data" ]] || command+=(--set "data.path=$data")
[[ -z "$teacher" ]] || command+=(--set "teacher.path=$teacher")
for override in "${OVERRIDES[@]}"; do command+=(--set "$override"); done
[[ -z "$DRY_RUN" ]] || { quoted "${command[@]}" && exit 0; }
exec "${command[@]}"
