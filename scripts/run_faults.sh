#!/usr/bin/env bash
# Inject every fault of tests/faults.py and write what came of them to reports/faults.md.
#   scripts/run_faults.sh                 all of it: about an hour on two quiet cores
#   scripts/run_faults.sh chain,ledgers --phases dedup,format     some of it; rows of an earlier run are kept
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup_env.sh
found="${YUNMIN_FAULTS:-reports/faults.json}" new="$(mktemp)"
trap 'rm -f "$new"' EXIT
if [ $# -eq 0 ]; then set -- verbs,chain,ledgers,machine,s3; fi
.venv/bin/python tests/faults.py "$@" --out "$new"
.venv/bin/python tests/faults.py table --found "$found" --out "$new"
