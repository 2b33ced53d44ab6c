"""`krpo_adaptive` in one file: a prior learned from the other prompts, and the filter without drift in closed form.

    r_gj = theta_g + v_gj,   v_gj ~ (0, R),   theta_g ~ (m0, P0)        group g, member j

The baseline of a member is the state given the other k members of its group (Q = 0), which shrinks their mean towards
the prior mean:

    b    m0 + P0 sum_others (r_j - m0) / (k P0 + R)        V    P0 R / (k P0 + R)        A = (r - b) / sqrt(V + R)

The settings are config.ADAPTIVE, the last step is in krpo.py. R, m0 and P0 are Empirical Bayes by the method of moments
(one-way analysis of variance, unbalanced: Searle, Casella and McCulloch 1992, section 3.6; as a baseline it is the
credibility estimator of Buhlmann 1967, the best linear one for any distribution of the rewards). Each leaves out the
very group it is used for, so that a baseline stays independent of the reward it is subtracted from. With sums over the
other groups h, N = sum n_h, mean_h the mean of a group:

    R    sum_hj (r_hj - mean_h)^2 / (N - groups)
    m0   sum_h n_h mean_h / N
    P0   max(0, (sum_h n_h (mean_h - m0)^2 - (groups - 1) R) / (N - sum n_h^2 / N))
         and with a given m0    max(0, (sum_h n_h (mean_h - m0)^2 - groups R) / N)

What divides needs no such independence, must not be small just because this group's rewards are the first that differ
(one success in a batch would count a hundredfold), and should fluctuate little from batch to batch. So scales take R
over all groups, this one included, as if SCALE_REWARDS more rewards had been observed that vary as all of the batch do:

    (sum_hj (r_hj - mean_h)^2 + SCALE_REWARDS var(r)) / (N - groups + SCALE_REWARDS)

Where there is nothing to estimate from:

    R    is 1e-2, the published value, if no group (or no other group) has a spread
    P0   is inf (nothing to shrink towards: `posterior` is the group's mean, `leave_one_out` RLOO) with fewer than two
         other groups; with none and init_mean=batch, even if init_var is a number
"""

from typing import Any, NamedTuple

import torch

from verl_krpo.advantage.groups import Groups
from verl_krpo.config import BATCH, KrpoConfig
from verl_krpo.kalman import Belief

PUBLISHED_MEASUREMENT_VAR = 1e-2
SCALE_REWARDS = 8  # rewards: without them small batches lose up to 3 % of RLOO's signal, with them less than 1 %


class Prior(NamedTuple):
    """(groups,) float64 tensors."""

    measurement_var: torch.Tensor  # R for the filter
    init_mean: torch.Tensor
    init_var: torch.Tensor
    scale_var: torch.Tensor  # R for scales


def prior_of(values: torch.Tensor, groups: Groups, settings: KrpoConfig) -> Prior:
    """The settings' numbers, with `batch` replaced by estimates. values: rewards (groups, width), float64."""

    def number(value: Any) -> torch.Tensor:
        return torch.as_tensor(value, dtype=torch.float64, device=values.device).expand(len(values))

    measurement_var: Any = settings.measurement_var
    init_mean: Any = settings.init_mean
    init_var: Any = settings.init_var
    if BATCH not in (measurement_var, init_mean, init_var):
        return Prior(*map(number, (measurement_var, init_mean, init_var, measurement_var)))
    if not len(values):
        return Prior(*map(number, (0.0,) * 4))

    # From the first reward on, so that rewards that are all equal give exact zeros.
    origin, sizes = values[0, 0], groups.sizes.double()
    means, within = group_moments(values - origin, groups)
    # Deviations from the mean of all groups keep sums of squares from cancelling.
    grand = (sizes * means).sum() / sizes.sum()
    centered = means - grand
    offset = centered if init_mean == BATCH else means + (origin - init_mean)

    others = len(sizes) - 1  # groups
    total, others_within = sum_of_others(sizes), sum_of_others(within)
    shift, between = sum_of_others(sizes * centered), sum_of_others(sizes * offset.square())
    scale_var = measurement_var
    if measurement_var == BATCH:
        measurement_var = _variance(others_within, total - others)
        spread = (within.sum() + (sizes * centered.square()).sum()) / (sizes.sum() - 1).clamp(min=1)
        scale_var = _variance(within.sum() + SCALE_REWARDS * spread, sizes.sum() - len(sizes) + SCALE_REWARDS)
    if init_var == BATCH and others < 2:
        init_var = float("inf")
    elif init_var == BATCH and init_mean == BATCH:
        between = between - shift.square() / total - (others - 1) * measurement_var
        init_var = (between / (total - sum_of_others(sizes.square()) / total)).clamp(min=0)
    elif init_var == BATCH:
        init_var = ((between - others * measurement_var) / total).clamp(min=0)
    if init_mean == BATCH:
        init_mean = grand + shift / total.clamp(min=1) + origin
        init_var = init_var if others else float("inf")
    return Prior(*map(number, (measurement_var, init_mean, init_var, scale_var)))


def without_drift(deviations: torch.Tensor, groups: Groups, prior: Prior, own: bool) -> Belief:
    """The filter with Q = 0 in one step: the state less m0, given all members (`own`) or all others, (groups, width).

    deviations: r - m0, (groups, width), 0 where there is no member. P0 = inf is the diffuse limit.
    """
    total = deviations.sum(dim=1, keepdim=True)
    count = groups.sizes[:, None].double()
    if not own:
        total, count = total - deviations, count - 1
    precision = count + (prior.measurement_var / prior.init_var)[:, None]  # k + R / P0, 0 if nothing is known
    known = precision > 0
    var = torch.where(known, prior.measurement_var[:, None] / precision, torch.inf)
    mean = torch.where(known, total / precision, 0.0)
    return Belief(mean.expand_as(deviations), var.expand_as(deviations))


def group_moments(values: torch.Tensor, groups: Groups) -> tuple[torch.Tensor, torch.Tensor]:
    """Of values (groups, width) the means and the sums of squares around them, (groups,)."""
    means = (values * groups.mask).sum(dim=1) / groups.sizes
    return means, ((values - means[:, None]).square() * groups.mask).sum(dim=1)


def sum_of_others(values: torch.Tensor) -> torch.Tensor:
    """For every entry of (groups,) the sum of the others, without subtracting: nothing cancels, zeros stay zero."""
    before = torch.nn.functional.pad(values.cumsum(0), (1, -1))
    after = torch.nn.functional.pad(values.flip(0).cumsum(0), (1, -1)).flip(0)
    return before + after


def _variance(squares: torch.Tensor, degrees: torch.Tensor) -> torch.Tensor:
    return torch.where(squares > 0, squares / degrees.clamp(min=1), PUBLISHED_MEASUREMENT_VAR)
