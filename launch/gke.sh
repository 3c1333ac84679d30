#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster, as an XPK workload, which is a JobSet. XPK adds this checkout to an image, and
# every pod makes its environment when it starts.
#
#   launch/gke.sh VERB [--dry-run] [-- MORE FLAGS OF xpk workload create]
#
#   create    submits the workload
#   logs      copies the run folder, without its checkpoints, to runs/, and prints the output of the pods (kubectl must
#             use the cluster: gcloud container clusters get-credentials DISTIL_CLUSTER)
#   delete    deletes the workload; cluster and bucket stay
#
# When a pod ends with 75, 4, 1 or a signal (137, 143), the whole workload restarts, at most DISTIL_RETRIES times in
# all, so set it high for spot machines. 2 and 3 end the workload.
#
#   DISTIL_PROJECT, DISTIL_ZONE, DISTIL_CLUSTER    where to run (required)
#   DISTIL_NAME           name of the workload (required)
#   DISTIL_BUCKET         a Cloud Storage bucket with hierarchical namespace, attached to the cluster as an XPK storage
#                         of the same name at /mnt/DISTIL_BUCKET; see README.md (required, except for delete)
#   DISTIL_ACCELERATOR    type and size of a slice (v5litepod-16)
#   DISTIL_SLICES         number of slices (1)
#   DISTIL_IMAGE          the image to add this checkout to, with Python 3.11 or newer (python:3.12)
#   DISTIL_RETRIES        restarts in total (5)
#   DISTIL_CONFIG, DISTIL_OUTPUT, DISTIL_DATA, DISTIL_TEACHER, DISTIL_SET, DISTIL_EXTRA, DISTIL_LOCAL: see train.sh.
#                         Paths are those in the pods: DISTIL_OUTPUT is in /mnt/DISTIL_BUCKET. The default of
#                         DISTIL_EXTRA is tpu, and that of DISTIL_LOCAL is /var/tmp/distil_jax.
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
    # XPK sends SIGTERM to the subshell in which it runs the command, so exec replaces that by train.sh.
    # Kubernetes expands $(NAME) in a command, unless it is written as $$(NAME).
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
