#!/usr/bin/env bash
# Trains on Cloud TPU VMs, made as queued resources: one or several slices, on demand or spot.
#
#   launch/tpu.sh VERB [--dry-run] [-- MORE FLAGS OF gcloud compute tpus queued-resources create]
#
#   create     requests the machines and waits for them; requests them again if they were preempted
#   setup      copies this checkout to every host, makes its environment there, mounts the bucket, and copies rows and
#              teacher to the host's own disk
#   run        trains on all hosts, prints their output, and ends with one combined status (see README.md)
#   attempt    create, setup, run
#   babysit    repeats attempt until the run is done, like babysit.sh; also after preemptions
#   stop       makes the hosts save and stop; the `run` that waits for them then ends with status 75
#   logs       copies the run folder, without its checkpoints, to runs/, and prints the last lines of every host
#   delete     deletes the machines; the bucket stays
#
#   DISTIL_PROJECT, DISTIL_ZONE    where to run (required)
#   DISTIL_NAME           name of the machines (required)
#   DISTIL_BUCKET         a Cloud Storage bucket with hierarchical namespace, mounted on every host at
#                         /mnt/DISTIL_BUCKET (required, except for create, stop and delete)
#   DISTIL_ACCELERATOR    type and size of a slice (v5litepod-16: four hosts with four chips each)
#   DISTIL_RUNTIME        software version of the hosts, which depends on the type (v2-alpha-tpuv5-lite)
#   DISTIL_CAPACITY       on-demand or spot (on-demand)
#   DISTIL_SLICES         number of slices (1); together at most 64 hosts, because gcloud connects to no more at once
#   DISTIL_CONFIG, DISTIL_OUTPUT, DISTIL_DATA, DISTIL_TEACHER, DISTIL_SET, DISTIL_EXTRA, DISTIL_LOCAL: see train.sh.
#                         Paths are those on the hosts: DISTIL_OUTPUT is in /mnt/DISTIL_BUCKET. The default of
#                         DISTIL_EXTRA is tpu, and that of DISTIL_LOCAL is /var/tmp/distil_jax.
#   DISTIL_RETRIES, DISTIL_PAUSE: see babysit.sh
set -euo pipefail
# shellcheck source=launch/babysit.sh
source "$(dirname "${BASH_SOURCE[0]}")/babysit.sh"

# On a host: the files with the output and the process id of its run.
HOST_LOG="$HOME/distil_jax.log" HOST_PROCESS="$HOME/distil_jax.pid"

cloud() { run gcloud compute tpus queued-resources "$@" "--project=$DISTIL_PROJECT" "--zone=$DISTIL_ZONE" --quiet; }
on_hosts() { cloud ssh "$DISTIL_NAME" --node=all --worker=all "--command=$1"; }
host_command() { on_hosts "cd distil_jax && exec $(with_variables DISTIL_BUCKET -- "$@")"; }

# Prints the state of the machines, or nothing if there are none.
state() {
  local problem status=0
  problem="$(mktemp)"
  cloud describe "$DISTIL_NAME" '--format=value(state.state)' 2> "$problem" || status=$?
  if ((status)) && ! grep -q NOT_FOUND "$problem"; then
    cat "$problem" >&2
  else
    status=0
  fi
  rm "$problem"
  return "$status"
}

# Requests the machines.
request() {
  local flags=("--accelerator-type=$DISTIL_ACCELERATOR" "--runtime-version=$DISTIL_RUNTIME")
  if ((DISTIL_SLICES > 1)); then
    flags+=("--node-count=$DISTIL_SLICES" "--node-prefix=$DISTIL_NAME")
  else
    flags+=("--node-id=$DISTIL_NAME")
  fi
  [[ "$DISTIL_CAPACITY" != spot ]] || flags+=(--spot)
  cloud create "$DISTIL_NAME" "${flags[@]}" "${REST[@]}"
}

create() {
  local now requested=""
  if [[ -n "$DRY_RUN" ]]; then state && request && return; fi
  while true; do
    now="$(state)"
    case "$now" in
      ACTIVE) return ;;
      "")
        request
        requested=yes
        ;;
      FAILED | SUSPENDED)
        echo "tpu.sh: $DISTIL_NAME is $now: deleting it." >&2
        cloud delete "$DISTIL_NAME" --force
        [[ -z "$requested" ]] || exit 4 # this request has failed
        ;;
      *) echo "tpu.sh: $DISTIL_NAME is $now: waiting." >&2 && sleep "$DISTIL_PAUSE" ;;
    esac
  done
}

setup() {
  pack_checkout
  cloud scp "$ROOT/build/distil_jax.tar.gz" "$DISTIL_NAME:distil_jax.tar.gz" --node=all --worker=all
  on_hosts "mkdir -p distil_jax && tar -xzf distil_jax.tar.gz -C distil_jax"
  host_command launch/train.sh --setup
}

# What run does on each host. The training writes to a file, which we print, so that it survives a lost connection.
host_run() {
  local status=0
  host_stop # a run of an earlier connection may still hold the chips
  : > "$HOST_LOG" # must exist and be empty when tail opens it
  "$ROOT/launch/train.sh" < /dev/null >> "$HOST_LOG" 2>&1 &
  echo $! > "$HOST_PROCESS"
  tail --lines=+1 --follow --sleep-interval=0.2 --pid=$! "$HOST_LOG" || true
  wait $! || status=$?
  echo "distil_jax: host $HOSTNAME ended with status $status"
}

# What stop does on each host.
host_stop() {
  local process tries
  process="$(cat "$HOST_PROCESS" 2> /dev/null)" || return 0
  grep -q distil_jax "/proc/$process/cmdline" 2> /dev/null || return 0
  kill -TERM "$process" || return 0
  for ((tries = 0; tries < 3000; tries++)); do # ten minutes
    kill -0 "$process" 2> /dev/null || return 0
    sleep 0.2
  done
  kill -KILL "$process"
}

run_and_log() { host_command launch/tpu.sh host-run 2>&1 | tee "$1"; }
stop() { host_command launch/tpu.sh host-stop; }
stop_hosts() { stop > /dev/null || echo "tpu.sh: could not stop every host." >&2; }

# gcloud returns only one exit status, so every host prints its own.
train() {
  local log connection=0 statuses status=4
  if [[ -n "$DRY_RUN" ]]; then host_command launch/tpu.sh host-run && return; fi
  log="$(mktemp)"
  supervise stop_hosts run_and_log "$log" || connection=$?
  mapfile -t statuses < <(grep -oE 'distil_jax: host [^ ]+ ended with status [0-9]+' "$log" | grep -oE '[0-9]+$')
  rm "$log"
  ((${#statuses[@]} == 0)) || status="$(combined_status "${statuses[@]}")"
  if ((status == 0 && connection)); then status=4; fi # a host was lost before it printed its status
  echo "tpu.sh: the hosts ended with status ${statuses[*]:-unknown}; combined $status." >&2
  return "$status"
}

list_committed() { run gcloud storage ls "$(run_in_bucket)/checkpoints/*/manifest.json"; }
newest_in_bucket() { { list_committed 2> /dev/null || true; } | newest_step; }

read_arguments "create setup run attempt babysit stop logs delete host-run host-stop" "$@"
[[ -n "$VERB" ]] || die "name a verb; see --help."
[[ "$VERB" =~ ^(create|attempt|babysit)$ ]] || ((${#REST[@]} == 0)) || die "nothing goes after -- with $VERB."
case "$VERB" in
  host-run | host-stop)
    [[ -z "$DRY_RUN" ]] || die "$VERB has no dry run: use that of ${VERB#host-}."
    "${VERB/-/_}"
    exit
    ;;
esac
need DISTIL_PROJECT DISTIL_ZONE DISTIL_NAME
need_name
if [[ ! "$VERB" =~ ^(stop|delete)$ ]]; then
  DISTIL_ACCELERATOR="${DISTIL_ACCELERATOR:-v5litepod-16}" DISTIL_RUNTIME="${DISTIL_RUNTIME:-v2-alpha-tpuv5-lite}"
  DISTIL_CAPACITY="${DISTIL_CAPACITY:-on-demand}" DISTIL_SLICES="${DISTIL_SLICES:-1}"
  need_match DISTIL_CAPACITY "on-demand|spot" "on-demand or spot"
  need_number DISTIL_SLICES 1
  read_babysit
fi
if [[ ! "$VERB" =~ ^(create|stop|delete)$ ]]; then
  read_google_run
fi

case "$VERB" in
  create | setup | stop) "$VERB" ;;
  run) train ;;
  attempt)
    create
    setup
    train
    ;;
  babysit)
    if [[ -n "$DRY_RUN" ]]; then
      list_committed
      exec "$0" attempt --dry-run -- "${REST[@]}"
    fi
    babysit newest_in_bucket terminate "$0" attempt -- "${REST[@]}"
    ;;
  logs)
    fetch_run
    on_hosts "tail --lines=100 distil_jax.log"
    ;;
  delete) cloud delete "$DISTIL_NAME" --force ;;
esac
