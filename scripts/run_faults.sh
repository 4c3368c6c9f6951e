#!/usr/bin/env bash
# Inject every fault of tests/faults.py and write what came of them to reports/faults.md.
#   scripts/run_faults.sh                                         all of it, killed at every point of every phase: hours on two cores
#   scripts/run_faults.sh chain,ledgers --phases dedup,format     some of it; other rows of an earlier run are kept
#   scripts/run_faults.sh chain --phases dem --most 60            about 60 kills, of every kind there is in every stage
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup_env.sh
found="${YUNMIN_FAULTS:-reports/faults.json}" new="$(mktemp)"
trap 'rm -f "$new"' EXIT
if [ $# -eq 0 ]; then set -- verbs,chain,ledgers,machine,s3; fi
.venv/bin/python tests/faults.py "$@" --out "$new"
.venv/bin/python tests/faults.py table --found "$found" --out "$new"
