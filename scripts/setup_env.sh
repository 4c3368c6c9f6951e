#!/usr/bin/env bash
# Makes .venv beside the checkout, once. A marker written last holds the digest of what was installed, so that an
# interrupted or outdated set-up is noticed and redone.
#   scripts/setup_env.sh            install what is missing
#   PYTHON=python3.12 scripts/...   choose the interpreter (3.11 or later)
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
marker=.venv/.complete
want=$(cat settings.ini setup.py constraints.txt scripts/setup_env.sh | sha256sum | cut -d' ' -f1)
[ -f "$marker" ] && [ "$(cat "$marker")" = "$want" ] && exit 0

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $("$python" --version 2>&1) found; YunMin-EfficientData needs Python 3.11 or later (set PYTHON=python3.12)" >&2; exit 2; }
exec 9> .setup.lock   # two set-ups at once would corrupt each other
command -v flock >/dev/null && flock 9
[ -f "$marker" ] && [ "$(cat "$marker")" = "$want" ] && exit 0

echo "setting up .venv (first time: some minutes, about 3 GB)"
if [ -f "$marker" ]; then rm -f "$marker"; else rm -rf .venv; fi
[ -x .venv/bin/python ] || "$python" -m venv .venv
pip=(.venv/bin/python -m pip --disable-pip-version-check install -qq)
# torch first and exactly: left to the resolver it may bring another build.
"${pip[@]}" "torch==$(sed -n 's/^torch==//p' constraints.txt)" -c constraints.txt
"${pip[@]}" -c constraints.txt -e '.[dev]'
.venv/bin/python -m pip check
.venv/bin/python -m compileall -q yunmin_efficientdata >/dev/null || true
echo "$want" > "$marker"
echo "✅ .venv is ready"
