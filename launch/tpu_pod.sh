#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice, which is asked for as a queued resource, and starts the training
# on all its hosts; there JAX finds the others by itself. Run it again after a preemption.
#   launch/tpu_pod.sh [--dry-run] NAME ZONE TYPE gs://BUCKET/CODE -- CONFIG.py --run gs-mounted/run
#   launch/tpu_pod.sh --dry-run paper europe-west4-b v5litepod-64 gs://b/hirescam.whl -- \
#     configs/paper_axialnet.py --run /mnt/runs/paper
# --dry-run prints what it would send. The run's folder must be one that all hosts share (Filestore,
# or a bucket mounted with gcsfuse). RUNTIME=v2-alpha-tpuv5-lite and SPOT=1 may be set.
set -euo pipefail
send() { "$@"; }
if [[ ${1:-} == --dry-run ]]; then
  send() { printf '%q ' "$@" && echo; }
  dry=1 && shift
fi
if [[ $# -lt 6 || $5 != -- ]]; then
  sed -n '2,9s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3 code=$4
shift 5
run=
for ((i = 1; i <= $#; i++)); do
  if [[ ${!i} == --run ]]; then j=$((i + 1)) && run=${!j}; fi
done
spot=()
[[ -n ${SPOT:-} ]] && spot=(--spot)

if [[ -n ${dry:-} ]] || ! gcloud compute tpus queued-resources describe "$name" --zone "$zone" \
  --quiet >/dev/null 2>&1; then
  send gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
    --accelerator-type "$type" --runtime-version "${RUNTIME:-v2-alpha-tpuv5-lite}" "${spot[@]}"
fi
# Queued until the slice is there, which may take hours.
if [[ -z ${dry:-} ]]; then
  until gcloud compute tpus queued-resources describe "$name" --zone "$zone" \
    --format='value(state.state)' | grep -q ACTIVE; do
    sleep 60
  done
fi
wheel=$(basename "$code")
arguments=$(printf '%q ' "$@")
send gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
  set -e
  gcloud storage cp $(printf '%q' "$code") .
  pip install -q -U 'jax[tpu]' ./$wheel
  resume=; [ -e $(printf '%q' "$run")/run.json ] && resume=--resume
  ~/.local/bin/hirescam train $arguments \$resume"
send gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet
