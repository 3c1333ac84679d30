#!/usr/bin/env bash
# Trains on the nodes of a SLURM cluster, with one task per node, which uses all GPUs of its node. This checkout, the
# rows and the run folder must be on a file system that the nodes share.
#
#   launch/slurm.sh submit [--dry-run] [-- MORE FLAGS OF sbatch, such as --partition=gpu --account=me]
#   launch/slurm.sh job [--dry-run]          what the job runs on its first node
#
# The job restarts the training depending on its exit status, like babysit.sh. Five minutes before its time limit the
# training saves, and the job requeues itself; after a node failure SLURM requeues it. `scancel JOB` ends it for good;
# `scancel --batch --signal=TERM JOB` lets it save first. The output is in slurm-JOB.out, where you submitted the job.
#
#   DISTIL_NODES    number of nodes (1)
#   DISTIL_GPUS     number of GPUs per node; 0 for CPU nodes (required)
#   DISTIL_TIME     the time limit until the job is requeued, as sbatch takes it: 24:00:00 (required)
#   DISTIL_CONFIG, DISTIL_OUTPUT, DISTIL_DATA, DISTIL_TEACHER, DISTIL_SET, DISTIL_EXTRA, DISTIL_LOCAL, DISTIL_PYTHON,
#   DISTIL_VENV: see train.sh. DISTIL_EXTRA is cuda12 unless it is set, or empty where DISTIL_GPUS is 0.
#   DISTIL_RETRIES, DISTIL_PAUSE: see babysit.sh
#
# DISTIL_COORDINATOR, DISTIL_NUM_PROCESSES and DISTIL_PROCESS_ID must not be set: SLURM provides all three.
set -euo pipefail
# shellcheck source=launch/babysit.sh
source "$(dirname "${BASH_SOURCE[0]}")/babysit.sh"

# What the job runs on its first node.
job() {
  local status=0
  if [[ -n "$DRY_RUN" ]]; then
    "$ROOT/launch/train.sh" --setup --dry-run
    quoted srun "${TASKS[@]}" "$ROOT/launch/train.sh"
    return
  fi
  "$ROOT/launch/train.sh" --setup # once, before all nodes use the environment
  # By default JAX uses one GPU per SLURM task; our only task on a node uses all of them.
  ((DISTIL_GPUS == 0)) || JAX_LOCAL_DEVICE_IDS="$(seq -s, 0 $((DISTIL_GPUS - 1)))"
  export JAX_LOCAL_DEVICE_IDS
  babysit newest_checkpoint stop_tasks srun "${TASKS[@]}" "$ROOT/launch/train.sh" || status=$?
  if [[ "$status" == 75 && "$STOPPED" == limit ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
  return "$status"
}

# scancel sends SIGTERM to the tasks and not to this shell; srun would turn it into SIGKILL.
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
  die "unset DISTIL_COORDINATOR, DISTIL_NUM_PROCESSES and DISTIL_PROCESS_ID: SLURM provides all three."
read_run
read_babysit
export DISTIL_EXTRA
# No CPU binding, because the threads that load the data use the whole node. After the first task has ended, the others
# have five minutes to save; a task that fails does not kill them.
TASKS=("--nodes=$DISTIL_NODES" --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=300)
if [[ "$VERB" == job ]]; then
  job
  exit
fi

# sbatch exports the variables, so the script does not contain them.
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
