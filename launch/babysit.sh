#!/usr/bin/env bash
# Runs a command, and restarts it depending on its exit status, until the run is done or needs a person.
#
#   launch/babysit.sh [--dry-run] COMMAND...        for example: launch/babysit.sh launch/train.sh
#
#   75                 it was stopped and has saved a checkpoint: restart
#   1, 4, 137, 143     the machine failed: restart, at most DISTIL_RETRIES times without a newer checkpoint
#   any other          end with that status: 0 is done, 2 is bad input, 3 is a run that diverged, 130 is Ctrl-C
#
# On SIGTERM, SIGHUP or Ctrl-C it sends SIGTERM to the command, waits while the command saves, and ends with the
# command's status.
#
#   DISTIL_OUTPUT     the run folder; a newer checkpoint in it counts as progress (required)
#   DISTIL_RETRIES    restarts after failures without a newer checkpoint (5)
#   DISTIL_PAUSE      seconds between restarts (30)
set -euo pipefail
# shellcheck source=launch/contract.sh
source "$(dirname "${BASH_SOURCE[0]}")/contract.sh"

# Checks the variables for restarting.
read_babysit() {
  DISTIL_RETRIES="${DISTIL_RETRIES:-5}" DISTIL_PAUSE="${DISTIL_PAUSE:-30}"
  need_number DISTIL_RETRIES 0
  need_number DISTIL_PAUSE 0
}

# supervise FORWARD COMMAND...: runs the command and returns its status. On a signal it sets STOPPED (to `limit` for
# SIGUSR1), calls FORWARD PROCESS and waits until the command ends. The command has its own process group, so that it
# does not get Ctrl-C from the terminal as well: after a second signal distil-jax ends without saving.
STOPPED="" FORWARD="" CHILD="" FORWARDED_TO=""
supervise() {
  local status interrupted
  FORWARD="$1"
  trap 'interrupted=yes; forward_signal stop' TERM INT HUP
  trap 'interrupted=yes; forward_signal limit' USR1
  set -m
  "${@:2}" < /dev/null &
  CHILD=$!
  set +m
  # The signal came before there was a child.
  [[ -z "$STOPPED" || "$FORWARDED_TO" == "$CHILD" ]] || "$FORWARD" "$CHILD"
  while true; do
    interrupted="" status=0
    wait "$CHILD" || status=$?
    [[ -n "$interrupted" ]] || return "$status"
  done
}

forward_signal() {
  STOPPED="$1" FORWARDED_TO="$CHILD"
  [[ -z "$CHILD" ]] || "$FORWARD" "$CHILD"
}

terminate() { kill -TERM "$1" 2> /dev/null || true; }

# babysit NEWEST FORWARD COMMAND...: runs and restarts the command, as described at the top. NEWEST is a command that
# prints the step of the newest checkpoint; FORWARD is as in supervise.
babysit() {
  local newest="$1" forward="$2" before now status tries=0
  shift 2
  before="$("$newest")"
  while true; do
    status=0
    supervise "$forward" "$@" || status=$?
    [[ -z "$STOPPED" ]] || return "$status"
    now="$("$newest")"
    if ((now > before)); then before=$now tries=0; fi
    case "$status" in
      75) echo "babysit: the command was stopped and has saved a checkpoint; starting it again." >&2 ;;
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

[[ "${BASH_SOURCE[0]}" == "$0" ]] || return 0 # tpu.sh and slurm.sh only use the functions

options=()
while (($#)) && [[ "$1" == -* ]]; do options+=("$1") && shift; done
read_arguments "" "${options[@]}"
(($#)) || die "name the command to run; see --help."
need DISTIL_OUTPUT
read_babysit
[[ -z "$DRY_RUN" ]] || { quoted "$@" && exit 0; }
babysit newest_checkpoint terminate "$@"
