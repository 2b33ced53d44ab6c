"""Choosing prompts and numbers of responses: against a Beta law's moments, exact enumeration and brute force."""

import itertools

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from verl_krpo import choice

SIGNALS = st.lists(st.sampled_from([0.0, 1e-9, 0.01, 0.1, 0.16, 0.2499, 0.25]), min_size=1, max_size=8).map(np.array)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_a_signal_is_the_variance_of_a_reward_of_two_values():
    p = np.array([0.0, 0.2, 0.5, 1.0])
    for low, high in ((0.0, 1.0), (-1.0, 1.0), (2.0, 2.0)):
        mean = low + p * (high - low)
        var = p * (high - mean) ** 2 + (1 - p) * (low - mean) ** 2
        np.testing.assert_allclose(choice.signal(mean, low, high), var, atol=1e-15)
    assert (choice.signal(np.array([-3.0, 7.0]), 0.0, 1.0) == 0).all()  # forecasts beyond what rewards can be


def beta(mean, std, low, high) -> tuple[mpmath.mpf, mpmath.mpf]:
    """The Beta law on [low, high] with this mean and standard deviation, from its definition."""
    share, var = mpmath.mpf((mean - low) / (high - low)), mpmath.mpf(std / (high - low)) ** 2
    worth = share * (1 - share) / var - 1
    return share * worth, (1 - share) * worth


@pytest.mark.parametrize("low, high", [(0.0, 1.0), (-1.0, 1.0)])
@pytest.mark.parametrize("share, spread", [(0.02, 0.1), (0.5, 0.3), (0.5, 0.99), (0.99, 0.5)])
def test_expected_signal_and_the_chance_of_a_dead_group_are_the_moments_of_beta(share, spread, low, high):
    width = high - low
    mean, std = low + share * width, spread * width * (share * (1 - share)) ** 0.5
    with mpmath.workdps(30):
        a, b = beta(mean, std, low, high)
        signal = width**2 * a * b / mpmath.rf(a + b, 2)
        alike = (mpmath.rf(a, 3) + mpmath.rf(b, 3)) / mpmath.rf(a + b, 3)
    law = np.array([mean]), np.array([std]), low, high
    assert choice.expected(*law)[0] == pytest.approx(float(signal), rel=1e-9)
    assert choice.dead(*law, np.array([3]))[0] == pytest.approx(float(alike), rel=1e-9)


def test_the_mean_signal_of_draws_is_the_expected_one():
    mean, std = np.array([0.1, 0.5, 0.9, 0.5]).repeat(50_000), np.array([0.2, 0.1, 0.0, 0.4]).repeat(50_000)
    drawn = choice.draw(mean, std, 0.0, 1.0, rng()).reshape(4, -1)
    error = drawn.mean(axis=1) - choice.expected(mean, std, 0.0, 1.0).reshape(4, -1)[:, 0]
    assert (np.abs(error) <= 5 * drawn.std(axis=1) / np.sqrt(50_000) + 1e-15).all()


def test_where_all_rewards_were_alike_nothing_has_a_signal():
    law = np.full(3, 0.5), np.zeros(3), 0.5, 0.5
    assert (choice.draw(*law, rng()) == 0).all() and (choice.expected(*law) == 0).all()


@given(SIGNALS, st.data())
def test_the_largest_signals_are_chosen(signals, data):
    count = data.draw(st.integers(0, len(signals)))
    chosen = choice.choose(signals, count, rng())
    assert len(set(chosen)) == count and (np.diff(chosen) > 0).all()
    left = np.delete(signals, chosen)
    assert not count or not len(left) or signals[chosen].min() >= left.max()


def test_equal_signals_are_chosen_at_random():
    signals, generator = np.array([0.1, 0.2, 0.1, 0.1]), rng()
    times = sum(np.isin(np.arange(4), choice.choose(signals, 2, generator)) for _ in range(3000))
    assert times[1] == 3000 and np.abs(times[[0, 2, 3]] - 1000).max() < 5 * np.sqrt(3000 * 2 / 9)


@given(SIGNALS, st.data())
def test_inclusion_probabilities(signals, data):
    count = data.draw(st.integers(0, len(signals)))
    pi = choice.inclusion(signals, count)
    assert pi.sum() == pytest.approx(count, abs=1e-12) and (pi <= 1).all() and (pi >= 0).all()
    root = np.sqrt(signals)
    size = (1 - choice.FLOOR) * root / root.mean() + choice.FLOOR if root.any() else np.ones(len(root))
    open_ = pi < 1
    if open_.any() and count:
        ratio = (pi / size)[open_]
        assert ratio.max() <= ratio.min() * (1 + 1e-9)
        assert (ratio.max() * size[~open_] >= 1 - 1e-6).all()  # certain ones would get at least 1
        assert (count / len(pi) / pi <= 1 / choice.FLOOR * (1 + 1e-9)).all()


def test_inclusion_makes_the_variance_least(monkeypatch):
    monkeypatch.setattr(choice, "FLOOR", 0.0)
    signals = np.array([0.25, 0.2, 0.05, 0.01, 0.003])
    best = minimize(
        lambda pi: (signals / pi).sum(),
        np.full(5, 0.4),
        bounds=[(1e-4, 1)] * 5,
        constraints={"type": "eq", "fun": lambda pi: pi.sum() - 2},
        options={"ftol": 1e-14, "maxiter": 500},
    )
    ours = choice.inclusion(signals, 2)
    assert (signals / ours).sum() <= best.fun + 1e-9
    np.testing.assert_allclose(ours, best.x, atol=1e-3)


def every_start(pi: np.ndarray, order: np.ndarray):
    """(length, candidates taken) of the intervals of `start` between which what is taken changes."""
    ends = pi[order][pi[order] < 1].cumsum() % 1
    edges = np.unique(np.concatenate([[0.0, 1.0], ends]))
    for low, high in itertools.pairwise(edges):
        if high - low > 1e-12:
            yield high - low, choice.systematic(pi, order, (low + high) / 2)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.0, 0.01, 0.1, 0.2, 0.25]), min_size=2, max_size=5).map(np.array), st.data())
def test_prompts_are_included_with_their_probability_and_weighted_sums_are_without_bias(signals, data):
    count = data.draw(st.integers(1, len(signals)))
    pi, value = choice.inclusion(signals, count), rng(1).normal(size=len(signals))
    orders = list(itertools.permutations(range(len(signals))))
    taken, mean = np.zeros(len(signals)), 0.0
    for order in orders:
        for length, chosen in every_start(pi, np.array(order)):
            assert len(set(chosen)) == len(chosen) == count
            taken[chosen] += length / len(orders)
            weights = count / (len(pi) * pi[chosen])
            mean += length / len(orders) * (weights * value[chosen]).mean()
    np.testing.assert_allclose(taken, pi, atol=1e-12)
    assert mean == pytest.approx(value.mean(), abs=1e-12)


def test_including_a_large_pool():
    signals = rng(2).uniform(0, 0.25, 4096) * (rng(3).random(4096) < 0.5)
    chosen, weights = choice.include(signals, 1024, rng())
    assert len(set(chosen)) == len(weights) == 1024
    np.testing.assert_array_equal(weights, 1024 / 4096 / choice.inclusion(signals, 1024)[chosen])
    assert 0 < choice.effective_size(weights) < 1024
    everyone, weights = choice.include(signals, 4096, rng())
    assert (everyone == np.arange(4096)).all() and (weights == 1).all()


def test_effective_size():
    assert choice.effective_size(np.full(7, 3.0)) == pytest.approx(7)
    assert choice.effective_size(np.array([5.0, 0.0, 0.0])) == 1


@settings(deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-9, 0.01, 0.1, 0.17, 0.25]), min_size=1, max_size=4).map(np.array), st.data())
def test_no_split_has_less_variance(signals, data):
    least, more = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 7))
    total = least * len(signals) + more
    counts = choice.allocate(signals, total, least)
    assert counts.sum() == total and (counts >= least).all()
    splits = (
        np.array(split)
        for split in itertools.product(range(least, least + more + 1), repeat=len(signals))
        if sum(split) == total
    )
    assert (signals / counts).sum() <= min((signals / split).sum() for split in splits) + 1e-15


def test_equal_signals_get_equal_numbers():
    for signal in (0.0, 0.2):
        assert (choice.allocate(np.full(6, signal), 24) == 4).all()
    assert sorted(choice.allocate(np.zeros(4), 10)) == [2, 2, 3, 3]


def test_what_cannot_be_done_is_named():
    with pytest.raises(ValueError, match="5 of 3 candidates"):
        choice.choose(np.ones(3), 5, rng())
    with pytest.raises(ValueError, match="candidate 1 is nan"):
        choice.include(np.array([0.1, np.nan]), 1, rng())
    with pytest.raises(ValueError, match="candidate 0 is -0.1"):
        choice.allocate(np.array([-0.1]), 4)
    with pytest.raises(ValueError, match="5 responses for 3 prompts, at least 2"):
        choice.allocate(np.ones(3), 5, 2)
