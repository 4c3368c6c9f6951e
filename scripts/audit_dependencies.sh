#!/usr/bin/env bash
# Are the installed packages the ones that were tested together, are there known faults in them, and what are their licences.
#   scripts/audit_dependencies.sh              what works without a network; faults too when an advisory database answers
#   scripts/audit_dependencies.sh --online     fails when the advisories cannot be asked
#   scripts/audit_dependencies.sh --offline    opens no connection and installs nothing: what the tests run
# Offline: every installed package is pinned in constraints.txt in the version that is installed, `pip check`, reports/licences.md is up to date.
# Online: pip-audit (in .bench/pip-audit) against the advisories of PyPI. Without them this script says so: it keeps no list of its own, which would be out of date from the first day.
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in ""|--online|--offline) ;; *) echo "error: unknown option $1; there are --online and --offline" >&2; exit 2 ;; esac
python=${PYTHON:-.venv/bin/python}
"$python" scripts/licences.py --check
"$python" -m pip --disable-pip-version-check check
[ "${1:-}" != "--offline" ] || { echo "advisories: not asked (--offline)"; exit 0; }

audit=.bench/pip-audit
asked="advisories: NOT asked"
if [ ! -x "$audit/bin/pip-audit" ]; then
  "${PYTHON3:-python3}" -m venv "$audit" && timeout 120 "$audit/bin/python" -m pip --disable-pip-version-check install -q pip-audit 2>/dev/null || { rm -rf "$audit"; asked="$asked: pip-audit cannot be installed here"; }
fi
if [ -x "$audit/bin/pip-audit" ]; then
  found=0
  answer=$(timeout 180 "$audit/bin/pip-audit" --no-deps --disable-pip --progress-spinner off -r constraints.txt 2>&1) || found=$?
  if grep -qE 'No known vulnerabilities|Found [0-9]+ known' <<< "$answer"; then
    echo "$answer"
    [ "$found" -eq 0 ] || { echo "error: known faults in the locked packages; raise their versions in constraints.txt, or say in the commit why they do not matter" >&2; exit 1; }
    exit 0
  fi
  asked="$asked: no advisory database answered ($(tail -1 <<< "$answer" | cut -c1-200))"
fi
echo "$asked. Known faults were not looked for; run this again where https://pypi.org or https://api.osv.dev can be reached."
[ "${1:-}" != "--online" ]
