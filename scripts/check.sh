#!/usr/bin/env bash
# Format, lint, types, tests: what a change must pass before review. `--fast` leaves the tests out.
set -euo pipefail
cd "$(dirname "$0")/.."
bin=.venv/bin
"$bin/ruff" format --check .
"$bin/ruff" check .
"$bin/mypy"
if [ "${1:-}" != "--fast" ]; then
    "$bin/python" -m pytest -q -n 2 -m "not slow and not peers and not gpu"
fi
