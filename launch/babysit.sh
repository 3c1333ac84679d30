#!/usr/bin/env bash
# Runs a command, and runs it again by its exit status, until the run is done or a person is needed.
#
#   launch/babysit.sh [--dry-run] COMMAND...        for example: launch/babysit.sh launch/train.sh
#
#   75                 it was stopped and has saved: again
#   1, 4, 137, 143     the machine failed: again, but not for ever (DISTIL_RETRIES)
#   any other          the end, with that status: 0 is done, 2 is bad input, 3 is a run that diverged, 130 is Ctrl-C
#
# Asked to stop itself (SIGTERM, SIGHUP, Ctrl-C), it passes SIGTERM on, waits while the command saves, and ends with the
# command's status.
#
#   DISTIL_OUTPUT     the run folder; a newer checkpoint in it is progress (needed)
#   DISTIL_RETRIES    how many times a failure is answered with a new start before there is a newer checkpoint (5)
#   DISTIL_PAUSE      seconds between two starts (30)
set -euo pipefail
# shellcheck source=launch/contract.sh
source "$(dirname "${BASH_SOURCE[0]}")/contract.sh"

# What babysitting needs to know.
read_babysitting() {
  DISTIL_RETRIES="${DISTIL_RETRIES:-5}" DISTIL_PAUSE="${DISTIL_PAUSE:-30}"
  need_number DISTIL_RETRIES 0
  need_number DISTIL_PAUSE 0
}

# supervise FORWARD COMMAND...: runs the command in a process group of its own, so that Ctrl-C in a terminal reaches it
# through us and not twice: at a second signal distil-jax ends without saving. A signal calls FORWARD PROCESS; the
# command ends in its own time, and its status is returned. Sets STOPPED, to `limit` where the signal was SIGUSR1.
STOPPED="" FORWARD="" CHILD="" PASSED_TO=""
supervise() {
  local status interrupted
  FORWARD="$1"
  trap 'interrupted=yes; pass_on stop' TERM INT HUP
  trap 'interrupted=yes; pass_on limit' USR1
  set -m
  "${@:2}" < /dev/null &
  CHILD=$!
  set +m
  # A signal from before there was a child.
  [[ -z "$STOPPED" || "$PASSED_TO" == "$CHILD" ]] || "$FORWARD" "$CHILD"
  while true; do
    interrupted="" status=0
    wait "$CHILD" || status=$?
    [[ -n "$interrupted" ]] || return "$status"
  done
}

pass_on() {
  STOPPED="$1" PASSED_TO="$CHILD"
  [[ -z "$CHILD" ]] || "$FORWARD" "$CHILD"
}

terminate() { kill -TERM "$1" 2> /dev/null || true; }

# babysit PROGRESS FORWARD COMMAND...: runs the command again and again, as babysit.sh says at its head. PROGRESS prints
# the newest committed step; FORWARD passes a signal on.
babysit() {
  local progress="$1" forward="$2" before now status tries=0
  shift 2
  before="$("$progress")"
  while true; do
    status=0
    supervise "$forward" "$@" || status=$?
    [[ -z "$STOPPED" ]] || return "$status"
    now="$("$progress")"
    if ((now > before)); then before=$now tries=0; fi
    case "$status" in
      75) echo "babysit: it was stopped and has saved; starting it again." >&2 ;;
      1 | 4 | 137 | 143)
        tries=$((tries + 1))
        if ((tries > DISTIL_RETRIES)); then
          echo "babysit: status $status, and no newer checkpoint in $tries starts: giving up." >&2
          return "$status"
        fi
        echo "babysit: status $status; starting it again ($tries of $DISTIL_RETRIES without a newer checkpoint)." >&2
        ;;
      *) return "$status" ;;
    esac
    supervise terminate sleep "$DISTIL_PAUSE" || true
    [[ -z "$STOPPED" ]] || return "$status"
  done
}

[[ "${BASH_SOURCE[0]}" == "$0" ]] || return 0 # tpu.sh and slurm.sh use the functions

options=()
while (($#)) && [[ "$1" == -* ]]; do options+=("$1") && shift; done
read_arguments "" "${options[@]}"
(($#)) || die "name the command to run; see --help."
need DISTIL_OUTPUT
read_babysitting
[[ -z "$DRY_RUN" ]] || { quoted "$@" && exit 0; }
babysit newest_checkpoint terminate "$@"
