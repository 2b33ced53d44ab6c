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

    scale           s_i
    filter_std      sqrt(V_i) + eps  (published)
    innovation_std  sqrt(V_i + R) + eps
    group_std       std(r_1 ... r_n) + eps, with n - 1; 1 in a group of one or of equal rewards
    none            1

`predicted` and `leave_one_out` do not read r_i, so they add no bias to the policy gradient (group_std does); there
innovation_std is the standard deviation of r_i - b_i under the model. With weights v_i ~ N(0, R / w_i), the w_i in
units of their mean over the batch.
"""

from collections.abc import Sequence

import torch

from verl_krpo.advantage.estimate import Estimate, Observed, observe
from verl_krpo.advantage.groups import moments
from verl_krpo.config import Baseline, KrpoConfig, Scale
from verl_krpo.kalman import LocalLevel, filtered, leave_one_out, posterior, predicted, smoothed

BASELINES = {
    Baseline.causal: filtered,
    Baseline.predicted: predicted,
    Baseline.posterior: posterior,
    Baseline.smoothed: smoothed,
    Baseline.leave_one_out: leave_one_out,
}


def krpo(
    rewards: torch.Tensor | Sequence[float],
    prompts: object,
    settings: KrpoConfig | None = None,
    weights: torch.Tensor | None = None,
    counted: torch.Tensor | None = None,
) -> Estimate:
    """Advantages of rewards (rows,) whose prompt ids are `prompts` (rows,), in any order.

    settings: None gives the published ones, members shuffled. weights, counted and ValueError: estimate.observe.
    """
    settings = settings or KrpoConfig()
    seen = observe(rewards, prompts, weights, counted, settings.order)
    groups, values = seen.groups, seen.rewards

    # Filtering deviations from the prior mean: rewards that equal it have advantages of exactly 0.
    deviations = values - settings.init_mean
    model = LocalLevel(settings.process_var, settings.measurement_var, 0.0, settings.init_var)
    mean, var = BASELINES[settings.baseline](deviations, groups.mask, model, None if weights is None else seen.weights)
    if settings.baseline == Baseline.posterior:  # one belief a group
        mean, var = (x[:, None].expand_as(values) for x in (mean, var))
    advantage = (deviations - mean) / _scale(settings, seen, var)
    model = LocalLevel(settings.process_var, settings.measurement_var, settings.init_mean, settings.init_var)
    baseline = settings.init_mean + mean
    return Estimate(groups, values, seen.weights, model, settings.measurement_var, baseline, var, advantage)


def _scale(settings: KrpoConfig, seen: Observed, var: torch.Tensor) -> torch.Tensor | float:
    if settings.scale == Scale.filter_std:
        return var.sqrt() + settings.epsilon
    if settings.scale == Scale.innovation_std:
        return (var + settings.measurement_var).sqrt() + settings.epsilon
    if settings.scale == Scale.none:
        return 1.0
    if settings.scale == Scale.group_std:
        groups = seen.groups
        _, squares = moments(seen.rewards, groups.mask.double())
        std = (squares / (groups.sizes - 1).clamp(min=1)).sqrt() + settings.epsilon
        return torch.where(squares > 0, std, 1.0)[:, None]
    raise NotImplementedError(f"scale={settings.scale}")
