"""forecast: the trackers' formulas, the scores, and runs whose chances are known."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest

from verl_krpo.replay import forecast, rollouts, trackers
from verl_krpo.replay.trackers import TRACKERS


def write(path, steps):
    """steps: one {prompt: rewards} after the other."""
    for number, visits in enumerate(steps, start=1):
        rows = [(prompt, reward) for prompt, rewards in visits.items() for reward in rewards]
        rollouts.record(path, number, *zip(*rows, strict=True))
    return path


def drifting(path, pool=64, batch=16, steps=40, size=4, rise=0.05, spread=1.3, seed=0):
    """Prompts in a new order every round, whose logits rise together."""
    rng = np.random.default_rng(seed)
    logits, waiting, visits = rng.normal(-0.5, spread, pool), [], []
    for _ in range(steps):
        logits += rise
        waiting = waiting or np.split(rng.permutation(pool), pool // batch)
        chances = 1 / (1 + np.exp(-logits))
        visits.append({int(g): (rng.random(size) < chances[g]).astype(int).tolist() for g in waiting.pop()})
    return write(path, visits)


ONE = np.array([0])


def told(name, rights, size=4):
    """What a tracker holds of a prompt after these visits, one a step."""
    tracker = TRACKERS[name](1)
    for step, right in enumerate(rights, start=1):
        tracker.update(ONE, step, np.array([right]), np.array([size]))
    mean, var = tracker.predict(ONE, len(rights) + 1)
    return mean.item(), var.item()


def beta(a, b):
    return a / (a + b), a * b / (a + b) ** 2 / (a + b + 1)


@pytest.mark.parametrize(
    "name, expected",
    [
        ("last visit", (0.25, 0)),
        ("EMA", (0.5, 0)),
        ("batch mean", (0.25, 0)),
        ("SPO", beta(0.9 * (0.9 * 6 + 3) + 1, 0.9 * (0.9 * 2 + 1) + 3)),
        ("MoPPS", beta(5, 5)),
        ("MoPPS 0.5", beta(0.5 * 4 + 0.5 + 1, 0.5 * 2 + 0.5 + 3)),
        ("DBB 0.5", beta(0.5 * 3.5 + 1, 0.5 * 1.5 + 3)),
        ("DBB 0.75", beta(0.75 * 3.75 + 1, 0.75 * 1.75 + 3)),
    ],
)
def test_a_tracker_is_its_formula(name, expected):
    """Three of four are right, then one."""
    assert told(name, [3, 1]) == pytest.approx(expected)


def test_dps_moves_by_the_counts_of_what_it_has_seen():
    moves, states = np.ones((3, 3)), np.full(3, 1 / 3)
    for state in (0, 0, 1, None, 2):  # None: a step without a visit
        chances = moves / moves.sum(axis=0)
        counts = 0 if state is None else np.outer(np.eye(3)[state], states) * chances
        moves = 0.7 * moves + 0.3 + (0 if state is None else counts / counts.sum())
        states = chances @ states if state is None else np.eye(3)[state]
    expected = moves / moves.sum(axis=0) @ states

    tracker = TRACKERS["DPS"](1)
    for step, right in ((1, 0), (2, 0), (3, 2), (5, 4)):
        tracker.update(ONE, step, np.array([right]), np.array([4]))
    mean, var = tracker.predict(ONE, 6)
    assert mean.item() == pytest.approx(expected[1] / 2 + expected[2])
    assert var.item() == pytest.approx(expected[1] / 4 + expected[2] - mean.item() ** 2)

    far = [np.array(tracker.predict(ONE, step)).ravel() for step in (70, 71, 10**6)]  # equally likely states
    assert np.array(far) == pytest.approx(np.array([[1 / 2, 1 / 6]] * 3))


def test_the_memory_is_krpo_memorys_and_a_sure_level_stays():
    rng = np.random.default_rng(0)
    prompts, total = np.arange(20), np.full(20, 4)
    with_level, without = trackers.Memory(20), trackers.Memory(20, level=False)
    for step in range(1, 30):
        for tracker in (with_level, without):
            tracker.update(prompts, step, rng.binomial(4, 0.2 + 0.02 * step, 20), total)
        if step == 1:
            first = without.memory.level
    assert without.memory.level == first < 0.4 < with_level.memory.level
    mean, var = with_level.predict(prompts, 30)
    assert mean.mean() == pytest.approx(with_level.memory.level, abs=0.05) and (var > 0).all()


def test_the_law_is_beta_binomial():
    right = np.arange(6)
    total = np.full(6, 5)
    for mean, var in ((0.3, 0.02), (0.3, 0.0), (1.0, 0.0), (-0.2, 0.5)):
        chance = np.exp(forecast.law(np.full(6, mean), np.full(6, var), right, total))
        assert chance.sum() == pytest.approx(1) and (chance > 0).all()
        assert chance @ right == pytest.approx(5 * np.clip(mean, *forecast.CHANCES))
    from scipy import stats

    binomial = np.exp(forecast.law(np.full(6, 0.3), np.zeros(6), right, total))
    np.testing.assert_allclose(binomial, stats.binom.pmf(right, 5, 0.3), rtol=1e-4)


def test_dead_groups_are_named_as_far_as_the_precision_holds():
    dead = np.array([True] * 19 + [False] * 2 + [True] * 9 + [False] * 10)
    chance = np.linspace(1, 0, 40)
    assert forecast.foretold(chance, dead)(np.ones(40)) == 19 / 28
    assert forecast.foretold(chance, dead)(np.where(dead, 3, 1)) == 1  # 84 of 86
    assert forecast.foretold(np.ones(40), dead)(np.ones(40)) == 0  # equal ones are named together
    assert np.isnan(forecast.foretold(chance, np.zeros(40, bool))(np.ones(40)))


def test_only_prompts_that_come_again_are_foretold_and_from_what_was_before(tmp_path):
    steps = [{"a": [1, 1], "b": [0, 0]}, {"c": [1, 0]}, {"a": [0, 1], "c": [1, 1]}]
    found = forecast.forecast(forecast.read(write(tmp_path / "run.jsonl", steps)))
    assert (found.prompts.tolist(), found.age.tolist(), found.right.tolist()) == ([0, 2], [2, 1], [1, 2])
    mean = dict(zip(TRACKERS, found.mean.tolist(), strict=True))
    assert mean["last visit"] == [1, 0.5] and mean["batch mean"] == [0.5, 0.5]
    both = forecast.join([found, found])
    assert both.prompts.tolist() == [0, 2, 3, 5] and both.mean.tolist() == [2 * row for row in found.mean.tolist()]


@pytest.mark.parametrize(
    "steps, what",
    [
        ([{"a": [0.5]}], "step 1: a reward is 0.5; right answers are counted"),
        ([{"a": [1]}, {"b": [1]}], "fewer than 16 prompts come twice"),
    ],
)
def test_runs_that_cannot_be_foretold_are_named(tmp_path, steps, what):
    with pytest.raises(ValueError, match=what):
        forecast.run([write(tmp_path / "run.jsonl", steps)], tmp_path)


def test_steps_that_go_back_and_damaged_lines_are_refused(tmp_path):
    path = write(tmp_path / "run.jsonl", [{"a": [1]}, {"a": [1]}])
    rollouts.record(path, 1, ["a"], [1])
    with pytest.raises(ValueError, match="a step comes twice or goes back"):
        forecast.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="1 damaged lines, the first .*run.jsonl:1: no JSON"):
        forecast.read(path)


def test_verls_dumps_are_read_by_their_prompts_text(tmp_path):
    rows = [
        {
            "input": f"prompt {g}",
            "output": "x",
            "gts": "1",
            "score": float(k > g),
            "step": step,
            "uid": f"{step}{g}_{k}_0",
        }
        for step in (1, 2)
        for g in range(2)
        for k in range(3)
    ]
    path = tmp_path / "1.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, other = forecast.read(path)
    assert (one.prompts.tolist(), one.right.tolist(), one.total.tolist()) == ([0, 1], [2, 1], [3, 3])
    assert other.prompts.tolist() == [0, 1]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "input"}) + "\n" for row in rows))
    with pytest.raises(ValueError, match="no prompt is known again"):
        forecast.read(path)


def test_where_prompts_differ_and_all_rise_the_memory_is_first(tmp_path):
    runs = [drifting(tmp_path / f"{seed}.jsonl", seed=seed) for seed in range(2)]
    rows = forecast.measure(forecast.join([forecast.forecast(forecast.read(run)) for run in runs]))
    loss = {row["tracker"]: row for row in rows if row["steps_since"] == "all"}
    assert min(loss, key=lambda name: loss[name]["log_loss"]) == "krpo_memory"
    for name in ("without level", "last visit", "batch mean", "DPS"):
        assert loss[name]["to_ours_low"] > 0, name
    assert {row["steps_since"] for row in rows} == {"all", "1", "2 to 4", "5 to 19"}
    for row in rows:
        assert row["log_loss_low"] <= row["log_loss"] <= row["log_loss_high"]
        assert 0 <= row["dead_foretold"] <= 1 and row["brier"] > 0


def test_the_command(tmp_path):
    run = drifting(tmp_path / "run.jsonl")
    command = [sys.executable, "-m", "verl_krpo", "study", "forecast", run, "--out", tmp_path / "out"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert max(map(len, done.stdout.splitlines())) <= 80
    rows = list(csv.DictReader(open(tmp_path / "out/forecast.csv")))
    assert [row["tracker"] for row in rows[: len(TRACKERS)]] == list(TRACKERS)
    assert (tmp_path / "out/forecast.png").exists()
