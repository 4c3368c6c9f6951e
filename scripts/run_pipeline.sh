#!/usr/bin/env bash
# The whole pipeline: makes .venv when it is missing, then `yunmin run` with the given arguments.
#   scripts/run_pipeline.sh                                   the sample corpus, in ./workspace
#   scripts/run_pipeline.sh WS [--raw DIR|s3://...] [...]     your data; see `yunmin run --help`
set -euo pipefail
here=$(cd "$(dirname "$0")/.." && pwd)
"$here/scripts/setup_env.sh"
yunmin=$here/.venv/bin/yunmin
if [ $# -eq 0 ]; then
  cd "$here"
  set -- workspace
  [ -e workspace/truth/duplicates.csv ] || "$yunmin" sample workspace   # written last
fi
exec "$yunmin" run "$@"
