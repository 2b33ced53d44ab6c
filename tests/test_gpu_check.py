"""What scripts/gpu_check.sh makes of the runs and benchmarks it finds."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "scripts/gpu_check_table.py"


@pytest.fixture
def folder(tmp_path):
    """A check with one run of three steps, whose probabilities differ by 1e-6, and both benchmarks."""
    (tmp_path / "doctor.json").write_text("{}")
    (tmp_path / "krpo_vllm").mkdir()
    steps = [
        {
            "step": step,
            "data": {"actor/pg_loss": 0.0, "training/rollout_probs_diff_max": 1e-6, "timing_s/step": seconds},
        }
        for step, seconds in ((1, 50.0), (2, 2.0), (3, 4.0))
    ]
    lines = [{"step": 0, "data": {"val-core/x": 0.5}}, *steps]
    (tmp_path / "krpo_vllm/metrics.3.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for table in ("filter", "kpo"):
        bench = {"table": table, "machine": {"device": "here"}, "rows": [{"loss": "kpo", "ms": 1.5}]}
        (tmp_path / f"bench_{table}.json").write_text(json.dumps(bench))
    return tmp_path


def report(folder, runs, device="cpu"):
    done = subprocess.run(
        [sys.executable, SCRIPT, folder, str(runs), device], capture_output=True, text=True, timeout=600
    )
    return done, json.loads((folder / "report.json").read_text())


def test_a_check_that_is_well(folder):
    done, found = report(folder, 1)
    assert (done.returncode, found["problems"]) == (0, []), done.stderr
    (run,) = found["runs"].values()
    assert (run["first step"], run["last step"], run["s/step"]) == (1, 3, 3.0)  # the first step starts things up
    assert "| krpo_vllm, to step 3 |" in done.stdout and "report.json" in done.stdout


def test_what_is_missing_or_wrong_is_named(folder):
    (folder / "bench_kpo.json").unlink()
    path = folder / "krpo_vllm/metrics.3.jsonl"
    path.write_text(path.read_text().replace("1e-06", "0.01"))
    done, found = report(folder, 5)
    assert done.returncode == 1
    assert [line.split(":")[0] for line in found["problems"]] == [
        "4 runs are missing",
        "bench kpo is missing",
        "krpo_vllm, to step 3",
    ]
    assert report(folder, 1, "cuda")[1]["problems"] == ["bench kpo is missing"]  # bfloat16 may differ by so much
