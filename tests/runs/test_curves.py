import json
import math
import statistics

import pytest
from verl.utils.tracking import Tracking

from verl_krpo.runs import curves, plot


@pytest.fixture
def shown(capsys):
    """What a call prints, and its figure."""

    def shown(paths, figure=None):
        drawn = curves.show(paths, figure)
        return capsys.readouterr().out, drawn

    return shown


def values(step):
    data = {"critic/score/mean": 0.402 + step / 100, "timing_s/step": 2.0 + (step % 3) / 10}
    if step % 10 == 0:
        data["val-core/arithmetic_sums/acc/mean@1"] = 0.3 + step / 50
        data["val-aux/arithmetic_sums/score/mean@1"] = 0.9
    return {"val-core/arithmetic_sums/acc/mean@1": 0.25} if step == 0 else data


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run of 30 steps, written by verl's own logger."""
    folder = tmp_path / "krpo_seed1"
    folder.mkdir()
    monkeypatch.setenv("VERL_FILE_LOGGER_PATH", str(folder / "metrics.jsonl"))
    tracking = Tracking("project", "experiment", default_backend=["file"])
    for step in range(31):
        tracking.log(values(step), step)
    del tracking
    (folder / "latest_checkpointed_iteration.txt").write_text("30")
    return folder


def test_reads_what_verl_logs(run):
    read = curves.read(run)
    assert read.name == "krpo_seed1"
    assert read.series["accuracy"] == pytest.approx({0: 0.25, 10: 0.5, 20: 0.7, 30: 0.9})
    assert list(read.series["critic/score/mean"]) == list(read.series["timing_s/step"]) == list(range(1, 31))
    assert read.numbers() == pytest.approx((0.25, 0.9, 0.402 + 5.5 / 100, 0.402 + 25.5 / 100, 2.1))
    assert read.checkpoint() == run / "global_step_30"


def test_table_and_figure(run, tmp_path, shown):
    text, drawn = shown([run], tmp_path / "figures" / "reward.png")
    row = next(line for line in text.splitlines() if line.startswith("krpo_seed1"))
    assert [cell.strip() for cell in row.split("│")] == ["krpo_seed1", "0.25", "0.90", "0.46", "0.66", "30", "2.10"]
    assert f"checkpoint: {run / 'global_step_30'}" in text and f"figure: {drawn}" in text
    assert max(len(line) for line in text.splitlines() if "│" in line or "━" in line) <= 80
    assert drawn.read_bytes().startswith(b"\x89PNG")


def test_figure_lies_beside_the_log_unless_told(run, shown):
    assert shown([run])[1] == run / "reward.png"


def test_several_runs(run, tmp_path, shown):
    other = tmp_path / "a_run_with_a_name_much_longer_than_the_column_that_holds_it.jsonl"
    other.write_text((run / "metrics.jsonl").read_text())
    text, _ = shown([run, other])
    assert "checkpoint of krpo_seed1" in text
    assert max(len(line) for line in text.splitlines() if "│" in line) <= 80


def test_seeds_of_one_method_have_a_mean_and_a_spread(run, tmp_path, shown):
    seed2 = tmp_path / "krpo_seed2"
    seed2.mkdir()
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows[-1]["data"]["val-core/arithmetic_sums/acc/mean@1"] = 0.7  # 0.9 in the first
    (seed2 / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text, _ = shown([run, seed2])
    (row,) = (line for line in text.splitlines() if line.startswith("krpo "))
    # mean and standard deviation (n - 1) of 0.9 and 0.7
    assert [cell.strip() for cell in row.split("│")][:4] == ["krpo", "2", "0.25 ±0.00", "0.80 ±0.14"]
    assert "krpo " not in shown([run])[0]


def test_missing_metrics_are_named(tmp_path, shown):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(json.dumps({"step": s, "data": {"critic/score/mean": 0.5}}) + "\n" for s in range(1, 4)))
    text, drawn = shown([log])
    assert "the log holds no timing_s/step" in text and "the log holds no val-core/*/acc/mean@*" in text
    assert drawn.exists()


def test_validation_only(tmp_path, shown):
    log = tmp_path / "metrics.jsonl"
    log.write_text(json.dumps({"step": 0, "data": {"val-core/a/acc/mean@4": 0.2, "val-core/b/acc/mean@4": 0.4}}) + "\n")
    assert curves.read(log).series["accuracy"] == {0: pytest.approx(0.3)}
    text, drawn = shown([log])
    assert "validated once only" in text and "no critic/score/mean" in text and drawn.exists()


def test_half_a_line_at_the_end_is_a_killed_run(run):
    log = run / "metrics.jsonl"
    log.write_bytes(log.read_bytes()[:-40])
    assert max(curves.read(run).series["critic/score/mean"]) == 29


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="VERL_FILE_LOGGER_PATH"):
        curves.read(tmp_path)
    log = tmp_path / "metrics.jsonl"
    log.write_text('{"loss": 1}\n{"step": 1, "data": {}}\n')
    with pytest.raises(ValueError, match="line 1 is not one of verl's file logger"):
        curves.read(log)
    log.write_text('{"step": 1, "data": {"actor/loss": 1.0}}\n')
    with pytest.raises(ValueError, match="has the first step ended"):
        curves.read(log)
    with pytest.raises(ValueError, match="at least one run"):
        curves.show([])


@pytest.mark.parametrize("count", [1, 2, 9, 10, 11, 50])
def test_smoothed(count):
    series = [math.sin(i) for i in range(count)]
    assert plot.smoothed(series, window=1) == pytest.approx(series)
    level = plot.smoothed([0.7] * count)
    assert level == pytest.approx([0.7] * count)
    middle = count // 2
    window = series[max(0, middle - 5) : middle + 6]
    assert plot.smoothed(series)[middle] == pytest.approx(statistics.fmean(window))


def logged(folder, rewards, accuracy):
    folder.mkdir()
    lines = [{"step": k, "data": {"critic/score/mean": reward}} for k, reward in enumerate(rewards, 1)]
    lines[-1]["data"]["val-core/sums/acc/mean@1"] = accuracy
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def test_differences_paired_by_seed(tmp_path, capsys):
    runs = [
        logged(tmp_path / "rloo_seed1", [0.1, 0.3], 0.5),
        logged(tmp_path / "rloo_seed2", [0.3, 0.5], 0.7),
        logged(tmp_path / "krpo_seed2", [0.5, 0.7], 0.6),
        logged(tmp_path / "krpo_seed1", [0.2, 0.4], 0.5),
        logged(tmp_path / "krpo_seed3", [0.9, 0.9], 0.9),  # has no partner
    ]
    curves.table_of_differences([curves.read(run) for run in runs], "rloo")
    rloo, krpo = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith(("rloo", "krpo"))]
    assert rloo == ["rloo", "│", "2", "│", "0.300", "│", "-", "│", "0.600", "│", "-"]
    # Differences .1 and .2 of the reward, 0 and -.1 of the accuracy: t is 12.706 with one degree of freedom, s.e. .05.
    assert krpo == ["krpo", "│", "2", "│", "0.450", "│", "+0.150", "±0.635", "│", "0.550", "│", "-0.050", "±0.635"]


def test_what_cannot_be_paired_is_named(run, tmp_path):
    with pytest.raises(ValueError, match="no run of rloo among krpo"):
        curves.show([run], tmp_path / "figure", against="rloo")
    other = logged(tmp_path / "mine", [0.1], 0.5)
    with pytest.raises(ValueError, match="mine: runs are paired by the `_seedN`"):
        curves.show([run, other], tmp_path / "figure", against="krpo")
