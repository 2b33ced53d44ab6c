"""The saturated filter against one that walks token by token in Python floats."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.local_level import sequential

from verl_krpo.kalman import LocalLevel, filtered_mean, saturated


def compare(observations, mask, q_var, kappa, **rest):
    gain = "steady" if rest.get("steady") else "scheduled"
    model = LocalLevel(q_var, 1.0, rest.get("init_mean", 0.0), rest.get("init_var", 0.0))
    mean, hit = saturated.filtered_mean(observations, mask, model, kappa, gain)
    expected, _, sides = sequential(observations, mask, q_var, 1.0, kappa=kappa, **rest)
    tolerance = 5e-7 if mean.dtype == torch.float32 else 1e-12
    largest = expected.abs().amax(dim=1, keepdim=True)
    assert ((mean.double() - expected).abs() <= tolerance * largest + 1e-300).all()
    return hit, sides


def outliers(rows, time, seed):
    make = torch.Generator().manual_seed(seed)
    noise = torch.randn(rows, time, generator=make, dtype=torch.float64)
    return noise / torch.rand(rows, time, generator=make, dtype=torch.float64).clamp(min=1e-2)


@pytest.mark.parametrize("q_var", [1e-9, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("kappa", [0.1, 1.0, 3.0])
@pytest.mark.parametrize("steady", [False, True])
def test_equals_the_walk(q_var, kappa, steady):
    observations = outliers(3, 2500, seed=1)
    mask = torch.rand(3, 2500, generator=torch.Generator().manual_seed(2)) > 0.2
    observations[~mask] = float("nan")
    hit, sides = compare(observations, mask, q_var, kappa, steady=steady)
    assert torch.equal(hit, sides != 0)
    assert hit.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_any_dtype_in_float32_out(dtype):
    observations = outliers(2, 300, seed=3).to(dtype)
    compare(observations, torch.ones(2, 300, dtype=torch.bool), 1e-2, 1.5)


def test_prior():
    observations = outliers(2, 60, seed=4)
    compare(observations, torch.ones(2, 60, dtype=torch.bool), 1e-2, 1.5, init_mean=3.0, init_var=2.0)


@pytest.mark.parametrize(
    "name, observations",
    [
        ("alternating far beyond the bound", 100.0 * torch.tensor([1.0, -1.0] * 700, dtype=torch.float64)),
        ("a step that takes hundreds of tokens to climb", torch.cat([torch.zeros(50), torch.full((900,), 300.0)])),
        ("a ramp faster than the state may move", torch.arange(1200.0) * 3),
        ("growing alternation", torch.tensor([1.0, -1.0]).repeat(600) * torch.arange(1200.0)),
        ("innovations on the bound", torch.tensor([1.0, 2.0, 3.0] * 300) * math.sqrt(2.0)),
    ],
)
@pytest.mark.parametrize("q_var", [1e-6, 1.0, 1e6])
def test_adversarial_sequences(name, observations, q_var):
    observations = observations.double().expand(2, -1) * torch.tensor([[1.0], [0.37]], dtype=torch.float64)
    compare(observations, torch.ones_like(observations, dtype=torch.bool), q_var, 1.0)


@settings(max_examples=150)
@given(
    st.lists(st.tuples(st.floats(-50, 50), st.booleans()), min_size=1, max_size=40),
    st.floats(1e-9, 1e3),
    st.floats(0.01, 5),
    st.integers(1, 45),
)
def test_equals_the_walk_whatever_comes(steps, q_var, kappa, window):
    observations = torch.tensor([[value for value, _ in steps]], dtype=torch.float64)
    mask = torch.tensor([[seen for _, seen in steps]])
    before, saturated.WINDOW = saturated.WINDOW, window
    try:
        compare(observations, mask, q_var, kappa)
    finally:
        saturated.WINDOW = before


def test_a_wide_bound_is_the_plain_filter():
    observations = outliers(3, 700, seed=5).float()
    mask = torch.rand(3, 700) > 0.3
    model = LocalLevel(1e-4, 1.0, 0.0, 1.0)
    mean, hit = saturated.filtered_mean(observations, mask, model, 1e9)
    plain = filtered_mean(observations, mask, model)
    torch.testing.assert_close(mean, plain, rtol=5e-7, atol=5e-7 * plain.abs().max().item())
    assert not hit.any()


def test_an_infinite_observation_moves_the_state_by_its_bound():
    observations = torch.tensor([[0.0, float("inf"), 0.0, float("-inf")]], dtype=torch.float64)
    compare(observations, torch.ones(1, 4, dtype=torch.bool), 0.5, 2.0)


def test_rows_do_not_meet():
    observations = outliers(4, 600, seed=6)
    mask = torch.rand(4, 600) > 0.1
    model = LocalLevel(0.1, 1.0)
    together, _ = saturated.filtered_mean(observations, mask, model, 0.5)
    alone = [saturated.filtered_mean(observations[i : i + 1], mask[i : i + 1], model, 0.5)[0] for i in range(4)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kappa", [0.0, -1.0])
def test_a_bad_clip_is_named(kappa):
    with pytest.raises(ValueError, match=f"innovation_clip={kappa}"):
        saturated.filtered_mean(torch.zeros(1, 3), None, LocalLevel(1.0, 1.0), kappa)
