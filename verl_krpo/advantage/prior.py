"""Measurement noise and prior of the groups of a batch: given numbers, or estimated from the other groups.

    r_gj = theta_g + v_gj,   v_gj ~ (0, R),   theta_g ~ (m0, P0)        group g, member j

Empirical Bayes by the method of moments (one-way analysis of variance, unbalanced: Searle, Casella and McCulloch 1992,
section 3.6; as a baseline it is the credibility estimator of Buhlmann 1967, the best linear one for any distribution
of the rewards). Each estimate leaves out the very group it is used for, so that a baseline stays independent of the
reward it is subtracted from. With sums over the other groups h, N = sum n_h, mean_h the mean of a group:

    R    sum_hj (r_hj - mean_h)^2 / (N - groups)
    m0   sum_h n_h mean_h / N
    P0   max(0, (sum_h n_h (mean_h - m0)^2 - (groups - 1) R) / (N - sum n_h^2 / N))
         and with a given m0    max(0, (sum_h n_h (mean_h - m0)^2 - groups R) / N)

What divides needs no such independence, must not be small just because this group's rewards are the first that differ
(one success in a batch would count a hundredfold), and should fluctuate little from batch to batch. So scales take R
over all groups, this one included, as if SHRINKAGE more rewards had been seen that vary as all of the batch do:

    (sum_hj (r_hj - mean_h)^2 + SHRINKAGE var(r)) / (N - groups + SHRINKAGE)

Where there is nothing to estimate from:

    R    is 1e-2, the published value, if no group (or no other group) has a spread
    P0   is inf (nothing to shrink towards: `posterior` is the group's mean, `leave_one_out` RLOO) with fewer than two
         other groups; with none, also where only m0 was asked for
"""

from typing import NamedTuple

import torch

from verl_krpo.advantage.groups import Groups
from verl_krpo.config import BATCH, KrpoConfig

Number = float | torch.Tensor
PUBLISHED_MEASUREMENT_VAR = KrpoConfig.measurement_var
SHRINKAGE = 8  # rewards: without them small batches lose up to 3 % of RLOO's signal, with them less than 1 %


class Prior(NamedTuple):
    """Numbers, or (groups,) float64 tensors where estimated."""

    measurement_var: Number  # R for the filter
    init_mean: Number
    init_var: Number
    noise_var: Number  # R for scales: a number, or (1,) where estimated


def prior_of(values: torch.Tensor, groups: Groups, settings: KrpoConfig) -> Prior:
    """The settings' numbers, with `batch` replaced by estimates. values: rewards (groups, width), float64."""
    measurement_var, init_mean, init_var = settings.measurement_var, settings.init_mean, settings.init_var
    if BATCH not in (measurement_var, init_mean, init_var):
        return Prior(measurement_var, init_mean, init_var, measurement_var)
    if not len(values):
        return Prior(PUBLISHED_MEASUREMENT_VAR, 0.0, 0.0, PUBLISHED_MEASUREMENT_VAR)

    # From the first reward on, so that rewards that are all equal give exact zeros.
    origin = values[0, 0]
    sizes = groups.sizes.to(values.dtype)
    values = values - origin if groups.mask is None else (values - origin) * groups.mask
    means = values.sum(dim=1) / sizes
    spread = (values - means[:, None]).square_()
    within = (spread if groups.mask is None else spread * groups.mask).sum(dim=1)
    # Deviations from the mean of all groups keep sums of squares from cancelling.
    grand = (sizes * means).sum() / sizes.sum()
    centered = means - grand
    offset = centered if init_mean == BATCH else means + (origin - init_mean)

    count = len(sizes) - 1  # other groups
    terms = sizes, within, sizes * centered, sizes * offset.square(), sizes.square()
    total, others_within, shift, between, squares = _others(torch.stack(terms))
    noise_var = measurement_var
    if measurement_var == BATCH:
        measurement_var = _variance(others_within, total - count)
        number = sizes.sum(dim=0, keepdim=True)
        variance = (within.sum() + (sizes * centered.square()).sum()) / (number - 1).clamp(min=1)
        noise_var = _variance(within.sum() + SHRINKAGE * variance, number - len(sizes) + SHRINKAGE)
    if init_var == BATCH:
        if count < 2:
            init_var = float("inf")
        elif init_mean == BATCH:
            between = between - shift.square() / total - (count - 1) * measurement_var
            init_var = (between / (total - squares / total)).clamp(min=0)
        else:
            init_var = ((between - count * measurement_var) / total).clamp(min=0)
    if init_mean == BATCH:
        init_mean = grand + shift / total.clamp(min=1) + origin
        if count == 0:
            init_var = float("inf")
    return Prior(measurement_var, init_mean, init_var, noise_var)


def _variance(squares: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    return torch.where(squares > 0, squares / degrees.clamp(min=1), PUBLISHED_MEASUREMENT_VAR)


def _others(values: torch.Tensor) -> torch.Tensor:
    """For every entry of (..., groups) the sum of the others, without subtracting: nothing cancels, zeros stay zero."""
    before = torch.nn.functional.pad(values.cumsum(-1), (1, -1))
    after = torch.nn.functional.pad(values.flip(-1).cumsum(-1), (1, -1)).flip(-1)
    return before + after
