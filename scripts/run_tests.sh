#!/usr/bin/env bash
# Everything that must hold before a change lands: exported package in step with the notebooks, notebook tests, pytest.
#   scripts/run_tests.sh             all of it
#   scripts/run_tests.sh tests/test_store.py -k s3     only these pytest arguments
# Tests on real text read the folder named by YUNMIN_CORPUS and say so when they skip.
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/setup_env.sh
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONWARNINGS=ignore::DeprecationWarning
if [ $# -gt 0 ]; then exec python -m pytest -q "$@"; fi

say() { printf '\n== %s (%ss)\n' "$1" "$SECONDS"; }
say "exported package equals the notebooks"
python scripts/check_export.py
say "notebook tests"
nbdev_test --n_workers 2 --timing
say "pytest"
# two processes, a file each at a time, in this order: the longest file begins
python -m pytest -q --durations=15 -n "${YUNMIN_TEST_PROCESSES:-2}" --dist loadfile --no-loadscope-reorder tests/test_pipeline.py $(ls tests/test_*.py | grep -v test_pipeline.py)
say "done"
