#!/usr/bin/env bash
# Makes the environments of the peers that `yunmin bench` compares with, one each in .bench/<peer>/ (or below YUNMIN_BENCH),
# from the exact versions in scripts/bench/<peer>.txt. A peer that does not install leaves its reason in .bench/<peer>.failed,
# and the benchmark lists it as not run. Environments that are ready are left alone; needs pip only.
#   scripts/setup_bench.sh                       all peers
#   scripts/setup_bench.sh datasketch rensa      these
# Peers of `yunmin bench dedup`: datasketch rensa datatrove text-dedup; of `yunmin bench loader`: mosaicml-streaming litdata lance;
# of `yunmin bench merge`: mergekit, which fits the project's own torch and transformers and reads them from .venv, so that no second gigabyte is needed.
# ray, for tests/test_ray.py, runs our own code and so stands on .venv too; jsonschema's optional rfc3987_syntax, which Jupyter brings there, is hidden from it:
# it compiles a grammar at import, two thirds of what each of Ray's processes needs to start, and they have seconds to answer.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
folder=${YUNMIN_BENCH:-.bench}
declare -A wants=([datasketch]="datasketch xxhash orjson" [rensa]="rensa numpy orjson" [datatrove]="datatrove[processing,io]" [text-dedup]="text-dedup"
  [mosaicml-streaming]="mosaicml-streaming torch" [litdata]="litdata torch" [lance]="pylance numpy pyarrow" [mergekit]="mergekit" [ray]="ray[client]")
shares=" mergekit ray "   # these see the packages of .venv, after their own, and the project
order=(datasketch rensa datatrove text-dedup mosaicml-streaming litdata lance mergekit ray)
[ $# -gt 0 ] && order=("$@")
mkdir -p "$folder"
exec 9> "$folder/.lock"
command -v flock >/dev/null && flock 9

for peer in "${order[@]}"; do
  pins=scripts/bench/$peer.txt env=$folder/$peer failed=$folder/$peer.failed
  if [ -z "${wants[$peer]:-}" ]; then echo "error: unknown peer $peer; choose from ${!wants[*]}" >&2; exit 2; fi
  want=$({ cat "$pins"; echo "${wants[$peer]}"; } | sha256sum | cut -d' ' -f1)
  if [ -f "$env/.complete" ] && [ "$(cat "$env/.complete")" = "$want" ]; then echo "$peer: ready"; continue; fi
  echo "$peer: installing ..."
  rm -rf "$env" "$failed"
  read -ra packages <<< "${wants[$peer]}"
  shared= creator=$python
  if [[ $shares == *" $peer "* ]]; then
    if [ ! -f .venv/.complete ]; then echo "reads torch from .venv: run scripts/setup_env.sh first" | tee "$failed"; continue; fi
    shared=$(.venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') creator=.venv/bin/python
  fi
  if log=$({ "$creator" -m venv "$env" && { [ -z "$shared" ] || printf '%s\n' "$shared" "$PWD" > "$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zz_shared.pth"; } &&
             { [ "$peer" != ray ] || echo 'import sys; sys.modules.setdefault("rfc3987_syntax", None)' > "$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/zy_quick.pth"; } &&
             "$env/bin/python" -m pip --disable-pip-version-check install -q -c "$pins" "${packages[@]}"; } 2>&1); then
    echo "$want" > "$env/.complete"
    echo "$peer: ready"
  else
    { grep -E 'ERROR|[Ee]rror' <<< "$log" || true; echo "$log"; } | head -1 > "$failed"
    echo "$peer: NOT installed: $(cat "$failed")"
  fi
done
