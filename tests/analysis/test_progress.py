import json
import sys

from verl_krpo.analysis import progress

JOB = """
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


def job(tmp_path, code, status="0"):
    return (
        [sys.executable, "-c", code, str(tmp_path / "metrics.jsonl"), status],
        tmp_path / "log.txt",
        tmp_path / "metrics.jsonl",
    )


def test_steps_are_shown_and_the_noise_is_kept_in_the_log(tmp_path, capsys):
    command, log, metrics = job(tmp_path, JOB)
    assert progress.run(command, log, metrics) == 0
    shown = capsys.readouterr().out
    assert "held-out accuracy 0.250" in shown
    assert "step   10   reward 0.500   1.5 s" in shown
    assert "step   15" not in shown  # without a terminal only every tenth step and validations stay
    assert "noise" not in shown and "noise of the job" in log.read_text()


def test_a_failing_job_shows_its_log_and_passes_its_status_on(tmp_path, capsys):
    command, log, metrics = job(tmp_path, JOB, status="7")
    assert progress.run(command, log, metrics) == 7
    assert "noise of the job" in (shown := capsys.readouterr().err) and str(log) in shown


def test_a_silent_job_is_ended(tmp_path, capsys):
    command, log, metrics = job(tmp_path, "import time; time.sleep(600)")
    assert progress.run(command, log, metrics, stall_seconds=1) == 1
    assert "no output for 1 s" in capsys.readouterr().err


def test_metrics_are_read_once_each(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "data": {}}) + "\n" for step in range(4)))
    assert [row["step"] for row in progress._new_rows(path, 1)] == [2, 3]
