"""The licences of all locked packages, from their installed metadata, as reports/licences.md; `--check` compares instead of writing."""
import importlib.metadata, re, sys
from pathlib import Path

root = Path(__file__).resolve().parents[1]
TARGET, PINS = root/"reports/licences.md", root/"constraints.txt"
NOT_LOCKED = {"pip", "setuptools", "wheel", "yunmin-efficientdata"}  # tools of the environment, and this project
COPYLEFT = re.compile(r"\bA?GPL|LGPL|MPL|EPL|CDDL|EUPL|copyleft", re.I)
KNOWN = re.compile(r"MIT|BSD|Apache|ISC|PSF|Python Software|Zlib|Unlicense|CC0|0BSD|HPND|MPL|GPL|Public Domain|matplotlib", re.I)

def canonical(name: str) -> str: return re.sub(r"[-_.]+", "-", name).lower()

def pins(text: str) -> dict[str, str]: # canonical name -> version
    "The exact versions of constraints.txt."
    return {canonical(n): v for n, v in re.findall(r"^([\w.-]+)==(\S+)", text, re.M)}

def installed() -> dict[str, importlib.metadata.Distribution]:
    return {canonical(d.metadata["Name"]): d for d in importlib.metadata.distributions() if d.metadata["Name"]}

def licence(meta) -> str:
    "What a package says of itself: the SPDX expression, else classifiers, else the first line of a short text; else unknown."
    said = meta.get("License-Expression")
    classes = [c.rsplit("::", 1)[-1].strip() for c in meta.get_all("Classifier") or () if c.startswith("License ::") and not c.endswith("OSI Approved")]
    text = next((x.strip() for x in (meta.get("License") or "").splitlines() if x.strip(" =-")), "")
    plain = lambda s: re.sub(r"[|<>\r\n]", " ", s).strip()
    return plain(said or "; ".join(sorted(set(classes))) or (text[:80] if text not in ("UNKNOWN", "Dual License") else "")) or "unknown"

def flag(name: str) -> str:
    return "copyleft" if COPYLEFT.search(name) else "" if KNOWN.search(name) else "unknown: read its files"

def page(locked: dict[str, str], here: dict) -> str:
    "The list as Markdown, sorted; what needs a look stands first."
    rows = sorted((name, version, licence(here[name].metadata)) for name, version in locked.items() if name in here)
    odd = [r for r in rows if flag(r[2])]
    table = lambda found: "| package | version | licence | note |\n|---|---|---|---|\n" + "".join(f"| {n} | {v} | {x} | {flag(x)} |\n" for n, v, x in found)
    return ("# Licences of the packages that this project installs\n\nWritten by `scripts/licences.py` from the metadata of the versions in constraints.txt, which the packages' authors give; it is no legal advice. "
            f"None of them is part of this repository.\n\n## To look at: {len(odd)} of {len(rows)}\n\n{table(odd)}\n## All\n\n{table(rows)}")

def problems(locked: dict[str, str], here: dict) -> list[str]:
    "Packages that are installed but not locked, or in another version."
    out = [f"{n} {d.version} is installed but not in constraints.txt" for n, d in sorted(here.items()) if n not in locked and n not in NOT_LOCKED]
    return out + [f"{n} {here[n].version} is installed, constraints.txt says {v}" for n, v in sorted(locked.items()) if n in here and here[n].version.split("+")[0] != v]  # +cpu is another build of the same version

def main(argv) -> int:
    locked, here = pins(PINS.read_text()), installed()
    found, text = problems(locked, here), page(locked, here)
    if "--check" not in argv: TARGET.write_text(text, encoding="utf-8"); print(f"{TARGET.relative_to(root)}: {text.count(chr(10) + '| ')} rows")
    elif not TARGET.is_file() or TARGET.read_text(encoding="utf-8") != text: found.append("reports/licences.md is out of date: run scripts/licences.py")
    for line in found: print(f"error: {line}", file=sys.stderr)
    if not found: print(f"{len(here)} installed packages are the locked ones")
    return int(bool(found))

if __name__ == "__main__": sys.exit(main(sys.argv[1:]))
