#!/usr/bin/env bash
# A workload on a GKE cluster, through xpk (pip install xpk): one process a machine.
#
#   export CLUSTER=mine PROJECT=my-project ZONE=us-central2-b IMAGE=REGISTRY/jaxrepro:TAG
#   WORKLOAD=a TPU_TYPE=v5litepod-16 NUM_SLICES=1 launch/gke_xpk.sh --config=configs/NAME.py:SIZE --workdir=/shared/a
#   WORKLOAD=a DEVICE_TYPE=h100-mega-80gb-8 NUM_NODES=2 launch/gke_xpk.sh --config=... --workdir=/shared/a
#
# IMAGE is built from launch/Dockerfile (for TPUs with --build-arg EXTRA=tpu). --workdir must lie on
# storage that all pods mount (`xpk storage`). MAX_RESTARTS (default 3) restarts after preemption.
# DRY_RUN=1 prints the command and runs nothing.
set -euo pipefail

fail() {
  echo "error: $1" >&2
  exit 2
}
number() { # NAME: the variable is a whole number from 1 on, or unset
  [[ -z "${!1:-}" || "${!1}" =~ ^[1-9][0-9]*$ ]] || fail "$1=${!1} is not a number from 1 on"
}

for name in CLUSTER PROJECT ZONE WORKLOAD IMAGE; do
  [[ -n "${!name:-}" ]] || fail "$name is not set; see the head of launch/gke_xpk.sh"
done
if [[ -n "${TPU_TYPE:-}" && -z "${DEVICE_TYPE:-}" ]]; then
  number NUM_SLICES
  kind=(--tpu-type="$TPU_TYPE" --num-slices="${NUM_SLICES:-1}")
elif [[ -n "${DEVICE_TYPE:-}" && -z "${TPU_TYPE:-}" ]]; then
  number NUM_NODES
  kind=(--device-type="$DEVICE_TYPE" --num-nodes="${NUM_NODES:-1}")
else
  fail "set either TPU_TYPE or DEVICE_TYPE (of a machine with GPUs)"
fi
number MAX_RESTARTS
[[ " $*" == *" --config="* ]] || fail "--config=configs/NAME.py[:SIZE] is missing"
[[ " $*" == *" --workdir="* ]] || fail "--workdir=FOLDER is missing; it must be on storage that all pods mount"
words=""
for word in "$@"; do
  # xpk puts the command between double quotes of a YAML file, which a shell in the pod then reads.
  case "$word" in
    *[\"\\\$\`\']* | *$'\n'*) fail "$word has a quote, backslash, \$ or line end, which xpk cannot pass on; write it into the config" ;;
  esac
  words+=" '$word'"
done
command=(
  xpk workload create --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE"
  --workload="$WORKLOAD" --docker-image="$IMAGE" "${kind[@]}" --max-restarts="${MAX_RESTARTS:-3}"
  --command="python -m jaxrepro.launch --distributed=auto$words"
)
if [[ -n "${DRY_RUN:-}" ]]; then
  printf '%q ' "${command[@]}"
  echo
else
  exec "${command[@]}"
fi
