"""A run directory over attempts: real subprocesses that write what verl's file logger writes."""

import json
import signal
import subprocess
import sys
import time

import psutil
import pytest

from verl_krpo import run_dir

# As verl does: the metrics file is opened anew at every start, the job resumes after the last checkpoint.
JOB = """
import json, os, pathlib, sys
folder, steps, save_freq, dies_at = pathlib.Path(sys.argv[1]), *map(int, sys.argv[2:5])
tracker = folder / "latest_checkpointed_iteration.txt"
start = int(tracker.read_text()) if tracker.exists() else 0
with open(folder / "metrics.jsonl", "wb", buffering=0) as log:
    put = lambda step, **data: log.write(json.dumps({"step": step, "data": data}).encode() + b"\\n")
    put(start, **{"val-core/sums/acc/mean@1": start / 10})
    for step in range(start + 1, steps + 1):
        if step == dies_at and not start:
            os.kill(os.getpid(), 9)
        put(step, **{"critic/score/mean": step + start / 100, "timing_s/step": 36.0})
        if step % save_freq == 0 or step == steps:
            tracker.write_text(str(step))
print("reached", steps)
"""


@pytest.fixture
def job(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(JOB)
    return lambda *arguments: [sys.executable, str(script), str(tmp_path / "run"), *map(str, arguments)]


def test_a_killed_job_resumes_and_its_metrics_are_joined(job, tmp_path, capfd):
    folder, command = tmp_path / "run", job(6, 2, 6)
    assert run_dir.run(folder, command) == 128 + signal.SIGKILL
    said = f"{folder}: the job ended with status -9 after step 5; {folder}/log.txt has the reason; "
    assert capfd.readouterr().err == said + "the same command goes on from step 4\n"
    assert sorted(run_dir.metrics(folder)) == [0, 1, 2, 3, 4, 5]
    assert run_dir.run(folder, command) == 0
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5, 6]
    scores = {row["step"]: row["data"].get("critic/score/mean") for row in rows}
    assert scores == {0: None, 1: 1, 2: 2, 3: 3, 4: 4, 5: 5.04, 6: 6.04}  # 5 was done again, after step 4
    assert rows[4]["data"]["val-core/sums/acc/mean@1"] == 0.4  # the validation on resuming joins the row of its step
    began, died, resumed, ended = (json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines())
    assert (began["resumes_from"], died["status"], resumed["resumes_from"]) == (0, -9, 4)
    assert (ended["status"], ended["step"]) == (0, 6)
    assert began["command"] == command and began["verl"] and "commit" in began
    assert "reached 6" in (folder / "log.txt").read_text() and (folder / "log.1.txt").exists()
    assert "resumes at step 4" in capfd.readouterr().out


def test_what_a_killed_wrapper_left_is_kept_too(job, tmp_path):
    """Everything is killed at once, twice: nothing is ended in order."""
    folder = tmp_path / "run"
    run_dir.begin(folder, ["job"])
    subprocess.run(job(6, 2, 4))
    (folder / "metrics.jsonl").open("a").write('{"step": 4, "da')  # cut off in the middle of a line
    run_dir.begin(folder, ["job"])
    assert sorted(run_dir.metrics(folder)) == [0, 1, 2]
    run_dir.begin(folder, ["job"])
    assert sorted(run_dir.metrics(folder)) == [0, 1, 2]
    assert run_dir.run(folder, job(6, 2, 4)) == 0
    assert sorted(run_dir.metrics(folder)) == [0, 1, 2, 3, 4, 5, 6]


def test_without_a_checkpoint_a_killed_job_starts_again_from_nothing(job, tmp_path):
    folder, command = tmp_path / "run", job(6, 5, 3)
    run_dir.run(folder, command)
    run_dir.begin(folder, command)
    assert run_dir.metrics(folder) == {}


def test_a_finished_run_is_not_started_again_and_not_mixed_with_another(job, tmp_path, capfd):
    folder = tmp_path / "run"
    assert run_dir.run(folder, job(3, 1, 0)) == 0
    logged = (folder / "metrics.jsonl").read_bytes()
    assert run_dir.run(folder, job(3, 1, 0)) == 0
    assert "finished at step 3" in capfd.readouterr().out
    with pytest.raises(ValueError, match="other settings, finished at step 3.*set RUN_DIR"):
        run_dir.run(folder, job(4, 1, 0))
    assert (folder / "metrics.jsonl").read_bytes() == logged


def test_the_exit_status_is_the_jobs(tmp_path):
    assert run_dir.run(tmp_path, [sys.executable, "-c", "import sys; sys.exit(7)"]) == 7


def test_summary(job, tmp_path):
    run_dir.run(tmp_path / "run", job(4, 2, 0))
    assert run_dir.summary(tmp_path / "run", last=2) == pytest.approx(
        {"steps": 4, "reward": 3.5, "accuracy": 0.0, "hours": 0.04}
    )
    assert run_dir.summary(tmp_path / "nothing") == {"steps": 0, "hours": 0}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_reaches_the_job_and_what_it_started(tmp_path, number):
    """SLURM ends a job by SIGTERM, Ctrl-C by SIGINT; the wrapper passes it on and writes the end down."""
    grandchild = "import os, time; print('up', os.getpid(), flush=True); time.sleep(600)"
    child = f"import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {grandchild!r}]))"
    wrapper = subprocess.Popen([sys.executable, "-m", "verl_krpo.run_dir", tmp_path, sys.executable, "-c", child])
    deadline, log = time.monotonic() + 60, tmp_path / "log.txt"
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pid = int(log.read_text().split()[1])
    wrapper.send_signal(number)
    assert wrapper.wait(60) in (128 + number, 1)
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE  # dead, not yet reaped
    assert json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])["status"] != 0
