#!/usr/bin/env bash
# Trains on a Cloud TPU pod slice, which is asked for as a queued resource; JAX finds the hosts by
# itself. A slice that is preempted is asked for again, and the training resumes.
#   launch/tpu_pod.sh [--dry-run] NAME ZONE TYPE gs://BUCKET/CODE -- CONFIG.py --run DIR [...]
# CODE holds the wheel and the config:
#   pip wheel --no-deps -w dist . && gcloud storage cp dist/*.whl configs/paper_axialnet.py gs://b/code/
#   SETUP='sudo mkdir -p /mnt/runs && sudo mount 10.0.0.2:/share /mnt/runs' \
#   launch/tpu_pod.sh paper europe-west4-b v5litepod-64 gs://b/code -- \
#     paper_axialnet.py --run /mnt/runs/paper --data.path /mnt/runs/store --batch-size 64
# SETUP is run on every host first, to mount what all share: the run's folder and the data (Filestore
# or gcsfuse). SPOT=1, RUNTIME=v2-alpha-tpuv5-lite and KEEP=1 (the slice stays at the end, which
# costs) may be set. --dry-run prints what would be sent.
set -euo pipefail
send() { "$@"; }
if [[ ${1:-} == --dry-run ]]; then
  send() { printf '%q ' "$@" && echo; }
  dry=1 && shift
fi
if [[ $# -lt 6 || $5 != -- ]]; then
  sed -n '2,14s/^# \{0,1\}//p' "$0" >&2
  exit 2
fi
name=$1 zone=$2 type=$3 code=${4%/}
shift 5
run=
for ((i = 1; i <= $#; i++)); do
  if [[ ${!i} == --run ]]; then j=$((i + 1)) && run=${!j}; fi
  if [[ ${!i} == --run=* ]]; then run=${!i#--run=}; fi
done
spot=()
[[ -n ${SPOT:-} ]] && spot=(--spot)

create() {
  send gcloud compute tpus queued-resources create "$name" --node-id "$name" --zone "$zone" \
    --accelerator-type "$type" --runtime-version "${RUNTIME:-v2-alpha-tpuv5-lite}" "${spot[@]}"
}
delete() {
  send gcloud compute tpus queued-resources delete "$name" --zone "$zone" --force --quiet
}
state() {
  gcloud compute tpus queued-resources describe "$name" --zone "$zone" \
    --format='value(state.state)' 2>/dev/null || echo none
}
# Waits for the slice, perhaps for hours; asks for it again where the request came to nothing.
get_slice() {
  local tries=0 now
  while now=$(state); [[ $now != ACTIVE ]]; do
    case $now in
      none | SUSPENDED | FAILED)
        if ((tries++ == 5)); then
          echo "tpu_pod.sh: five requests came to nothing, the last one is $now" >&2
          exit 1
        fi
        [[ $now == none ]] || delete
        create || true # another try after a while
        ;;
    esac
    sleep 60
  done
}

# The images' Python is older than 3.11.
train="
  set -e
  rm -rf ~/hirescam && mkdir ~/hirescam && cd ~/hirescam
  gcloud storage cp -r $(printf '%q' "$code")/'*' .
  python3 -m pip install -q --user uv
  python3 -m uv venv -q -p 3.12 env
  python3 -m uv pip install -q -p env 'jax[tpu]' ./*.whl
  ${SETUP:-}
  resume=; [ -e $(printf '%q' "$run")/run.json ] && resume=--resume
  env/bin/hirescam train $(printf '%q ' "$@") \$resume --start-timeout 1800"
run_on_all() {
  send gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "$train"
}

[[ -n ${KEEP:-} ]] || trap delete EXIT
if [[ -n ${dry:-} ]]; then
  create
  run_on_all
  exit
fi
while true; do
  get_slice
  status=0
  run_on_all || status=$?
  [[ $status == 0 ]] && break
  sleep 60 # until a preemption can be seen
  if [[ $(state) == ACTIVE ]]; then
    echo "tpu_pod.sh: the training ended with $status" >&2
    exit "$status"
  fi
done
