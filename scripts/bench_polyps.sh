#!/usr/bin/env bash
# Polyps in colonoscopy pictures, from the data folder to the tables: trains one fold, segments it, scores the written
# masks; once more with logits averaged over mirror images.
#
#   scripts/bench_polyps.sh FOLDER RUN [--section.key value ...]
#
# FOLDER is Kvasir-SEG with a cases.csv whose column near_duplicate_group keeps frames of one scene in one fold.
# Two CPU cores: --model.preset mom2d_xs --data.patch [160,160] --preparation.size [160,160] --training.max_minutes 38.
# A GPU: no further options (the whole recipe), with and without momentum (--model.gate 0) and for --training.seed 0, 1, 2.
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,9s/^# \{0,1\}//p' "$0"
    exit 2
fi
folder=$1 run=$2
shift 2
medmom=$(dirname "$0")/../.venv/bin/medmom
[ -x "$medmom" ] || medmom=medmom
"$medmom" train polyps --data.folder "$folder" --data.group near_duplicate_group --out "$run" "$@"
"$medmom" predict "$run" --fold validation --out "$run/validation"
"$medmom" evaluate "$run/validation"
"$medmom" predict "$run" --fold validation --out "$run/mirrored" --tta
"$medmom" evaluate "$run/mirrored"
"$medmom" report "$run" --out "$run/report.html"
