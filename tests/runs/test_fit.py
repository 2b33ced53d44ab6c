"""The saturating curve of `verl-krpo curves --fit`."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as some
from typer.testing import CliRunner

from verl_krpo.cli import app
from verl_krpo.runs.fit import Fit, fit, over_seeds, saturating

CURVE = Fit(ceiling=0.8, speed=1.7, midpoint=30.0)


def accuracy(curve, start=0.3, steps=range(10, 101, 10), noise=0.0, seed=0):
    steps = np.array(steps, dtype=float)
    values = saturating(steps, start, *curve) + noise * np.random.default_rng(seed).normal(size=len(steps))
    return {0: start} | {int(step): float(value) for step, value in zip(steps, values, strict=True)}


@given(some.floats(0.5, 0.95), some.floats(0.8, 3.0), some.floats(10, 60))
def test_a_curve_without_noise_is_found(ceiling, speed, midpoint):
    assert fit(accuracy((ceiling, speed, midpoint))) == pytest.approx((ceiling, speed, midpoint), rel=1e-3)


def test_half_of_the_way_is_done_at_the_midpoint():
    assert saturating(np.array([30.0]), 0.3, *CURVE) == pytest.approx(0.55)


def test_steps_count_from_the_first_accuracy():
    later = {step + 40: value for step, value in accuracy(CURVE).items()}
    assert fit(later) == pytest.approx(CURVE, rel=1e-3)


def test_the_interval_holds_the_truth_and_one_run_has_none():
    mean, half = over_seeds([fit(accuracy(CURVE, noise=0.003, seed=seed)) for seed in range(20)])
    assert all(abs(m - truth) < 2 * h for m, truth, h in zip(mean, CURVE, half, strict=True))
    assert 0 < half.ceiling < 0.02 and 0 < half.midpoint < 3
    assert over_seeds([CURVE])[0] == CURVE and all(map(math.isnan, over_seeds([CURVE])[1]))


def test_too_few_points_or_no_bend_is_an_error():
    with pytest.raises(ValueError, match="5 accuracies: a curve needs one and 5 more.*trainer.test_freq"):
        fit(accuracy(CURVE, steps=range(10, 50, 10)))
    with pytest.raises(ValueError, match="ceiling cannot be told yet"):
        fit({0: 0.3} | {step: 0.3 + step / 1000 for step in range(10, 101, 10)})


def test_a_fit_that_does_not_converge_is_one_line_of_the_table(monkeypatch, capsys):
    from verl_krpo.runs import curves

    def never(*args, **kwargs):
        raise RuntimeError("Optimal parameters not found")

    monkeypatch.setattr("scipy.optimize.curve_fit", never)
    curves.table_of_fits([curves.Run("krpo_seed1", Path("krpo_seed1"), {}, {}, accuracy(CURVE))])
    assert "no fit, Optimal parameters not found" in " ".join(capsys.readouterr().out.split())


def test_on_the_command_line(tmp_path):
    folders = []
    for seed in (1, 2, 3):
        folder = tmp_path / f"krpo_seed{seed}"
        folder.mkdir()
        rows = accuracy(CURVE, noise=0.002, seed=seed) if seed < 3 else {0: 0.3, 10: 0.4}
        lines = [{"step": step, "data": {"val-core/sums/acc/mean@1": value}} for step, value in rows.items()]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        folders.append(str(folder))
    done = CliRunner().invoke(app, ["curves", "--fit", "--out", str(tmp_path / "reward"), *folders])
    assert done.exit_code == 0, done.output
    row = next(line for line in done.output.splitlines() if line.startswith("krpo ") and "2" in line and "0.8" in line)
    assert "±" in row
    assert "krpo_seed3: no fit, 2 accuracies: a curve needs" in " ".join(done.output.split())
