import itertools
import math

import mpmath
import pytest
import torch

from verl_krpo.kalman import local_level

RATIOS = [0.0, 1e-14, 1.2e-7, 1e-6, 1e-4, 1e-2, 1.0, 37.0, 1e6]  # Q/R
PRIORS = [0.0, 1e-6, 1e-2, 1.0, 1e6]  # P0/R
STEPS = [1, 2, 3, 10, 1000, 8191, 8192, 131_072, 2**20]


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


def test_gains_to_a_million_steps_against_50_digits():
    worst = 0.0
    for ratio, prior in itertools.product(RATIOS, PRIORS):
        gain = local_level.schedule(2**20, ratio, 1.0, prior).gain
        worst = max(worst, *(relative_error(gain[t - 1].item(), gain_50_digits(ratio, prior, t)) for t in STEPS))
        local_level._scalar_schedule.cache_clear()  # 24 MiB each
    print(f"\nworst relative error of a gain: {worst:.2e}")
    assert worst <= 1e-12


@pytest.mark.parametrize("scale", [1e-12, 1e-2, 1e9])
def test_one_minus_gain_and_variances_against_50_digits(scale):
    worst = 0.0
    for ratio, prior in itertools.product(RATIOS, PRIORS):
        variances = [torch.tensor(v * scale, dtype=torch.float64) for v in (ratio, 1.0, prior)]
        gain, keep, predicted = local_level.window(0, 3000, *variances)
        for t in (1, 2, 3, 100, 3000):
            with mpmath.workdps(50):
                q, p, r = (mpmath.mpf(v.item()) for v in (variances[0], variances[2], variances[1]))
                exact = gain_50_digits(q / r, p / r, t)
                before = p if t == 1 else r * gain_50_digits(q / r, p / r, t - 1)
                pairs = ((gain, exact), (keep, 1 - exact), (predicted, before + q))
                worst = max(worst, *(relative_error(a[t - 1].item(), b) for a, b in pairs))
    assert worst <= 1e-12


def test_windows_are_parts_of_one_schedule():
    variances = [torch.tensor(v, dtype=torch.float64) for v in (1e-6, 1.0, 0.5)]
    whole = local_level.window(0, 1000, *variances)
    for part, all_steps in zip(local_level.window(700, 1000, *variances), whole, strict=True):
        assert torch.equal(part, all_steps[700:])


def test_diffuse_limit():
    gain, filtered_var, predicted_var = local_level.schedule(5, 0.0, 2.0, math.inf)
    i = torch.arange(1, 6, dtype=torch.float64)
    torch.testing.assert_close(gain, 1 / i, rtol=1e-15, atol=0)  # the running mean
    torch.testing.assert_close(filtered_var, 2 / i, rtol=1e-15, atol=0)
    assert predicted_var[0] == math.inf and torch.equal(predicted_var[1:], filtered_var[:-1])
    drifting = local_level.schedule(5, 3.0, 2.0, math.inf)
    assert drifting.gain[0] == 1 and drifting.predicted_var[1] == 2 + 3
    huge = local_level.schedule(5, 3.0, 2.0, 1e40)
    torch.testing.assert_close(drifting.gain, huge.gain, rtol=1e-15, atol=0)


def test_limits_of_zero_variances():
    assert local_level.schedule(4, 0.0, 1.0, 0.0).gain.tolist() == [0, 0, 0, 0]  # known and still
    assert local_level.schedule(4, 1.0, 0.0, 0.0).gain.tolist() == [1, 1, 1, 1]  # observed without noise
    assert local_level.schedule(4, 0.0, 0.0, 7.0).gain.tolist() == [1, 0, 0, 0]  # known after one observation
    assert local_level.schedule(4, 0.0, 0.0, 0.0).gain.tolist() == [0, 0, 0, 0]
    exact = local_level.schedule(3, 0.5, 0.0, 7.0)
    assert exact.predicted_var.tolist() == [7.5, 0.5, 0.5] and exact.filtered_var.tolist() == [0, 0, 0]


def test_extreme_variances_stay_finite():
    for q, r, p in itertools.product([0.0, 1e-300, 1e-30, 1e30, 1e300], [1e-300, 1.0, 1e300], [0.0, 1e-300, 1e300]):
        schedule = local_level.schedule(50, q, r, p)
        assert not any(part.isnan().any() for part in schedule)
        assert ((schedule.gain >= 0) & (schedule.gain <= 1)).all()


def test_rows_have_their_own_parameters():
    q, r, p = (
        torch.tensor(v, dtype=torch.float64)
        for v in ([0.0, 1e-5, 2.0, 0.0], [1.0, 1e-2, 0.0, 1.0], [1.0, math.inf, 0.0, 0.0])
    )
    rows = local_level.schedule(20, q, r, p)
    for row in range(4):
        single = local_level.schedule(20, q[row].item(), r[row].item(), p[row].item())
        for part, expected in zip(rows, single, strict=True):
            assert torch.equal(part[row], expected)
    assert local_level.schedule(20, 1e-5, r, 1.0).gain.shape == (4, 20)
    assert local_level.schedule(0, 1e-5, 1.0, 1.0).gain.shape == (0,)


@pytest.mark.parametrize("ratio", [1e-14, 1e-6, 1e-2, 1.0, 1e6])
def test_steady_gain_is_the_limit(ratio):
    with mpmath.workdps(50):
        q = mpmath.mpf(ratio)
        exact = (mpmath.sqrt(q * q + 4 * q) - q) / 2
        assert relative_error(local_level.steady_gain(ratio * 4, 4.0), exact) <= 1e-14


def test_steady_gain_without_noise():
    assert local_level.steady_gain(0.0, 1.0) == local_level.steady_gain(0.0, 0.0) == 0.0
    assert local_level.steady_gain(1.0, 0.0) == 1.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("process_var", -1.0),
        ("process_var", math.nan),
        ("process_var", math.inf),
        ("measurement_var", -0.25),
        ("measurement_var", math.inf),
        ("init_var", -2.0),
        ("init_var", math.nan),
    ],
)
def test_bad_variances_are_named(name, value, dtype):
    good = {"process_var": 1.0, "measurement_var": 1.0, "init_var": 1.0}
    with pytest.raises(ValueError, match=f"{name}={value}"):
        local_level.schedule(3, **{**good, name: value})
    with pytest.raises(ValueError, match=f"{name}={value} in row 1"):
        local_level.schedule(3, **{**good, name: torch.tensor([1.0, value, 1.0], dtype=dtype)})
