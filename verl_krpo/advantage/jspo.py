"""JSPO: James-Stein shrinkage baselines (arXiv 2511.03710), the nearest relative of `krpo_adaptive`.

    b_gj = (1 - l_g) mean(r_g without r_gj) + l_g mean over the other prompts h of mean_h,    l_g = v / (v + s)

v is the mean over the other prompts of var_h / n_h, s the variance over the other prompts of mean_h (both with n - 1).
The formulas are those of its published code, which needs groups of one size; here v takes each group's own n_h, a group
of one adds 0 to the mean v, and its own baseline is the other prompts' mean alone (l = 1).
"""

import torch

from verl_krpo.advantage.groups import Groups
from verl_krpo.advantage.shrinkage import group_moments, sum_of_others


def baseline(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """b (groups, width) of rewards `values` (groups, width), float64. With fewer than three groups: RLOO (l_g = 0)."""
    sizes = groups.sizes.double()
    means, squares = group_moments(values, groups)
    others = len(sizes) - 1
    own_group = (values * groups.mask).sum(dim=1, keepdim=True) - values
    own_group = own_group / (sizes - 1).clamp(min=1)[:, None]
    if others < 2:
        return torch.where(sizes[:, None] > 1, own_group, values)
    grand = means.mean()
    centered = means - grand  # around the mean of all: squares do not cancel
    offset = sum_of_others(centered) / others  # of the mean of the others
    v = sum_of_others(squares / (sizes - 1).clamp(min=1) / sizes) / others
    s = ((sum_of_others(centered.square()) - others * offset.square()) / (others - 1)).clamp(min=0)
    weight = torch.where(v > 0, v / (v + s), 0.0).masked_fill(sizes == 1, 1.0)
    return torch.lerp(own_group, (grand + offset)[:, None].expand_as(values), weight[:, None])
