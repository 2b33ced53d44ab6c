"""`krpo_adaptive`, all of it: a prior learned from the other prompts, and the filter without drift in closed form.

    r_gj = theta_g + v_gj,   v_gj ~ (0, R / w_gj),   theta_g ~ (m0, P0)        group g, member j

The baseline of member j is the state given the other members of its group (the Kalman filter with Q = 0), which draws
their weighted mean towards the prior mean:

    b    m0 + sum_others w (r - m0) / (R / P0 + sum_others w)        V    R / (R / P0 + sum_others w)

    A    (r - b) / (sqrt(V + R) + eps)        scale=model, R here of the whole batch and without weights, see below
         r - b                                scale=none

With w = 1 that is the baseline that errs least, E (r - b)^2. What trains is the gradient, and its variance falls with
E w (r - b)^2, w the square of the response's score: with these weights (weights.py) that is what is made small, as the
best baseline of a prompt is not the mean but E w r / E w (Greensmith, Bartlett and Baxter 2004). Only ratios of weights
matter; they are taken in units of their mean over the batch.

R, m0 and P0 are Empirical Bayes by the method of moments (one-way analysis of variance, unbalanced: Searle, Casella and
McCulloch 1992, section 3.6; as a baseline it is the credibility estimator of Buhlmann 1967, the best linear one for any
distribution of the rewards). Each leaves out the very group it is used for, so that a baseline knows neither the reward
nor the weight of the response it is subtracted from. With sums over the other groups h, see groups.Variation:

    R    within / within_degrees        m0   sum W_h mean_h / sum W_h
    P0   max(0, (between - between_degrees R) / spread)

What divides must not be small just because this group's rewards are the first that differ (one success in a batch would
count a hundredfold), and should fluctuate little from batch to batch, nor shrink as the policy becomes certain. So the
scale takes R over all groups, without weights, and as if SCALE_REWARDS more rewards had been observed that vary as all
of the batch do. A response's own reward is one of these N: a bias of order 1/N, which scale=none has not.

    (within + SCALE_REWARDS var(r)) / (within_degrees + SCALE_REWARDS)

Where there is nothing to estimate from:

    R    is 1e-2, the published value, at the mean weight of the others, if no other group has a spread
    P0   is inf, nothing to draw towards, with fewer than two other groups: b is the weighted mean of the others, with
         equal weights RLOO's
    A    is 0 where a response has neither other members nor a prior to be compared with

Members whose weight is 0 (every token was certain) tell nothing and count as none; a group of such has the prior mean
as its baseline. If all weights of a batch are 0, there is no gradient, and they count as equal.
"""

from collections.abc import Sequence

import torch

from verl_krpo.advantage.estimate import Estimate, Observed, observe
from verl_krpo.advantage.groups import Variation, sum_of_others, variation
from verl_krpo.config import AdaptiveConfig, AdaptiveScale
from verl_krpo.kalman import LocalLevel

PUBLISHED_MEASUREMENT_VAR = 1e-2
SCALE_REWARDS = 8  # rewards: without them small batches lose up to 3 % of RLOO's signal, with them less than 1 %
EPSILON = 1e-8  # as published


def krpo_adaptive(
    rewards: torch.Tensor | Sequence[float],
    prompts: object,
    settings: AdaptiveConfig | None = None,
    weights: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
) -> Estimate:
    """Advantages of rewards (rows,) whose prompt ids are `prompts` (rows,), in any order.

    weights: (rows,) w >= 0, for instance score_weights(...); None: all alike. (settings.weight says which ones a job of
    verl's takes; here they are given.) counted and ValueError: estimate.observe.
    """
    seen = observe(rewards, prompts, weights, counted)
    return leave_one_out(seen, fitted(seen), settings or AdaptiveConfig())


def fitted(seen: Observed) -> LocalLevel:
    """R, m0 and P0 of every group from the other groups, (groups,)."""
    values, weights = seen.rewards, seen.weights
    if not len(values):
        return LocalLevel(0.0, 1.0)
    # Deviations from the mean of all, which is exactly the first reward where all are equal.
    grand = values[0, 0] + _mean(values - values[0, 0], weights)
    others = variation(values - grand, weights, sum_of_others)
    weight, members = sum_of_others(weights.sum(dim=1)), others.within_degrees + others.between_degrees + 1
    unit = weight / members.clamp(min=1)  # mean weight: no baseline reads its own
    measurement_var = noise_var(others.within, others.within_degrees, torch.where(unit > 0, unit, 1.0))
    init_var = prior_var(others, measurement_var)
    init_var = torch.where(others.between_degrees < 1, torch.inf, init_var)
    total = (weights * (values - grand)).sum(dim=1)
    init_mean = grand + sum_of_others(total) / weight.clamp(min=torch.finfo(total.dtype).tiny)
    return LocalLevel(0.0, measurement_var, init_mean, init_var)


def leave_one_out(seen: Observed, model: LocalLevel, settings: AdaptiveConfig) -> Estimate:
    """Baseline and advantages, given R, m0 and P0 of every group."""
    values, weights = seen.rewards, seen.weights
    _, measurement_var, init_mean, init_var = (x[:, None] for x in model.columns(len(values), values.device))
    deviations = values - init_mean
    precision = measurement_var / init_var + sum_of_others(weights, dim=1)  # in units of R; 0 if nothing is known
    known = precision > 0
    state = torch.where(known, sum_of_others(weights * deviations, dim=1) / precision, 0.0)  # less m0
    var = torch.where(known, measurement_var / precision, torch.inf)
    error = torch.where(known, deviations - state, 0.0)
    batch_var = scale_var(seen)
    scale = (var + batch_var).sqrt() + EPSILON if settings.scale == AdaptiveScale.model else 1.0
    return Estimate(seen.groups, values, weights, model, float(batch_var), init_mean + state, var, error / scale)


def scale_var(seen: Observed) -> torch.Tensor:
    """R of the whole batch without weights, as it enters the scale."""
    if not len(seen.rewards):
        return torch.tensor(PUBLISHED_MEASUREMENT_VAR)
    found = variation(seen.rewards - seen.rewards[0, 0], seen.groups.mask.double(), torch.sum)
    degrees = found.within_degrees + found.between_degrees
    var = (found.within + found.between) / degrees.clamp(min=1)
    return noise_var(found.within + SCALE_REWARDS * var, found.within_degrees + SCALE_REWARDS)


def noise_var(squares: torch.Tensor, degrees: torch.Tensor, unit: torch.Tensor | float = 1.0) -> torch.Tensor:
    """R, the published one at a weight of `unit` where no rewards of a group differ."""
    return torch.where(squares > 0, squares / degrees.clamp(min=1), PUBLISHED_MEASUREMENT_VAR * unit)


def prior_var(found: Variation, measurement_var: torch.Tensor) -> torch.Tensor:
    """P0 >= 0; 0 where there are no two groups."""
    between = found.between - found.between_degrees * measurement_var
    return torch.where(found.spread > 0, between / found.spread, 0.0).clamp(min=0)


def _mean(values: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    return (weights * values).sum() / weights.sum()
