"""A run directory over attempts: real subprocesses that write what verl's file logger writes."""

import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import sys
import termios
import time

import processes
import pytest

from verl_krpo.runs import log, run_dir

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
    assert sorted(log.rows(folder)) == [0, 1, 2, 3, 4, 5]
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
    assert sorted(log.rows(folder)) == [0, 1, 2]
    run_dir.begin(folder, ["job"])
    assert sorted(log.rows(folder)) == [0, 1, 2]
    assert run_dir.run(folder, job(6, 2, 4)) == 0
    assert sorted(log.rows(folder)) == [0, 1, 2, 3, 4, 5, 6]


def test_without_a_checkpoint_a_killed_job_starts_again_from_nothing(job, tmp_path):
    folder, command = tmp_path / "run", job(6, 5, 3)
    run_dir.run(folder, command)
    run_dir.begin(folder, command)
    assert log.rows(folder) == {}


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
    wrapper = subprocess.Popen([sys.executable, "-m", "verl_krpo", "run", tmp_path, sys.executable, "-c", child])
    pid = int(first_line(tmp_path / "log.txt").split()[1])
    wrapper.send_signal(number)
    assert wrapper.wait(300) in (128 + number, 1)
    assert processes.ended(pid)
    assert json.loads((tmp_path / "attempts.jsonl").read_text().splitlines()[-1])["status"] != 0


@pytest.fixture
def handlers():
    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_a_signal_that_comes_after_the_job_has_ended_changes_nothing(tmp_path, handlers):
    assert run_dir.run(tmp_path, [sys.executable, "-c", "pass"]) == 0
    signal.raise_signal(signal.SIGTERM)


SLEEPER = "import os, sys, time; print(os.getpid(), flush=True); time.sleep(float(sys.argv[1]))"


def first_line(log):
    deadline = time.monotonic() + 300
    while not (log.exists() and log.read_text().endswith("\n")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    return log.read_text()


def test_a_job_that_outlives_its_killed_wrapper_is_not_started_twice(tmp_path):
    command = [sys.executable, "-m", "verl_krpo", "run", tmp_path, sys.executable, "-c", SLEEPER, "600"]
    wrapper = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    trainer = int(first_line(tmp_path / "log.txt"))
    wrapper.kill()
    wrapper.wait()
    before = (tmp_path / "attempts.jsonl").read_text()
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert again.returncode == 2 and "Traceback" not in again.stderr
    assert f"a job is still running in {tmp_path}: process {trainer} on " in again.stderr
    assert "import os, sys, time" in again.stderr  # its command
    assert (tmp_path / "attempts.jsonl").read_text() == before and int((tmp_path / "log.txt").read_text()) == trainer

    os.kill(trainer, signal.SIGKILL)
    assert processes.ended(trainer)
    assert run_dir.run(tmp_path, [sys.executable, "-c", SLEEPER, "0"]) == 0


def test_two_directories_run_side_by_side_and_a_child_that_was_left_holds_nothing(tmp_path):
    """Ray's daemons close what they inherit; what is left over from a job that has ended must not block the next."""
    left = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {SLEEPER!r}, '600']); print(p.pid)"
    assert run_dir.run(tmp_path / "a", [sys.executable, "-c", f"{left}; sys.exit(1)"]) == 1
    try:
        assert run_dir.run(tmp_path / "b", [sys.executable, "-c", SLEEPER, "0"]) == 0
        assert run_dir.run(tmp_path / "a", [sys.executable, "-c", SLEEPER, "0"]) == 0
    finally:
        os.kill(int((tmp_path / "a/log.1.txt").read_text().split()[0]), signal.SIGKILL)


def test_checkpoints_without_weights_are_removed_at_the_end(tmp_path):
    for step, content in ((25, "data.pt"), (50, "actor/"), (75, "actor/model.pt"), (100, "data.pt"), (125, "data.pt")):
        folder = tmp_path / f"global_step_{step}"
        folder.mkdir()
        (folder / "actor").mkdir() if content.startswith("actor") else None
        (folder / content).touch() if not content.endswith("/") else None
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("100")
    run_dir.end(tmp_path, 0)
    assert sorted(path.name for path in tmp_path.glob("global_step_*")) == [
        "global_step_100",  # the one that verl resumes from
        "global_step_125",  # still being written when the job was killed
        "global_step_75",
    ]


QUIET = """
import json, sys, time
with open(sys.argv[1], "w") as file:
    for step in (0, 10, 15):
        validated, trained = {"val-core/sums/acc/mean@1": 0.25}, {"critic/score/mean": step / 20, "timing_s/step": 1.5}
        data = trained if step else validated
        file.write(json.dumps({"step": step, "data": data}) + "\\n")
    file.write('{"step": 16, "da')  # a line that is still being written
print("noise of the job")
sys.exit(int(sys.argv[2]))
"""


def quiet(tmp_path, code, status="0", **options):
    command = [sys.executable, "-c", code, str(tmp_path / "metrics.jsonl"), status]
    return run_dir.run(tmp_path, command, quiet=True, **options)


def test_quiet_shows_steps_and_keeps_the_noise_in_the_log(tmp_path, capsys):
    assert quiet(tmp_path, QUIET) == 0
    shown = capsys.readouterr().out
    assert "held-out accuracy 0.250" in shown
    assert "step   10   reward 0.500   1.5 s" in shown
    assert "step   15" not in shown  # without a terminal only every tenth step and validations stay
    assert "noise" not in shown and "noise of the job" in (tmp_path / "log.txt").read_text()


def test_a_terminal_shows_the_time_that_is_left(tmp_path):
    """At the step the job stands at, by the number of steps that verl has named."""
    job = """
import json, pathlib, sys, time
print("INFO:Total training steps: 40", flush=True)
with open(sys.argv[1], "w", buffering=1) as file:
    for step in range(3):
        file.write(json.dumps({"step": step, "data": {"timing_s/step": 1.5}}) + "\\n")
        time.sleep(1.2)
"""
    terminal, its = os.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 120, 0, 0))
    run = [sys.executable, "-m", "verl_krpo", "run", "--quiet", str(tmp_path)]
    subprocess.run([*run, sys.executable, "-c", job, str(tmp_path / "metrics.jsonl")], stderr=its, check=True)
    os.close(its)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "starting verl" in shown and re.search(r"step    2   1\.5 s \[\d\d:\d\d, about \d\d:\d\d left\]", shown)


def test_quiet_shows_the_log_of_a_failing_job_and_passes_its_status_on(tmp_path, capsys):
    assert quiet(tmp_path, QUIET, status="7") == 7
    shown = capsys.readouterr().err
    assert "noise of the job" in shown and str(tmp_path / "log.txt") in shown


@pytest.mark.parametrize("deaf", [False, True])
def test_a_silent_job_is_ended(tmp_path, capsys, monkeypatch, deaf):
    monkeypatch.setattr(run_dir, "TERM_SECONDS", 1)
    heeds = "signal.signal(signal.SIGTERM, signal.SIG_IGN)" if deaf else "pass"
    assert quiet(tmp_path, f"import signal, time; {heeds}; time.sleep(600)", stall_seconds=2) == 1
    assert "no output for 2 s" in capsys.readouterr().err
    assert not processes.below(word="time.sleep(600)")
