#!/usr/bin/env bash
# Hippocampus in MRI, from the data folder to the table: trains one fold, segments it, scores the written files.
#
#   scripts/bench_hippocampus.sh FOLDER RUN [--section.key value ...]
#
# Two CPU cores: --model.preset mom3d_xs --training.max_minutes 30. A GPU: no further options (the whole recipe).
set -euo pipefail
if [ $# -lt 2 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0"
    exit 2
fi
folder=$1 run=$2
shift 2
medmom=$(dirname "$0")/../.venv/bin/medmom
[ -x "$medmom" ] || medmom=medmom
"$medmom" train hippocampus --data.folder "$folder" --out "$run" "$@"
"$medmom" predict "$run" --fold validation --out "$run/validation"
"$medmom" evaluate "$run/validation"
"$medmom" report "$run" --out "$run/report.html"
