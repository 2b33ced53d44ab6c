"""The table and the JSON of scripts/gpu_check.sh: `python scripts/gpu_check_table.py FOLDER RUNS DEVICE`.

Exit status 1 where a run or a benchmark is missing, or server and trainer disagree about probabilities.
"""

import json
import statistics
import sys
from pathlib import Path

# How far a token's probability in vLLM or hf may be from the trainer's. The recipes generate in bfloat16 on a GPU; on a
# CPU all is float32.
ALLOWED = {"cuda": 0.2, "cpu": 1e-4}
COLUMNS = {
    "critic/score/mean": "reward",
    "training/rollout_probs_diff_max": "probability difference, max",
    "timing_s/step": "s/step",
    "timing_s/gen": "s generation",
    "timing_s/update_actor": "s update",
    "timing_s/update_weights": "s weight sync",
    "actor/perf/max_memory_allocated_gb": "GB allocated, max",
}


def read(folder: Path) -> dict:
    """{"machine", "runs": {name: {column: number}}, "bench": {table: rows}} of what is there."""
    report = {"doctor": json.loads((folder / "doctor.json").read_text() or "null"), "runs": {}, "bench": {}}
    for path in sorted(folder.glob("*/metrics.*.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        rows = {line["step"]: line["data"] for line in lines if "actor/pg_loss" in line["data"]}
        later = [data for step, data in rows.items() if step > min(rows)]  # the first step starts things up
        run = {"first step": min(rows), "last step": max(rows)}
        for key, name in COLUMNS.items():
            values = [data[key] for data in later if key in data]
            if values:
                run[name] = max(values) if name.endswith("max") else statistics.mean(values)
        report["runs"][f"{path.parent.name}, to step {path.suffixes[0][1:]}"] = run
    for path in sorted(folder.glob("bench_*.json")):
        bench = json.loads(path.read_text())
        report["machine"], report["bench"][bench["table"]] = bench["machine"], bench["rows"]
    return report


def problems(report: dict, runs: int, device: str) -> list[str]:
    """What is missing or wrong, a line each."""
    found = [f"{runs - len(report['runs'])} runs are missing"] * (len(report["runs"]) != runs)
    found += [f"bench {table} is missing" for table in ("filter", "kpo") if table not in report["bench"]]
    for name, run in report["runs"].items():
        difference = run[COLUMNS["training/rollout_probs_diff_max"]]
        if not difference < ALLOWED[device]:
            found.append(f"{name}: probabilities of server and trainer differ by {difference:.2g}")
    return found


def markdown(report: dict) -> str:
    """The runs, a row each, and the benchmarks below them."""
    from verl_krpo.report.tables import markdown as table

    names = list(dict.fromkeys(name for run in report["runs"].values() for name in run))
    rows = [{"run": label} | {name: run.get(name) for name in names} for label, run in report["runs"].items()]
    parts = [table(rows)] if rows else []
    return "\n\n".join([*parts, *(table(rows) for rows in report["bench"].values())])


def main() -> int:
    folder, runs, device = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    report = read(folder)
    report["problems"] = problems(report, runs, device)
    (folder / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "report.md").write_text(markdown(report) + "\n")
    print(markdown(report))
    print(f"\nto attach: {folder}/report.json")
    for problem in report["problems"]:
        print(f"NOT WELL: {problem}", file=sys.stderr)
    return int(bool(report["problems"]))


if __name__ == "__main__":
    sys.exit(main())
