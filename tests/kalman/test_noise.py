"""The moment estimate against data whose Q and R are known, and against its own definition."""

import pytest
import torch

from verl_krpo.kalman.noise import by_differences


def simulate(rows, time, q_var, r_var, seed=0):
    make = torch.Generator().manual_seed(seed)
    level = q_var**0.5 * torch.randn(rows, time, generator=make, dtype=torch.float64)
    return level.cumsum(dim=1) + r_var**0.5 * torch.randn(rows, time, generator=make, dtype=torch.float64)


@pytest.mark.parametrize("q_var, r_var", [(1e-2, 1.0), (0.3, 1.0), (1e-5, 1e-4)])
def test_finds_the_parameters_of_a_simulation(q_var, r_var):
    observations = simulate(400, 2000, q_var, r_var)
    mask = torch.rand(400, 2000, generator=torch.Generator().manual_seed(1)) > 0.2
    observations[~mask] = float("nan")
    process_var, measurement_var = by_differences(observations, mask)
    assert measurement_var == pytest.approx(r_var, rel=0.02)
    assert process_var == pytest.approx(q_var, rel=0.05, abs=0.006 * r_var)


def test_is_the_moments_of_neighbours():
    observations = torch.tensor([[1.0, 3.0, 0.0, 9.0, 4.0], [2.0, 2.5, 1.0, 7.0, 7.0]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 1], [1, 1, 1, 0, 0]], dtype=torch.bool)
    # d: 2, -3 and 0.5, -1.5; column 4 has no observed neighbor.
    variance, covariance = (4 + 9 + 0.25 + 2.25) / 4, (-6 - 0.75) / 2
    ratio = (variance + 2 * covariance) / -covariance
    assert ratio < 0  # so the bound holds, and R explains the variance
    noise = by_differences(observations, mask, smallest_ratio=0.5)
    assert noise == pytest.approx((0.5 * variance / 2.5, variance / 2.5))


@pytest.mark.parametrize("smallest", [1e-6, 0.2])
def test_bounds(smallest):
    for observations in (simulate(50, 300, 0.0, 1.0), simulate(50, 300, 1.0, 0.0)):
        mask = torch.ones_like(observations, dtype=torch.bool)
        process_var, measurement_var = by_differences(observations, mask, smallest_ratio=smallest)
        assert smallest <= process_var / measurement_var * (1 + 1e-12)
        assert process_var / measurement_var <= 1 + 1e-12


@pytest.mark.parametrize("shape", [(3, 0), (3, 1), (0, 5), (3, 8)])
def test_nothing_to_measure(shape):
    assert by_differences(torch.full(shape, 0.7), torch.ones(shape, dtype=torch.bool)) is None
    assert by_differences(torch.randn(shape), torch.zeros(shape, dtype=torch.bool)) is None
