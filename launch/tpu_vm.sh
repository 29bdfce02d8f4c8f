#!/usr/bin/env bash
# A TPU slice on Google Cloud: one process a worker, the same command on all of them.
#
#   export TPU_NAME=mine ZONE=us-central2-b
#   ACCELERATOR_TYPE=v4-32 VERSION=tpu-ubuntu2204-base launch/tpu_vm.sh create
#   launch/tpu_vm.sh setup                                      copies this clone, installs it
#   launch/tpu_vm.sh run --config=configs/NAME.py:SIZE --workdir=/mnt/shared/run --config.seed=1
#   launch/tpu_vm.sh delete
#
# PROJECT is optional; SPOT=1 asks for a slice that may be taken away (start `run` again: it goes on).
# DRY_RUN=1 prints the commands and runs nothing.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}
need() { # NAME...: variables that must be set
  local name
  for name in "$@"; do
    [[ -n "${!name:-}" ]] || fail "$name is not set; see the head of launch/tpu_vm.sh"
  done
}
do_it() { # COMMAND...: runs it, or prints it so that a shell would read the same words
  if [[ -n "${DRY_RUN:-}" ]]; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}
on_all() { # COMMAND-TEXT: runs it on every worker
  do_it gcloud compute tpus tpu-vm ssh "$TPU_NAME" "${place[@]}" --worker=all --command="$1"
}

[[ $# -gt 0 ]] || fail "give one of create, setup, run, delete; see the head of launch/tpu_vm.sh"
action=$1
shift
case "$action" in
  create | setup | run | delete) ;;
  *) fail "$action is unknown; use create, setup, run or delete" ;;
esac
need TPU_NAME ZONE
place=(--zone="$ZONE")
[[ -z "${PROJECT:-}" ]] || place+=(--project="$PROJECT")
[[ "$action" == run || $# -eq 0 ]] || fail "$action takes no further words: $1"
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case "$action" in
  create)
    need ACCELERATOR_TYPE VERSION
    more=(--accelerator-type="$ACCELERATOR_TYPE" --version="$VERSION")
    [[ -z "${SPOT:-}" ]] || more+=(--spot)
    do_it gcloud compute tpus tpu-vm create "$TPU_NAME" "${place[@]}" "${more[@]}"
    ;;
  setup)
    archive=$(mktemp -d)/jaxrepro.tar.gz
    trap 'rm -rf "$(dirname "$archive")"' EXIT
    do_it git -C "$root" archive --format=tar.gz --output="$archive" HEAD
    do_it gcloud compute tpus tpu-vm scp "$archive" "$TPU_NAME:jaxrepro.tar.gz" "${place[@]}" \
      --worker=all
    # the image's own Python may be older than 3.11; uv brings one
    on_all "mkdir -p jaxrepro && tar -xzf jaxrepro.tar.gz -C jaxrepro && cd jaxrepro && \
python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python 3.11 venv && \
python3 -m uv pip install --quiet --python venv/bin/python '.[tpu]'"
    ;;
  run)
    [[ " $*" == *" --config="* ]] || fail "run needs --config=configs/NAME.py[:SIZE]"
    [[ " $*" == *" --workdir="* ]] || fail "run needs --workdir=FOLDER on a disk that all workers share"
    on_all "cd jaxrepro && exec venv/bin/python -m jaxrepro.launch --distributed=auto$(printf ' %q' "$@")"
    ;;
  delete)
    do_it gcloud compute tpus tpu-vm delete "$TPU_NAME" "${place[@]}" --quiet
    ;;
esac
