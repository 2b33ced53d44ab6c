"""plot: what verl's loggers wrote, read back by its own writers' files; seeds, live runs, figures."""

import json
import math
import subprocess
import sys

import pytest

from verl_krpo.runs.log import series as read
from verl_krpo.runs.plot import draw, mean_and_std, named, show

REWARD = "critic/score/mean"
DATA = [
    {REWARD: 0.25 + 0.1 * step, "actor/entropy": 1.5, "val-core/a/acc/mean@4": 0.5, "val-core/b/acc/mean@4": 1.0,
     "krpo/nis": 2.0, "actor/kpo_ratio_std_raw": 0.5, "actor/kpo_ratio_std_filtered": 0.25, "text": "x"}
    for step in range(6)
]  # fmt: skip


@pytest.fixture
def logged(tmp_path, monkeypatch):
    """The same six steps through verl's file logger and its TensorBoard writer: their folders."""
    from verl.utils.tracking import FileLogger, _TensorboardAdapter

    (tmp_path / "file").mkdir()
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(tmp_path / "file" / "metrics.jsonl"))
    monkeypatch.setenv("TENSORBOARD_DIR", str(tmp_path / "board" / "tensorboard"))
    lines, board = FileLogger("project", "run"), _TensorboardAdapter("project", "run")
    for step, data in enumerate(DATA):
        lines.log(data, step)
        board.log({key: value for key, value in data.items() if key != "text"}, step)
    lines.finish()
    board.finish()
    return tmp_path / "file", tmp_path / "board"


def test_both_loggers_are_read_alike(logged):
    one, other = read(logged[0]), read(logged[1])
    assert one.keys() == other.keys() and "text" not in one
    for metric, series in one.items():
        assert other[metric] == pytest.approx(series, rel=1e-6)
    assert one[REWARD] == {step: data[REWARD] for step, data in enumerate(DATA)}
    assert one["accuracy"] == dict.fromkeys(range(6), 0.75)


def test_a_live_log_is_read_up_to_its_last_whole_line(logged):
    with open(logged[0] / "metrics.jsonl", "a") as log:
        log.write('{"step": 6, "data": {"critic/sc')
    assert max(read(logged[0])[REWARD]) == 5


def test_what_is_not_finite_is_left_out(tmp_path):
    rows = [{"step": 1, "data": {REWARD: math.nan, "b": 1.0}}, {"step": 2, "data": {REWARD: 0.5, "b": math.inf}}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read(tmp_path) == {"b": {1: 1.0}, REWARD: {2: 0.5}}


def test_nothing_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="metrics.jsonl"):
        read(tmp_path)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "data": {"other": 1.0}}\n')
    with pytest.raises(ValueError, match="nothing to draw"):
        draw({"run": [read(tmp_path)]}, tmp_path / "figure")


def test_seeds_are_averaged_where_they_have_a_step():
    steps, mean, spread = mean_and_std([{1: 0.0, 2: 1.0, 3: 5.0}, {1: 2.0, 2: 1.0}])
    assert (steps, mean) == ([1, 2, 3], [1.0, 1.0, 5.0])
    assert spread == pytest.approx([math.sqrt(2), 0.0, 0.0])


def test_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run=a").mkdir()
    assert named("krpo=runs/1")[0] == "krpo" and str(named("krpo=runs/1")[1]) == "runs/1"
    assert named("run=a")[0] == "run=a"
    assert named(".")[0] == tmp_path.name


def test_the_figure_has_a_panel_for_what_was_logged(logged, tmp_path):
    png, titles = draw({"a": [read(logged[0]), read(logged[0])], "b": [read(logged[1])]}, tmp_path / "out" / "figure.1")
    assert png.name == "figure.1.png" and png.read_bytes().startswith(b"\x89PNG")
    assert titles == ["mean reward", "held-out accuracy", "entropy (nats a token)", "krpo: NIS (1: the model fits)",
                      "kpo: std of the token ratios"]  # fmt: skip


def test_the_command(logged, tmp_path):
    command = [sys.executable, "-m", "verl_krpo", "plot", f"krpo={logged[0]}", f"krpo={logged[1]}", str(logged[0])]
    done = subprocess.run([*command, "--out", tmp_path / "curves"], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert "krpo: 2 runs, 5 steps" in done.stdout and "file: 1 run, 5 steps" in done.stdout
    assert (tmp_path / "curves.png").exists()
    missing = subprocess.run([*command[:4], tmp_path / "no"], capture_output=True, text=True, timeout=600)
    assert missing.returncode == 2 and "metrics.jsonl" in missing.stderr and "Traceback" not in missing.stderr


def test_one_step_is_enough(logged, tmp_path, capsys):
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "metrics.jsonl").write_text(json.dumps({"step": 1, "data": DATA[0]}) + "\n")
    show([str(tmp_path / "one")], tmp_path / "figure")
    assert "one: 1 run, 1 steps" in capsys.readouterr().out
