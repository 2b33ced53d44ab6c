"""Gains against 50-digit arithmetic; the filtered mean of long rows against the filter of short ones."""

import itertools
import math

import mpmath
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference.local_level import sequential

from verl_krpo.kalman import LocalLevel, filtered, filtered_mean, gains, steady_gain

RATIOS = [0.0, 1e-14, 1.2e-7, 1e-6, 1e-4, 1e-2, 1.0, 37.0, 1e6]  # Q/R
PRIORS = [0.0, 1e-6, 1e-2, 1.0, 1e6]  # P0/R
STEPS = [1, 2, 3, 10, 1000, 8191, 8192, 131_072]


def gain_50_digits(ratio: float, prior: float, step: int) -> mpmath.mpf:
    """K_t by the Moebius map K -> (K + q) / (K + q + 1), its matrix raised to the t-th power; all terms positive."""
    with mpmath.workdps(50):
        q, p = mpmath.mpf(ratio), mpmath.mpf(prior)
        (a, b), (c, d) = (mpmath.mpf(1), mpmath.mpf(0)), (mpmath.mpf(0), mpmath.mpf(1))
        (e, f), (g, h) = (mpmath.mpf(1), q), (mpmath.mpf(1), 1 + q)
        while step:
            if step & 1:
                a, b, c, d = a * e + b * g, a * f + b * h, c * e + d * g, c * f + d * h
            e, f, g, h = e * e + f * g, e * f + f * h, g * e + h * g, g * f + h * h
            step >>= 1
        return (a * p + b) / (c * p + d)


def relative_error(value: float, exact: mpmath.mpf) -> float:
    return float(abs(value - exact) / exact) if exact else float(abs(value))


def test_gains_against_50_digits():
    worst = 0.0
    for ratio, prior in itertools.product(RATIOS, PRIORS):
        gain = gains(LocalLevel(ratio, 1.0, 0.0, prior), STEPS[-1])
        worst = max(worst, *(relative_error(gain[t - 1].item(), gain_50_digits(ratio, prior, t)) for t in STEPS))
    gains.cache_clear()
    print(f"\nworst relative error of a gain: {worst:.2e}")
    assert worst <= 1e-10


def test_gains_at_their_limits():
    i = torch.arange(1, 6, dtype=torch.float64)
    torch.testing.assert_close(gains(LocalLevel(0.0, 2.0, 0.0, math.inf), 5), 1 / i, rtol=1e-15, atol=0)
    assert gains(LocalLevel(0.0, 1.0), 4).tolist() == [0, 0, 0, 0]  # known and still
    assert gains(LocalLevel(3.0, 2.0, 0.0, math.inf), 1).tolist() == [1.0]
    for q, r, p in itertools.product([0.0, 1e-300, 1e300], [1e-300, 1.0, 1e300], [0.0, 1e-300, 1e300, math.inf]):
        gain = gains(LocalLevel(q, r, 0.0, p), 20)
        assert ((gain >= 0) & (gain <= 1)).all()


@pytest.mark.parametrize("ratio", [1e-14, 1e-6, 1e-2, 1.0, 1e6])
def test_steady_gain_is_the_limit(ratio):
    with mpmath.workdps(50):
        q = mpmath.mpf(ratio)
        exact = (mpmath.sqrt(q * q + 4 * q) - q) / 2
        assert relative_error(steady_gain(LocalLevel(ratio * 4, 4.0)), exact) <= 1e-14
    assert steady_gain(LocalLevel(0.0, 1.0)) == 0.0


def masked(kind, rows, time):
    make = torch.Generator().manual_seed(time)
    at = torch.arange(time)
    length = torch.randint(time // 3, time + 1, (rows, 1), generator=make)
    return {
        "none": None,
        "right": at < length,
        "left": at >= time - length,
        "holes": torch.rand(rows, time, generator=make) > 0.2,
        "nothing": torch.zeros(rows, time, dtype=torch.bool),
    }[kind]


def worst_error(result, expected):
    """Against the largest state of a row."""
    error = (result - expected).abs().amax(dim=1) / expected.abs().amax(dim=1).clamp(min=1e-300)
    return error.max().item()


@settings(max_examples=60)
@given(
    seed=st.integers(0, 2**31),
    rows=st.integers(1, 4),
    time=st.sampled_from([1, 2, 3, 31, 300]),
    kind=st.sampled_from(["none", "right", "left", "holes", "nothing"]),
    q=st.sampled_from([0.0, 1e-14, 1e-5, 0.1, 1.0, 1e6]),
    p=st.sampled_from([0.0, 1e-3, 1.0, 1e6, math.inf]),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    mask_dtype=st.sampled_from([torch.bool, torch.int64, torch.float32, torch.bfloat16]),
)
def test_both_filters_agree(seed, rows, time, kind, q, p, dtype, mask_dtype):
    mask = masked(kind, rows, time)
    z = torch.randn(rows, time, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    z = z if mask is None else torch.where(mask, z, math.nan)
    model = LocalLevel(q, 0.7, 0.25, p)
    result = filtered_mean(z, None if mask is None else mask.to(mask_dtype), model)
    assert result.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert worst_error(result.double(), filtered(z, mask, model).mean) <= (1e-11 if dtype == torch.float64 else 1.5e-7)


@pytest.mark.parametrize("kind", ["none", "holes"])
@pytest.mark.parametrize("q", [1e-6, 0.1])
def test_steady_gain_everywhere(kind, q):
    mask = masked(kind, 3, 400)
    z = torch.randn(3, 400, dtype=torch.float64)
    expected, _, _ = sequential(z, mask, q, 1.0, 0.4, steady=True)
    assert worst_error(filtered_mean(z, mask, LocalLevel(q, 1.0, 0.4), "steady"), expected) <= 1e-12


@pytest.mark.parametrize("q", [0.0, 1e-9, 1e-6, 1e-4, 1e-2, 1.0])
@pytest.mark.parametrize("kind, dtype", [("right", torch.float32), ("left", torch.float32), ("holes", torch.bfloat16)])
def test_nine_thousand_tokens(q, kind, dtype):
    mask, model = masked(kind, 2, 9001), LocalLevel(q, 1.0)
    z = (0.1 * torch.randn(2, 9001, generator=torch.Generator().manual_seed(2))).to(dtype)
    z = torch.where(mask, z, math.nan)
    assert worst_error(filtered_mean(z, mask, model).double(), filtered(z, mask, model).mean) <= 5e-7


def test_very_long_rows():
    """131,072 tokens, without a mask and with holes: the state's error against one walk through all of them."""
    ratios, time = [0.0, 1e-9, 1e-6, 1e-4, 1e-2, 1.0], 131_072
    make = torch.Generator().manual_seed(1)
    noise = torch.randn(time, generator=make)
    alternating = torch.ones(time)
    alternating[1::2] = -1  # the state is far smaller than the observations
    z = torch.stack([noise, alternating, noise.cumsum(0) * 1e-2])
    holes = torch.rand(3, time, generator=make) > 0.3
    cases = [(q, mask) for q in ratios for mask in (None, holes)]
    everything = torch.ones_like(holes)
    exact = filtered(
        z.repeat(len(cases), 1),
        torch.cat([everything if mask is None else mask for _, mask in cases]),
        LocalLevel(torch.tensor([q for q, _ in cases]).double().repeat_interleave(len(z)), 1.0),
    ).mean.split(len(z))
    for (q, mask), expected in zip(cases, exact, strict=True):
        rows = z if mask is None else torch.where(mask, z, math.nan)
        result = filtered_mean(rows, mask, LocalLevel(q, 1.0))
        assert result.dtype == torch.float32
        assert (result == 0).all() if q == 0 else worst_error(result, expected) <= 5e-7
