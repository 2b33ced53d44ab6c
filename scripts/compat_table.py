"""The table of docs/compatibility.md from what scripts/test_compat.sh found: FOLDER/VERSION.xml, .json, .names, .api.

python scripts/compat_table.py FOLDER PAGE
"""

import json
import sys
import xml.etree.ElementTree as xml
from pathlib import Path

from packaging.version import Version

COLUMNS = {
    "registered": ["test_registered"],
    "estimator at its call site": ["test_the_estimator_at_its_call_site"],
    "loss at its call site": ["test_the_loss_at_its_call_site"],
    "a typo is refused": [
        "test_a_typo_is_refused_when_the_job_is_composed[krpo]",
        "test_a_typo_is_refused_when_the_job_is_composed[kpo]",
        "test_a_typo_is_refused_before_ray",
    ],
}
NAMES = {"0": "all there", "2": "of krpo and kpo", "1": "**no**"}  # the exit status of check_verl_api.py
BEGIN, END = "<!-- written by scripts/test_compat.sh -->", "<!-- end -->"


def trainers(report: str) -> str:
    """What check_verl_api.py says of verl's entry points: those that start, and those that refuse to."""
    head = next(line for line in report.splitlines() if line.startswith("krpo and kpo are taken up by"))
    names = [name for name in ("V1 trainer", "legacy trainer", "the trainer") if name in head]
    words = [f"{name}: refuses" if f"{name} refuses to start" in report else name for name in names]
    return ", ".join(words).replace("the trainer", "legacy trainer").replace(" trainer", "")


def row(folder: Path, version: str) -> str:
    cases = {case.get("name"): len(case) == 0 for case in xml.parse(folder / f"{version}.xml").iter("testcase")}
    marks = ["yes" if all(cases.get(name, False) for name in names) else "**no**" for names in COLUMNS.values()]
    report = json.loads((folder / f"{version}.json").read_text())
    entry = next(f["status"] for f in report["findings"] if f["check"] == "entry point")
    loaded = "entry point" if Version(version) >= Version("0.9.0") and entry == "ok" else "`VERL_USE_EXTERNAL_MODULES`"
    doctor = "in force" if report["exit_status"] == 0 else f"exit status {report['exit_status']}"
    names = NAMES[(folder / f"{version}.names").read_text().strip()]
    starts = trainers((folder / f"{version}.api").read_text())
    return f"| {version} | {loaded} | {names} | {starts} | {' | '.join(marks)} | {doctor} |"


def main() -> None:
    folder, page = Path(sys.argv[1]), Path(sys.argv[2])
    versions = sorted((path.stem for path in folder.glob("*.xml")), key=Version, reverse=True)
    found = {f["check"]: f["text"] for f in json.loads((folder / f"{versions[0]}.json").read_text())["findings"]}
    tested = ", ".join(f"{name} {found[name].split(' ')[0]}" for name in ("python", "torch", "ray", "transformers"))
    head = ["verl", "loaded by", "names it rests on", "trainers", *COLUMNS, "`verl-krpo doctor`"]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    lines += [row(folder, version) for version in versions] + ["", f"With {tested}, without a GPU."]
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}{after}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
