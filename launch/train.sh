#!/usr/bin/env bash
# Trains on this host, in an environment that it makes itself. One process uses the CPU, all GPUs, or all chips of a TPU
# VM. Start it again with the same variables to resume from the newest checkpoint.
#
#   launch/train.sh [--dry-run] [--setup]
#
#   --dry-run   prints the commands, and runs nothing
#   --setup     mounts the bucket, makes the environment and the local copies, and exits. If python3 is older than 3.11,
#               it installs Python 3.12 with uv.
#
#   DISTIL_CONFIG    a preset of configs/ or a TOML file (required)
#   DISTIL_OUTPUT    the run folder, on storage that all hosts of the run share (required)
#   DISTIL_DATA      the folder that `distil-jax prepare` wrote, for --set data.path=
#   DISTIL_TEACHER   a model folder or a hub id, for --set teacher.path=
#   DISTIL_SET       more overrides, section.key=value, separated by spaces
#   DISTIL_EXTRA     what JAX runs on: tpu, cuda12, cuda13, or empty for a CPU
#   DISTIL_LOCAL     a folder on this host's own disk, to which rows and teacher are copied first if their paths are
#                    absolute. Rows are memory-mapped, which is slow on shared storage. (default: no copies)
#   DISTIL_BUCKET    a Cloud Storage bucket that --setup mounts at /mnt/DISTIL_BUCKET with gcsfuse (default: none)
#   DISTIL_COORDINATOR, DISTIL_NUM_PROCESSES, DISTIL_PROCESS_ID
#                    for several hosts: host:port of the first one, the number of hosts, and the index of this one, from
#                    0. TPU VMs, GKE and SLURM need none of the three, because JAX finds the hosts there.
#   DISTIL_PYTHON, DISTIL_VENV: see environment.sh
#
# Exit status: that of `distil-jax train`; see README.md.
set -euo pipefail
# shellcheck source=launch/contract.sh
source "$(dirname "${BASH_SOURCE[0]}")/contract.sh"

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

# copy_folder FROM TO: copies a folder completely or not at all, and only if its files have changed since the last copy.
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
  # No metadata cache, because every host must see at once what another one has written.
  run gcsfuse --implicit-dirs --metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 \
    "$DISTIL_BUCKET" "$folder"
}

# Sets DISTIL_PYTHON to a Python 3.12, which it installs, unless python3 is new enough.
find_python() {
  ! is_new_enough python3 || return 0
  run python3 -m pip install --quiet --user uv
  run python3 -m uv python install --quiet 3.12
  [[ -n "$DRY_RUN" ]] || DISTIL_PYTHON="$(python3 -m uv python find 3.12)"
}

if [[ "$VERB" == --setup ]]; then
  [[ -z "${DISTIL_BUCKET:-}" ]] || mount_bucket
  [[ -n "${DISTIL_PYTHON:-}" ]] || find_python
fi
PYTHON="$(environment_python)" # in a dry run, make_environment does not set it
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
