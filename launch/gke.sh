#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as an XPK workload (a JobSet underneath). XPK adds this checkout to an image,
# and every pod makes its environment when it starts.
#
#   launch/gke.sh VERB [--dry-run] [-- MORE FLAGS OF xpk workload create]
#
#   create    submits the workload
#   logs      fetches the run folder, without its checkpoints, into runs/; and what the pods have printed (kubectl must
#             point at the cluster: gcloud container clusters get-credentials DISTIL_CLUSTER)
#   delete    deletes the workload; cluster and bucket stay
#
# When a pod ends with 75, 4, 1 or a signal (137, 143), the whole workload starts again, at most DISTIL_RETRIES times,
# whether or not there is a newer checkpoint: for spot machines set it high. 2 and 3 end the workload.
#
#   DISTIL_PROJECT, DISTIL_ZONE, DISTIL_CLUSTER    where (needed)
#   DISTIL_NAME           what to call the workload (needed)
#   DISTIL_BUCKET         a Cloud Storage bucket with hierarchical namespace, attached to the cluster as an XPK storage
#                         of the same name at /mnt/DISTIL_BUCKET; see README.md (needed, but not to delete)
#   DISTIL_ACCELERATOR    type and size of a slice (v5litepod-16)
#   DISTIL_SLICES         how many slices (1)
#   DISTIL_IMAGE          the image to add this checkout to; it has Python 3.11 or newer (python:3.12)
#   DISTIL_RETRIES        how many new starts in all (5)
#   DISTIL_CONFIG, DISTIL_OUTPUT, DISTIL_DATA, DISTIL_TEACHER, DISTIL_SET, DISTIL_EXTRA, DISTIL_LOCAL: see train.sh.
#                         Paths are those of the pods: DISTIL_OUTPUT is in /mnt/DISTIL_BUCKET. DISTIL_EXTRA is tpu and
#                         DISTIL_LOCAL is /var/tmp/distil_jax unless they are set.
set -euo pipefail
# shellcheck source=launch/contract.sh
source "$(dirname "${BASH_SOURCE[0]}")/contract.sh"

read_arguments "create logs delete" "$@"
[[ -n "$VERB" ]] || die "name a verb; see --help."
[[ "$VERB" == create ]] || ((${#REST[@]} == 0)) || die "nothing goes after -- with $VERB."
need DISTIL_PROJECT DISTIL_ZONE DISTIL_CLUSTER DISTIL_NAME
need_name
where=("--cluster=$DISTIL_CLUSTER" "--workload=$DISTIL_NAME" "--project=$DISTIL_PROJECT" "--zone=$DISTIL_ZONE")
[[ "$VERB" == delete ]] || read_google_run

case "$VERB" in
  create)
    DISTIL_ACCELERATOR="${DISTIL_ACCELERATOR:-v5litepod-16}" DISTIL_SLICES="${DISTIL_SLICES:-1}"
    DISTIL_IMAGE="${DISTIL_IMAGE:-python:3.12}" DISTIL_RETRIES="${DISTIL_RETRIES:-5}"
    need_number DISTIL_SLICES 1
    need_number DISTIL_RETRIES 0
    # XPK's shell starts the command in a subshell and passes SIGTERM on to that: exec puts train.sh in its place.
    # Kubernetes reads $(NAME) in a command; $$( stands for the two characters themselves.
    command="exec $(with_variables -- launch/train.sh)"
    command="${command//\$(/\$\$(}"
    pack_checkout
    run rm -rf "$ROOT/build/gke"
    run mkdir "$ROOT/build/gke"
    run tar -xzf "$ROOT/build/distil_jax.tar.gz" -C "$ROOT/build/gke"
    run xpk workload create "${where[@]}" "--tpu-type=$DISTIL_ACCELERATOR" "--num-slices=$DISTIL_SLICES" \
      "--base-docker-image=$DISTIL_IMAGE" "--script-dir=$ROOT/build/gke" "--storage=$DISTIL_BUCKET" \
      "--max-restarts=$DISTIL_RETRIES" --restart-on-exit-codes=1,4,75 --termination-grace-period-seconds=300 \
      "--command=$command" "${REST[@]}"
    ;;
  logs)
    fetch_run
    run kubectl logs "--selector=xpk.google.com/workload=$DISTIL_NAME" --prefix --tail=-1
    ;;
  delete) run xpk workload delete "${where[@]}" --force ;;
esac
