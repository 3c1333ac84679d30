#!/usr/bin/env bash
# Trains on the nodes of a SLURM cluster: one task per node, which drives all GPUs of its node. This checkout, the rows
# and the run folder are on a file system that the nodes share.
#
#   launch/slurm.sh submit [--dry-run] [-- MORE FLAGS OF sbatch, such as --partition=gpu --account=me]
#   launch/slurm.sh job [--dry-run]          what the job then does on its first node
#
# The job starts the training again by its exit status, as babysit.sh does. Some minutes before its time is up it has
# the training save, and puts itself back into the queue; after a failed node SLURM does that. `scancel JOB` ends it for
# good; `scancel --batch --signal=TERM JOB` lets it save first. Output is in slurm-JOB.out, where you submitted it.
#
#   DISTIL_NODES    how many nodes (1)
#   DISTIL_GPUS     how many GPUs a node has; 0 for CPU nodes (needed)
#   DISTIL_TIME     the time limit of one stay on the nodes, as sbatch takes it: 24:00:00 (needed)
#   DISTIL_CONFIG, DISTIL_OUTPUT, DISTIL_DATA, DISTIL_TEACHER, DISTIL_SET, DISTIL_EXTRA, DISTIL_LOCAL, DISTIL_PYTHON,
#   DISTIL_VENV: see train.sh. DISTIL_EXTRA is cuda12 unless it is set, or empty where DISTIL_GPUS is 0.
#   DISTIL_RETRIES, DISTIL_PAUSE: see babysit.sh
#
# DISTIL_COORDINATOR, DISTIL_NUM_PROCESSES and DISTIL_PROCESS_ID must not be set: SLURM knows all three.
set -euo pipefail
# shellcheck source=launch/babysit.sh
source "$(dirname "${BASH_SOURCE[0]}")/babysit.sh"

# What the job does on its first node.
job() {
  local status=0
  if [[ -n "$DRY_RUN" ]]; then
    "$ROOT/launch/train.sh" --setup --dry-run
    quoted srun "${TASKS[@]}" "$ROOT/launch/train.sh"
    return
  fi
  "$ROOT/launch/train.sh" --setup # once, before all nodes want the same environment
  # JAX would take one GPU for each task of SLURM's; our one task takes them all.
  ((DISTIL_GPUS == 0)) || JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((DISTIL_GPUS - 1)))"
  export JAX_LOCAL_DEVICE_IDS
  babysit newest_checkpoint stop_tasks srun "${TASKS[@]}" "$ROOT/launch/train.sh" || status=$?
  if [[ "$status" == 75 && "$STOPPED" == limit ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  return "$status"
}

# srun would turn SIGTERM into SIGKILL; scancel delivers it to the tasks, and not to this shell.
stop_tasks() { scancel --signal=TERM "$SLURM_JOB_ID"; }

read_arguments "submit job" "$@"
[[ -n "$VERB" ]] || die "name the verb, submit; see --help."
DISTIL_NODES="${DISTIL_NODES:-1}"
need DISTIL_GPUS DISTIL_TIME
need_number DISTIL_NODES 1
need_number DISTIL_GPUS 0
need_match DISTIL_TIME "[0-9:-]+" "a time such as 24:00:00 or 2-00:00:00"
((DISTIL_GPUS == 0)) || DISTIL_EXTRA="${DISTIL_EXTRA:-cuda12}"
[[ -z "${DISTIL_COORDINATOR:-}${DISTIL_NUM_PROCESSES:-}${DISTIL_PROCESS_ID:-}" ]] ||
  die "unset DISTIL_COORDINATOR, DISTIL_NUM_PROCESSES and DISTIL_PROCESS_ID: SLURM knows all three."
read_run
read_babysitting
export DISTIL_EXTRA
# No CPU binding: the threads that load the data use the whole node. After the first task has ended, the others get five
# minutes; a task that fails does not kill those that are saving.
TASKS=("--nodes=$DISTIL_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=300)
if [[ "$VERB" == job ]]; then
  job
  exit
fi

# The variables travel as they are, so nothing of theirs stands in the script.
submit=(sbatch --job-name=distil_jax "--nodes=$DISTIL_NODES" --ntasks-per-node=1 --exclusive --mem=0
  "--time=$DISTIL_TIME" --requeue --open-mode=append --signal=B:USR1@300 --export=ALL)
((DISTIL_GPUS == 0)) || submit+=("--gpus-per-node=$DISTIL_GPUS")
script="#!/usr/bin/env bash
exec $(quoted "$ROOT/launch/slurm.sh" job)"
if [[ -n "$DRY_RUN" ]]; then
  printf "%s <<'JOB'\n%s\nJOB\n" "$(quoted "${submit[@]}" "${REST[@]}")" "$script"
else
  "${submit[@]}" "${REST[@]}" <<< "$script"
fi
