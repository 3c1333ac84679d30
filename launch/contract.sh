# Sourced by train.sh, babysit.sh, tpu.sh, gke.sh and slurm.sh: functions to read arguments and the variables that
# README.md describes, to quote words, and to find the newest checkpoint.
# shellcheck shell=bash

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

# The variables that describe a run; tpu.sh and gke.sh pass them on to the hosts.
RUN_VARIABLES=(DISTIL_CONFIG DISTIL_OUTPUT DISTIL_DATA DISTIL_TEACHER DISTIL_SET DISTIL_EXTRA DISTIL_LOCAL)

# Prints an error message and exits with status 2.
die() {
  echo "$(basename "$0"): $*" >&2
  exit 2
}

# read_arguments VERBS ARGUMENTS...: reads --help (which prints the comment at the top of the script), --dry-run, one of
# VERBS, and everything after a --. Sets DRY_RUN, VERB and REST.
read_arguments() {
  local known verbs="$1"
  shift
  DRY_RUN="" VERB="" REST=()
  while (($#)); do
    case "$1" in
      -h | --help)
        awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$0"
        exit 0
        ;;
      --dry-run) DRY_RUN=yes ;;
      --)
        shift
        REST=("$@")
        return
        ;;
      *)
        [[ -z "$VERB" ]] || die "one verb at a time: $(quoted "$1") came after $VERB."
        for known in $verbs; do [[ "$1" != "$known" ]] || VERB="$1"; done
        [[ -n "$VERB" ]] || die "$(quoted "$1") is not one of: --help --dry-run${verbs:+ $verbs}."
        ;;
    esac
    shift
  done
}

# Prints words in quotes where necessary, so that bash reads exactly these words.
quoted() {
  local word line=()
  for word in "$@"; do
    [[ "$word" =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || word="${word@Q}"
    line+=("$word")
  done
  printf '%s\n' "${line[*]}"
}

# Runs a command, or only prints it in a dry run.
run() {
  if [[ -n "$DRY_RUN" ]]; then quoted "$@"; else "$@"; fi
}

# need NAME...: these variables must be set and not empty.
need() {
  local name
  for name in "$@"; do [[ -n "${!name:-}" ]] || die "$name is not set; see --help."; done
}

# need_number NAME MINIMUM
need_number() {
  [[ "${!1}" =~ ^[0-9]{1,6}$ ]] && ((10#${!1} >= $2)) && return
  die "$1 must be a whole number of at least $2, not $(quoted "${!1}")."
}

# need_match NAME PATTERN DESCRIPTION: PATTERN is an extended regular expression.
need_match() {
  [[ "${!1}" =~ ^($2)$ ]] || die "$1 must be $3, not $(quoted "${!1}")."
}

# Checks the variables that describe the run. Sets OVERRIDES, the words of DISTIL_SET.
read_run() {
  local word
  need DISTIL_CONFIG DISTIL_OUTPUT
  DISTIL_EXTRA="${DISTIL_EXTRA:-}" DISTIL_LOCAL="${DISTIL_LOCAL:-}" OVERRIDES=()
  need_match DISTIL_EXTRA "|tpu|cuda12|cuda13" "tpu, cuda12, cuda13 or empty"
  need_match DISTIL_LOCAL "|/.*" "an absolute path"
  read -r -d '' -a OVERRIDES <<< "${DISTIL_SET:-}" || true # unlike word splitting, never takes [0,2,4] as a pattern
  for word in "${OVERRIDES[@]}"; do
    [[ "$word" =~ ^[a-z_.]+= ]] || die "DISTIL_SET takes section.key=value separated by spaces, not $(quoted "$word")."
  done
}

# DISTIL_NAME must be a name that Google Cloud and XPK accept.
need_name() { need_match DISTIL_NAME "[a-z]([-a-z0-9]{0,38}[a-z0-9])?" "up to 40 of a-z, 0-9 and dashes"; }

# Checks the variables of a run on Google Cloud, where the bucket is mounted at /mnt/DISTIL_BUCKET.
read_google_run() {
  DISTIL_EXTRA="${DISTIL_EXTRA:-tpu}" DISTIL_LOCAL="${DISTIL_LOCAL:-/var/tmp/distil_jax}"
  read_run
  need DISTIL_BUCKET
  need_match DISTIL_BUCKET "[a-z0-9][a-z0-9._-]*" "the name of a bucket, without gs://"
  [[ "$DISTIL_OUTPUT" == "/mnt/$DISTIL_BUCKET/"?* ]] ||
    die "DISTIL_OUTPUT must be a folder in /mnt/$DISTIL_BUCKET, not $(quoted "$DISTIL_OUTPUT")."
}

# Prints the URL of the run folder in the bucket.
run_in_bucket() { echo "gs://${DISTIL_OUTPUT#/mnt/}"; }

# with_variables NAME... -- COMMAND...: prints a command for another host, which runs COMMAND with the variables of the
# run and the named ones.
with_variables() {
  local name words=(env)
  local names=("${RUN_VARIABLES[@]}")
  while [[ "$1" != -- ]]; do names+=("$1") && shift; done
  for name in "${names[@]}"; do [[ -z "${!name:-}" ]] || words+=("$name=${!name}"); done
  quoted "${words[@]}" "${@:2}"
}

# Reads paths of committed checkpoints, CHECKPOINTS/STEP/manifest.json, and prints the newest step, or -1.
newest_step() {
  { echo -1 && sed -nE 's|.*/([0-9]+)/manifest\.json$|\1|p'; } | sort -n | tail -n 1
}

newest_checkpoint() { printf '%s\n' "$DISTIL_OUTPUT"/checkpoints/*/manifest.json | newest_step; }

# Packs the part of this checkout that other hosts need, without environments and runs.
pack_checkout() {
  run mkdir -p "$ROOT/build"
  run tar -C "$ROOT" --exclude=__pycache__ -czf "$ROOT/build/distil_jax.tar.gz" \
    LICENSE README.md configs distil_jax launch pyproject.toml setup.cfg
}

# Copies the run folder, without its checkpoints, from the bucket to runs/ in the current folder.
fetch_run() {
  local folder
  folder="runs/$(basename "$DISTIL_OUTPUT")"
  run mkdir -p "$folder"
  run gcloud storage rsync --recursive '--exclude=.*checkpoints/.*' "$(run_in_bucket)" "$folder"
}

# combined_status STATUS...: prints one status for several hosts. Statuses that need a person have priority over 75.
combined_status() {
  local status first highest=0
  for first in 2 3 75; do
    for status in "$@"; do
      if ((status == first)); then echo "$first" && return; fi
    done
  done
  for status in "$@"; do ((status <= highest)) || highest=$status; done
  echo "$highest"
}
