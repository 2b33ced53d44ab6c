"""The main table's measures against scipy and by hand, and the study in small, its runs invented."""

import io
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from scipy import stats

from verl_krpo.lab.train import compare, study
from verl_krpo.lab.train.conditions import COMPARED, RATES

RESULTS = Path(__file__).parents[3] / "docs" / "results"


def test_a_score_is_the_part_learned_of_what_there_was_to_learn():
    assert compare.score("0.2 0.9 0.5 0.6 0.6 0.7 0.6") == pytest.approx(0.5)  # the last five: 0.6
    assert compare.score("0.2 0.1 0.1 0.1 0.1 0.1") == pytest.approx(-0.125)


def test_measures_over_tasks_and_seeds():
    rng = np.random.default_rng(0)
    own, other = rng.normal(0.3, 1, (3, 8)).round(1), rng.normal(0, 1, (3, 8)).round(1)  # with ties
    found = compare.probability_of_improvement(own, other)
    by_scipy = [stats.mannwhitneyu(*pair).statistic / 64 for pair in zip(own, other, strict=True)]
    assert found.value == pytest.approx(np.mean(by_scipy)) and found.low < found.value < found.high
    assert compare.probability_of_improvement(own, own).value == 0.5
    middle = np.sort(own, axis=None)[6:18]  # 24 scores, a quarter cut off at either end
    assert compare.interquartile_mean(own).value == pytest.approx(middle.mean())


def test_seeds_are_drawn_within_their_task():
    scores = np.arange(3)[:, None] * 10 + np.arange(4)[None] / 10
    drawn = compare._resampled(scores, np.random.default_rng(0))
    assert (drawn // 10 == np.arange(3)[None, :, None]).all()
    assert drawn.std(0).min() > 0


def invented(condition, method, seed):
    """A line of the CSV: in `learn` krpo is best at the second rate and equals rloo there, all others at the first."""
    task, _, rate = condition.rpartition("_lr_")
    rate = float(rate)
    best = RATES[1] if method == "krpo" and task == "learn" else RATES[0]
    end = 0.5 + seed / 1000 + (rate == best) * 0.1 + (method == "none") * 0.02
    row = {"condition": condition, "method": method, "seed": seed, "learning_rate": rate, "rollouts": 640}
    return row | {"curve": f"0.2 0.3{5 * f' {end}'}", "greedy": f"0.2 {end}", "pass8": "0.2 0.9", "entropy": "0.5 0.4"}


def cells_of(line):
    return [cell.strip() for cell in line.split("|")[1:-1]]


def test_each_method_is_compared_at_its_best_rate(monkeypatch, tmp_path):
    monkeypatch.setattr("rich.progress.Progress.console", Console(file=io.StringIO()), raising=False)
    ran = []

    def execute(run, tasks, models, path, jobs):
        for task in tasks:
            ran.append(task)
            study.append(path, row := invented(*task))
            yield row

    monkeypatch.setattr(study, "execute", execute)
    gradients = tmp_path / "gradient"
    gradients.mkdir()
    for name, condition in COMPARED.items():
        (gradients / f"{name}_{condition.steps // 2}.csv").write_text(
            "method,snr\nnone,2\nrloo,1\nkrpo,1\nbatch_mean,1\ngrpo,1\n"
        )
    text = compare.run(tmp_path, tmp_path, lambda condition: None, 1, gradients)
    count = len(compare.METHODS) * len(COMPARED) + len(compare.OF_RECURRING)
    assert len(ran) == len(set(ran)) == count * (compare.SEEDS + len(RATES))
    assert {t.condition for t in ran if t.method == "krpo" and t.seed == 3 and "learn_lr" in t.condition} == {
        f"learn_lr_{RATES[1]:g}"
    }
    overall, tasks, duels, recurring, rates, agreement = text.split("\n\n")
    by_pair = {tuple(cells[:2]): cells[2:] for cells in map(cells_of, duels.splitlines()[2:])}
    count = str(len(COMPARED))
    assert by_pair["krpo_adaptive", "jspo"][::4] == ["+0.000 (+0.000 to +0.000)", "0"]
    assert by_pair["krpo_adaptive_score", "none"][0] == "-0.025 (-0.025 to -0.025)"  # of 0.8 to learn 0.02
    assert by_pair["krpo_adaptive_score", "none"][2:] == [count, "0", count]
    lines = [cells_of(line) for line in overall.splitlines()[2:]]
    assert lines[0][0] == "none" and lines[1][-2].startswith("0.500")
    of_learn = next(line for line in rates.splitlines() if line.startswith("| learn "))
    assert of_learn.count(f"{RATES[0]:g}") == 9 and of_learn.count(f"{RATES[1]:g}") == 1
    assert "+0.020 ± 0.000" in tasks and "krpo_memory_score" in recurring and "+1.00" in agreement
    assert {path.name for path in tmp_path.iterdir()} >= {"overall.md", "overall.csv", "tasks.md", "curves.png"}
    again = len(ran)
    compare.run(tmp_path, tmp_path, lambda condition: None, 1, gradients)
    assert len(ran) == again


def test_runs_may_end_in_any_order():
    rates = {(task, method): RATES[0] for task in COMPARED for method in compare.METHODS + compare.OF_RECURRING}
    rows = [invented(*task) for task in compare.for_table(rates)]
    for k, row in enumerate(rows):
        row["curve"] = f"0.2 {0.2 + (k * 37 % 101) / 200}"  # another one for every run
    again = list(rows)
    random.Random(0).shuffle(again)
    first, second = compare.of_table(rows, rates), compare.of_table(again, rates)
    assert compare.duels(first) == compare.duels(second)
    by_name = [
        sorted(compare.by_task(rows), key=lambda line: (line["task"], line["method"])) for rows in (first, second)
    ]
    assert by_name[0] == by_name[1]
    for lines in zip(compare.overall(first), compare.overall(second), strict=True):
        assert lines[0] == lines[1]


def test_a_study_that_is_not_ended_shows_the_seeds_that_are():
    rates = {(task, method): RATES[0] for task in COMPARED for method in compare.METHODS + compare.OF_RECURRING}
    rows = [invented(*task) for task in compare.for_table(rates)][:-1]
    lines = compare.overall(compare.of_table(rows, rates))
    assert {line["seeds"] for line in lines} == {compare.SEEDS - 1}
    with pytest.raises(ValueError, match="no seed has all its runs"):
        compare.of_table(rows[:5], rates)


def test_the_main_table_of_the_pages_says_what_its_runs_say(tmp_path):
    shutil.copy(RESULTS / "compare" / "runs.csv", tmp_path)
    shown = {path.name: path.read_text() for path in (RESULTS / "compare").glob("*.md")}
    compare.show(tmp_path, RESULTS / "compare" / "gradient" if "agreement.md" in shown else None)
    assert shown == {path.name: path.read_text() for path in tmp_path.glob("*.md")}


def test_the_readme_has_the_main_table():
    readme = (RESULTS.parents[1] / "README.md").read_text()
    lines = [cells_of(line) for line in (RESULTS / "compare" / "overall.md").read_text().splitlines()[2:]]
    rows = [cells_of(line)[1:] for line in readme.splitlines() if line.startswith("| ")]
    for method, _, learned, *_, better, _ in lines:
        assert [learned, "" if method == "rloo" else better] in rows, method
