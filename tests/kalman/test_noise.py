import math

import pytest
import torch

from verl_krpo.kalman import filter as kalman
from verl_krpo.kalman import noise


def simulate(seed, batch, time, q, r, m0, p0):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    state = m0 + math.sqrt(p0) * normal(batch, 1) + math.sqrt(q) * normal(batch, time).cumsum(dim=1)
    return state + math.sqrt(r) * normal(batch, time)


def log_likelihood(z, mask, found):
    q, r, m0, p0 = found
    return kalman.log_likelihood(z, mask, process_var=q, measurement_var=r, init_mean=m0, init_var=p0).sum().item()


@pytest.mark.parametrize(
    ("estimate", "rows", "error"), [(noise.by_moments, 4000, 0.1), (noise.by_likelihood, 300, 0.2)]
)
def test_recovers_the_model(estimate, rows, error):
    truth = (0.3, 0.8, 2.0, 1.5)
    found = estimate(simulate(0, rows, 20, *truth))
    assert found == pytest.approx(truth, rel=error)


@pytest.mark.parametrize("truth", [(0.3, 0.8, 2.0, 1.5), (0.0, 0.25, 0.5, 0.05), (0.02, 1.0, 0.0, 0.0)])
def test_the_likelihood_has_its_maximum_there(truth):
    z = simulate(1, 40, 12, *truth)
    mask = torch.rand(z.shape, generator=torch.Generator().manual_seed(2)) > 0.2
    z = torch.where(mask, z, math.nan)
    found = noise.by_likelihood(z, mask)
    most = log_likelihood(z, mask, found)
    assert most >= log_likelihood(z, mask, truth)
    for index in range(4):
        for factor in (0.9, 1.1):
            other = list(found)
            other[index] = other[index] * factor if other[index] else 1e-3
            assert log_likelihood(z, mask, other) <= most + 1e-9


def test_equal_to_the_maximum_of_statsmodels():
    from statsmodels.tsa.statespace.structural import UnobservedComponents

    z = simulate(3, 1, 400, 0.05, 1.0, 0.0, 0.0)
    found = noise.by_likelihood(z)
    # Theirs starts from a diffuse prior: ours, free to choose the prior, ends at a likelihood that is no smaller.
    theirs = UnobservedComponents(z[0].numpy(), "local level").fit(disp=False, method="lbfgs", maxiter=500)
    r, q = theirs.params
    assert found.measurement_var == pytest.approx(r, rel=0.02)
    assert found.process_var == pytest.approx(q, rel=0.05)
    assert log_likelihood(z, None, found) >= log_likelihood(z, None, (q, r, z[0, 0].item(), 0.0))


def test_groups_without_drift_and_without_spread():
    coins = (torch.rand(64, 8, generator=torch.Generator().manual_seed(0)) < 0.5).double()
    found = noise.by_likelihood(coins)
    assert found.process_var + found.init_var <= 0.02
    assert found.measurement_var == pytest.approx(0.25, rel=0.1) and found.init_mean == pytest.approx(0.5, abs=0.05)


def test_what_lies_under_the_mask_is_not_read():
    z = simulate(4, 30, 10, 0.3, 0.8, 2.0, 1.5)
    mask = torch.rand(z.shape, generator=torch.Generator().manual_seed(5)) > 0.3
    for estimate in (noise.by_moments, noise.by_likelihood):
        assert estimate(torch.where(mask, z, math.nan), mask) == estimate(z, mask)


def test_too_little_data_is_an_error():
    for estimate in (noise.by_moments, noise.by_likelihood):
        for z in (torch.zeros(3, 0), torch.zeros(0, 4), torch.zeros(5, 1)):
            with pytest.raises(ValueError, match="no row with two observations"):
                estimate(z)
    with pytest.raises(ValueError, match="observations are all 1.0"):
        noise.by_likelihood(torch.ones(3, 4))
    assert noise.by_moments(torch.ones(3, 4)) == (0.0, 0.0, 1.0, 0.0)
