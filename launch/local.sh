#!/usr/bin/env bash
# Trains on all GPUs (or the CPU) of this machine; everything behind the script's name goes to
# `hirescam train`. Run again after an interruption, it resumes.
#   launch/local.sh configs/phantom_axialnet.py --run runs/phantom
set -euo pipefail
run=
for ((i = 1; i <= $#; i++)); do
  if [[ ${!i} == --run ]]; then j=$((i + 1)) && run=${!j}; fi
  if [[ ${!i} == --run=* ]]; then run=${!i#--run=}; fi
done
resume=()
[[ -n $run && -e $run/run.json ]] && resume=(--resume)
exec hirescam train "$@" "${resume[@]}"
