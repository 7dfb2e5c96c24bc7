#!/usr/bin/env bash
# The papers' experiments one after the other on this machine, then their tables.
#
#   launch/paper.sh OUT [--only PATTERN] [OPTIONS OF hirescam train ...]
#
#   launch/paper.sh runs --data.path /data/prepared        # torchvision's resnet18-f37072fd.pth
#                                                          # lies in the working folder
#   launch/paper.sh runs --only 'table1_*' --reduced       # each a minute on two cores
#
# Repeat the command to continue: a finished run is not trained again, but one that was made with
# other options (--reduced, say) is refused, so that all runs of a table are made alike. On a
# cluster send each configs/paper/*.py by itself (slurm.sbatch) and end with `hirescam table`.
set -euo pipefail
[[ $# -ge 1 && $1 != -* ]] || { sed -n '2,13s/^# \{0,1\}//p' "$0" >&2; exit 2; }

out=$1 only='*'
shift
if [[ ${1:-} == --only ]]; then
  only=${2:?--only needs a pattern}
  shift 2
fi

configs="$(dirname "$0")/../configs/paper"
runs=()
for config in "$configs"/$only.py; do
  [[ -f $config ]] || { echo "launch/paper.sh: no experiment is called '$only'" >&2; exit 2; }
  run="$out/$(basename "$config" .py)"
  runs+=("$run")
  if [[ -f $run/evaluation.json ]]; then
    hirescam train "$config" --run "$run" "$@" --check
    continue
  fi
  echo "== $run"
  resume=()
  [[ -f $run/run.json ]] && resume=(--resume)
  hirescam train "$config" --run "$run" "${resume[@]}" "$@"
  hirescam evaluate "$run"
done
hirescam table "${runs[@]}" --out "$out/tables"
