"""JSPO: James-Stein shrinkage baselines (arXiv 2511.03710), the nearest relative of `krpo_adaptive`.

    b_gj = (1 - l_g) mean(r_g without r_gj) + l_g mean over the other prompts h of mean_h,    l_g = v / (v + s)

v is the mean over the other prompts of var_h / n_h, s the variance over the other prompts of mean_h (both with n - 1).
The formulas are those of its published code, which needs groups of one size; here v takes each group's own n_h, a group
of one adds 0 to the mean v, and its own baseline is the other prompts' mean alone (l = 1).
"""

from collections.abc import Sequence

import torch

from verl_krpo.advantage.estimate import Estimate, observe
from verl_krpo.advantage.groups import Groups, moments, sum_of_others
from verl_krpo.config import JspoConfig


def jspo(
    rewards: torch.Tensor | Sequence[float],
    prompts: object,
    settings: JspoConfig | None = None,
    weights: None = None,
    counted: torch.Tensor | None = None,
) -> Estimate:
    """Advantages r - b of rewards (rows,) whose prompt ids are `prompts` (rows,), in any order.

    settings, weights: jspo has none. counted and ValueError: estimate.observe.
    """
    seen = observe(rewards, prompts, weights, counted)
    baseline = _baseline(seen.rewards, seen.groups)
    unknown = torch.full_like(baseline, torch.nan)
    return Estimate(
        seen.groups, seen.rewards, seen.weights, None, torch.nan, baseline, unknown, seen.rewards - baseline
    )


def _baseline(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """b (groups, width) of rewards `values` (groups, width), float64. With fewer than three groups: RLOO (l_g = 0)."""
    sizes = groups.sizes.double()
    means, squares = moments(values, groups.mask.double())
    others = len(sizes) - 1
    own_group = (values.sum(dim=1, keepdim=True) - values) / (sizes - 1).clamp(min=1)[:, None]
    if others < 2:
        return torch.where(sizes[:, None] > 1, own_group, values)
    grand = means.mean()
    centered = means - grand  # around the mean of all: squares do not cancel
    offset = sum_of_others(centered) / others  # of the mean of the others
    v = sum_of_others(squares / (sizes - 1).clamp(min=1) / sizes) / others
    s = ((sum_of_others(centered.square()) - others * offset.square()) / (others - 1)).clamp(min=0)
    weight = torch.where(v > 0, v / (v + s), 0.0).masked_fill(sizes == 1, 1.0)
    return torch.lerp(own_group, (grand + offset)[:, None].expand_as(values), weight[:, None])
