"""KRPO: advantages from a Kalman filter over the rewards of a prompt's responses (arXiv 2505.07527).

The filter restarts for every prompt. Observations are the scalar rewards r_1 ... r_n of its group,

    x_i = x_{i-1} + w_i,  w_i ~ N(0, Q)        r_i = x_i + v_i,  v_i ~ N(0, R)        x_0 ~ N(m0, P0)

and the advantage of member i is its reward minus a baseline b_i, over a scale s_i:

    A_i = (r_i - b_i) / s_i

    baseline        b_i                           its variance V_i
    causal          x_{i|i}      (published)      P_{i|i}        the filtered state, its own reward in it
    predicted       x_{i|i-1}                     P_{i|i-1}
    posterior       x_{n|n}                       P_{n|n}
    smoothed        x_{i|n}                       P_{i|n}
    leave_one_out   E[x_i | all rewards but r_i]  Var[x_i | all rewards but r_i]
    jspo            no filter: jspo.py            -

    scale           s_i
    filter_std      sqrt(V_i) + eps  (published)
    innovation_std  sqrt(V_i + R) + eps; an R estimated from the batch is that of all groups here (shrinkage.py)
    group_std       std(r_1 ... r_n) + eps, with n - 1; 1 in a group of one or of equal rewards
    none            1

`predicted`, `leave_one_out` and `jspo` do not read r_i, so they add no bias to the policy gradient (a scale that is
estimated from the batch, group_std or an R of `batch`, does read it). For `predicted` and `leave_one_out`, with R a
number, innovation_std is the standard deviation of r_i - b_i under the model. Where V_i is infinite (a diffuse prior
and nothing else observed) there is nothing to compare r_i with and A_i = 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from verl_krpo.advantage import jspo
from verl_krpo.advantage.groups import Groups, group
from verl_krpo.advantage.memory import PromptMemory, Visits, observe
from verl_krpo.advantage.shrinkage import Prior, group_moments, prior_of, without_drift
from verl_krpo.config import KRPO_AT, Baseline, KrpoConfig, Memory, Order, Scale
from verl_krpo.kalman import LocalLevel, filtered, leave_one_out, posterior, predicted, smoothed

BASELINES = {  # one belief a member; `posterior` has one a group, `jspo` is no filter
    Baseline.causal: filtered,
    Baseline.predicted: predicted,
    Baseline.smoothed: smoothed,
    Baseline.leave_one_out: leave_one_out,
}


class Estimate(NamedTuple):
    """(groups, width) float64 matrices in the order of the filter; entries beyond a group's size mean nothing."""

    groups: Groups
    prior: Prior
    rewards: torch.Tensor
    baseline: torch.Tensor
    baseline_var: torch.Tensor
    advantage: torch.Tensor
    memory: PromptMemory | None = None  # after these rewards
    visits: Visits | None = None  # what it knew before

    def advantages(self) -> torch.Tensor:
        """A_i by row, (rows,) float64; 0 in rows that are not counted."""
        return self.groups.scatter(self.advantage)


def krpo(
    rewards: torch.Tensor | Sequence[float],
    prompts: object,
    settings: KrpoConfig | None = None,
    counted: torch.Tensor | None = None,
    memory: PromptMemory | None = None,
    step: int | None = None,
) -> Estimate:
    """Advantages of rewards (rows,) whose prompt ids are `prompts` (rows,), in any order.

    settings: None gives the published ones. counted: (rows,) bool, rows that are members of their group; None: all.
    memory: with settings.memory=prompt, what earlier steps have left (`PromptMemory()` at first, then the estimate's
    own); the ids must then be the same at every visit. step: that of these rewards, None for the next.

    ValueError names the rows and prompts of rewards that are not finite, and rows without a prompt id.
    """
    settings = settings or KrpoConfig()
    if (memory is None) != (settings.memory == Memory.none):
        given = "no memory" if memory is None else "a memory"
        raise ValueError(f"krpo got {given} with {KRPO_AT}.memory={settings.memory.value}: the two go together")
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    counted = torch.ones_like(rewards, dtype=torch.bool) if counted is None else counted
    order_free = _order_free(settings)
    groups = group(prompts, counted, Order.arrival if order_free else settings.order)
    _require_finite(rewards, groups)
    values = groups.gather(rewards)
    prior, visits = prior_of(values, groups, settings), None
    if memory is not None:
        step = memory.step + 1 if step is None else step
        visits = memory.recall(groups.labels, step)
        prior, memory = observe(memory, visits, values, groups, step, settings.memory_var, prior)

    # Filtering deviations from the prior mean: equal rewards have advantages of exactly 0, not of rounding errors.
    init_mean = prior.init_mean[:, None]
    deviations = (values - init_mean) * groups.mask
    model = LocalLevel(settings.process_var, prior.measurement_var, 0.0, prior.init_var)
    if settings.baseline == Baseline.jspo:
        mean, var = jspo.baseline(values, groups) - init_mean, torch.full_like(values, torch.nan)
    elif order_free:
        own = settings.baseline in (Baseline.posterior, Baseline.smoothed)
        mean, var = without_drift(deviations, groups, prior, own)
    elif settings.baseline == Baseline.posterior:
        mean, var = (x[:, None].expand_as(values) for x in posterior(deviations, groups.mask, model))
    else:
        mean, var = BASELINES[settings.baseline](deviations, groups.mask, model)
    error = torch.where(var == torch.inf, 0.0, deviations - mean)
    advantage = error / _scale(settings, values, groups, prior, var)
    return Estimate(groups, prior, values, init_mean + mean, var, advantage, memory, visits)


def _order_free(settings: KrpoConfig) -> bool:
    """Nothing drifts and every member is observed: the order of a group has no meaning."""
    whole = (Baseline.posterior, Baseline.smoothed, Baseline.leave_one_out)
    return settings.baseline == Baseline.jspo or (settings.process_var == 0 and settings.baseline in whole)


def _scale(
    settings: KrpoConfig, values: torch.Tensor, groups: Groups, prior: Prior, var: torch.Tensor
) -> torch.Tensor | float:
    if settings.scale == Scale.filter_std:
        return var.sqrt() + settings.epsilon
    if settings.scale == Scale.innovation_std:
        return (var + prior.scale_var[:, None]).sqrt() + settings.epsilon
    if settings.scale == Scale.none:
        return 1.0
    if settings.scale == Scale.group_std:
        _, squares = group_moments(values - values[:, :1], groups)  # from the first on: exactly 0 where all are equal
        std = (squares / (groups.sizes - 1).clamp(min=1)).sqrt() + settings.epsilon
        return torch.where(squares > 0, std, 1.0)[:, None]
    raise NotImplementedError(f"scale={settings.scale}")


def _require_finite(rewards: torch.Tensor, groups: Groups) -> None:
    wrong = (~rewards[groups.rows].isfinite()).nonzero().flatten()[:8]
    if len(wrong):
        rows = groups.rows[wrong]
        raise ValueError(
            f"krpo got rewards that are not finite: {rewards[rows].tolist()} in rows {rows.tolist()} of prompts "
            f"{groups.label_of(wrong)}; make the reward function return finite numbers"
        )
