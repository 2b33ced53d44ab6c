"""The studies in small: their measures against closed forms, their findings, and the files they write."""

import csv
import functools

import numpy as np
import pytest

from verl_krpo.lab.simulate import adaptive, estimator, gain, permutation, sensitivity, simulate
from verl_krpo.report import tables


@pytest.mark.parametrize("law", simulate.LAWS)
def test_a_law_knows_the_mean_and_spread_of_its_rewards(law):
    rewards, truth, std = simulate.draw(law, np.random.default_rng(0), prompts=200, size=5, batches=40)
    assert rewards.shape == (40, 2, 200, 5) and truth.shape == std.shape == (40, 1, 200, 5)
    noise = (rewards - truth) / std
    # Standardised: mean 0 and variance 1 within 5 standard errors (p near 0 or 1 has a heavy-tailed fourth moment).
    assert abs(noise.mean()) < 5 / np.sqrt(noise.size)
    assert noise.var() == pytest.approx(1, abs=5 * (noise**2).std() / np.sqrt(noise.size) + 1e-3)
    assert np.abs((noise[:, 0] * noise[:, 1]).mean()) < 5 / np.sqrt(noise.size / 2)


def test_signal_to_noise_is_the_closed_form():
    """r - theta = +-sigma: g = mean A s has mean rho sigma and variance (1 - rho^2) sigma^2 / N, exactly."""
    noise = 0.5 * np.random.default_rng(1).choice([-1.0, 1.0], (30, 2, 8, 4))
    moments = simulate.Moments.of(noise, np.full_like(noise, 0.5), noise)
    weights = np.full((1, 30), 1 / 30)
    rho, count = simulate.INFORMATIVE, 32
    assert moments.snr("independent", weights) == pytest.approx([rho**2 * count / (1 - rho**2)], rel=1e-9)


def test_estimators_are_what_they_are_called():
    rewards = np.random.default_rng(2).random((7, 6))
    mean = rewards.mean(axis=1, keepdims=True)
    forms = simulate.estimators()
    for name, baseline, scale in (
        ("GRPO", mean, rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6),
        ("Dr.GRPO", mean, 1),
        ("RLOO", (6 * mean - rewards) / 5, 1),
    ):
        found, advantage = forms[name](rewards)
        np.testing.assert_allclose(found, np.broadcast_to(baseline, rewards.shape), rtol=1e-12)
        np.testing.assert_allclose(advantage, (rewards - baseline) / scale, rtol=1e-5, atol=1e-6)


def test_only_the_sequential_forms_depend_on_the_order():
    for row in permutation.measure(permutations=12):
        share = row["spread_of_A"]
        assert row["spread_of_A_low"] <= share <= row["spread_of_A_high"]
        if row["form"].startswith("sequential"):
            assert 0.25 < share < 0.65 and row["spread_of_gradient_norm"] > 0.02
        elif row["form"].endswith("Q = 0"):
            assert share < 1e-6 and row["spread_of_gradient_norm"] < 1e-6
        else:
            assert share < 0.1


@pytest.mark.parametrize(
    ("law", "residual", "snr"), [("uniform", 0.92, 1.08), ("Beta(5,5)", 0.83, 1.18), ("constant .5", 0.77, 1.25)]
)
def test_adaptive_beats_rloo_in_small_groups(law, residual, snr):
    forms = {"RLOO": simulate.with_verl("rloo_vectorized"), "krpo_adaptive": simulate.ours("krpo_adaptive")}
    rloo, found = estimator.cell(law, 64, 4, forms, 150, np.random.default_rng(3))
    assert rloo["residual"] == rloo["snr_independent"] == 1.0
    assert found["residual"] <= residual and found["snr_independent"] >= snr
    assert abs(found["own_share"]) < 0.02


def test_the_published_form_loses_to_rloo():
    rows = estimator.cell("uniform", 64, 8, simulate.estimators(), 30, np.random.default_rng(4))
    published, rloo = (next(row for row in rows if row["estimator"] == name) for name in ("krpo (published)", "RLOO"))
    assert published["snr_independent_high"] < 0.85 and published["mse"] > 1.8 * rloo["mse"]
    assert published["own_share"] > 0.3 and published["first_over_last"] < 0.02


@pytest.fixture
def small(monkeypatch):
    """Every study on few and small batches."""
    for module, settings in (
        (estimator, {"prompts": 8, "sizes": (2, 8), "batches": 3}),
        (sensitivity, {"prompts": 8, "batches": 3}),
        (adaptive, {"sizes": (2, 4), "rewards": 1}),
    ):
        monkeypatch.setattr(module, "measure", functools.partial(module.measure, **settings))
    monkeypatch.setattr(sensitivity, "PROCESS_VARS", (0.0, 1e-5))
    monkeypatch.setattr(sensitivity, "MEASUREMENT_VARS", (1e-2, 1.0))


@pytest.mark.parametrize(
    ("study", "figures"),
    [
        (permutation, ["permutation"]),
        (estimator, ["estimator_baseline", "estimator_snr"]),
        (sensitivity, ["sensitivity"]),
        (adaptive, ["adaptive"]),
    ],
)
def test_a_study_writes_its_figures_and_numbers(small, tmp_path, study, figures):
    text = simulate.run(study, tmp_path, seed=1)
    name = study.__name__.rpartition(".")[2]
    assert {path.name for path in tmp_path.iterdir()} == {f"{name}.csv", *(f"{f}.png" for f in figures)}
    with (tmp_path / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) >= 4 and all(value != "" for row in rows for value in row.values())
    header, rule, *lines = text.splitlines()
    assert len({line.replace(r"\|", "").count("|") for line in (header, rule, *lines)}) == 1 and lines
    assert all((tmp_path / f"{f}.png").stat().st_size > 10_000 for f in figures)


def test_the_gain_of_a_long_response(tmp_path):
    text = gain.run(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"kpo_gain.png"}
    published = next(line for line in text.splitlines() if "published: " in line).split("|")
    # K_1 = Q / (Q + R), and at last the steady gain.
    assert published[2].split()[0] == "1.0e-06" and published[-2].split()[0] == "1.0e-03"


def test_tables_are_markdown():
    assert tables.table(["|a|", "b"], [["1", "22"]]) == "| \\|a\\| | b  |\n| ----- | -- |\n| 1     | 22 |"
