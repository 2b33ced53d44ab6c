"""KRPO: advantages from a Kalman filter over the rewards of a prompt's responses (arXiv 2505.07527).

The filter restarts for every prompt. Observations are the scalar rewards r_1 ... r_n of its group,

    x_i = x_{i-1} + w_i,  w_i ~ N(0, Q)        r_i = x_i + v_i,  v_i ~ N(0, R)        x_0 ~ N(m0, P0)

and the advantage of member i is its reward less a baseline b_i, over a scale s_i:

    A_i = (r_i - b_i) / s_i

    baseline        b_i                           its variance V_i
    causal          x_{i|i}      (published)      P_{i|i}
    predicted       x_{i|i-1}                     P_{i|i-1}
    posterior       x_{n|n}                       P_{n|n}
    smoothed        x_{i|n}                       P_{i|n}
    leave_one_out   E[x_i | all rewards but r_i]  Var[x_i | all rewards but r_i]

    scale           s_i
    filter_std      sqrt(V_i) + eps  (published)
    innovation_std  sqrt(V_i + R) + eps; an R estimated from the batch is that of all groups here (prior.py)
    group_std       std(r_1 ... r_n) + eps, with n - 1; 1 in a group of one or of equal rewards
    none            1

`predicted` and `leave_one_out` do not read r_i, so they add no bias to the policy gradient. For `predicted` and
`leave_one_out`, innovation_std is the standard deviation of r_i - b_i under the model. Where V_i is infinite (a diffuse
prior and nothing else observed) there is nothing to compare r_i with and A_i = 0.
"""

import math
from typing import NamedTuple

import torch
from omegaconf import OmegaConf

from verl_krpo.advantage.groups import Groups, group
from verl_krpo.advantage.prior import Prior, prior_of
from verl_krpo.config import BATCH, KRPO_AT, Baseline, KrpoConfig, Order, Scale, read
from verl_krpo.kalman import filter as kalman

BASELINES = {
    Baseline.causal: kalman.filtered,
    Baseline.predicted: kalman.predicted,
    Baseline.posterior: kalman.posterior,
    Baseline.smoothed: kalman.smoothed,
    Baseline.leave_one_out: kalman.leave_one_out,
}

# Our recommended estimator, the preset `krpo_adaptive`: unbiased, order-free, its noise and prior fitted to the batch.
ADAPTIVE = KrpoConfig(
    process_var=0.0,
    measurement_var=BATCH,
    init_mean=BATCH,
    init_var=BATCH,
    baseline=Baseline.leave_one_out,
    scale=Scale.innovation_std,
)


class Estimate(NamedTuple):
    """What the estimator found, on (groups, width) float64 matrices; entries beyond a group's size mean nothing."""

    groups: Groups
    prior: Prior
    rewards: torch.Tensor
    baseline: torch.Tensor
    baseline_var: torch.Tensor
    advantage: torch.Tensor


def estimate(
    rewards: torch.Tensor, index: object, settings: KrpoConfig, counted: torch.Tensor | None = None
) -> Estimate:
    """Advantages of rewards (rows,) whose prompt ids are index (rows,); rows not `counted` (rows,) are left out."""
    if counted is None:
        counted = torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)
    groups = group(index, counted, Order.arrival if _order_free(settings) else settings.order)
    _require_finite(rewards, groups)
    values = groups.gather(rewards.to(torch.float64))
    prior = prior_of(values, groups, settings)

    # Filtering deviations from the prior mean: equal rewards have advantages of exactly 0, not of rounding errors.
    deviations = values - _column(prior.init_mean)
    if _order_free(settings):
        mean, var = _exchangeable(deviations, groups, prior, own=settings.baseline != Baseline.leave_one_out)
    else:
        mean, var = BASELINES[settings.baseline](
            deviations,
            groups.mask,
            process_var=settings.process_var,
            measurement_var=prior.measurement_var,
            init_var=prior.init_var,
        )
    if var.ndim == 1:  # posterior
        mean, var = mean[:, None].expand_as(values), var[:, None].expand_as(values)
    error = deviations - mean
    if var.numel() and not math.isfinite(var.amax()):
        error = torch.where(var.isfinite(), error, 0.0)
    advantage = error / _scale(settings, values, groups, prior, var)
    return Estimate(groups, prior, values, mean + _column(prior.init_mean), var, advantage)


def settings_of(config: object) -> KrpoConfig:
    """The `krpo` settings of verl's `algorithm` node (DictConfig, AlgoConfig, dict or None); ValueError if wrong."""
    node = config.get("krpo", None) if config is not None else None
    node = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    text = repr(node)
    if text not in _known:  # reading takes longer than filtering does
        settings = read(KrpoConfig, node, KRPO_AT)
        check(settings)
        if len(_known) >= 64:
            _known.clear()
        _known[text] = settings
    return _known[text]


_known: dict[str, KrpoConfig] = {}


def check(settings: KrpoConfig) -> None:
    """ValueError where filter_std could divide by a variance of zero."""
    if settings.scale == Scale.filter_std and settings.process_var == 0 and settings.init_var in (0, BATCH):
        raise ValueError(
            f"{KRPO_AT}.scale=filter_std divides by the state's standard deviation, which process_var=0 with "
            f"init_var={settings.init_var} can make zero: use scale=innovation_std, or a process_var > 0"
        )


def _order_free(settings: KrpoConfig) -> bool:
    """Nothing drifts and every member is seen: the order of a group has no meaning."""
    return settings.process_var == 0 and settings.baseline in (
        Baseline.posterior,
        Baseline.smoothed,
        Baseline.leave_one_out,
    )


def _exchangeable(
    deviations: torch.Tensor, groups: Groups, prior: Prior, own: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The filter with Q = 0 in one step: the state given k rewards, with or without a member's own.

        mean  P0 sum (r_j - m0) / (k P0 + R)        var  P0 R / (k P0 + R)

    Both (groups, width).
    """
    total = deviations if groups.mask is None else deviations * groups.mask
    total = total.sum(dim=1, keepdim=True)
    count = groups.sizes[:, None].to(deviations.dtype)
    if not own:
        total, count = total - deviations, count - 1
    measurement_var, init_var = (
        torch.as_tensor(_column(value), dtype=deviations.dtype, device=deviations.device)
        for value in (prior.measurement_var, prior.init_var)
    )
    # Both divided by max(P0, 1), so that P0 = inf is the diffuse limit.
    weight = init_var.clamp(max=1.0)
    share = weight / (count * weight + measurement_var / init_var.clamp(min=1.0))
    known = share.isfinite()
    var = torch.where(known, share * measurement_var, torch.inf).expand_as(deviations)
    return torch.where(known, share, 0.0) * total.expand_as(deviations), var


def _scale(
    settings: KrpoConfig, values: torch.Tensor, groups: Groups, prior: Prior, var: torch.Tensor
) -> torch.Tensor | float:
    if settings.scale == Scale.none:
        return 1.0
    if settings.scale == Scale.filter_std:
        return var.sqrt() + settings.epsilon
    if settings.scale == Scale.innovation_std:
        return (var + prior.noise_var).sqrt_() + settings.epsilon
    return _group_std(values, groups, settings.epsilon)[:, None]


def _group_std(values: torch.Tensor, groups: Groups, epsilon: float) -> torch.Tensor:
    mask, sizes = groups.mask, groups.sizes.to(values.dtype)
    values = values - values[:, :1] if mask is None else (values - values[:, :1]) * mask
    mean = values.sum(dim=1) / sizes
    squares = (values - mean[:, None]).square_()
    squares = (squares if mask is None else squares * mask).sum(dim=1)
    varied = (values != 0).any(dim=1)
    return torch.where(varied, (squares / (sizes - 1).clamp(min=1)).sqrt() + epsilon, 1.0)


def _column(value: float | torch.Tensor) -> float | torch.Tensor:
    return value[:, None] if isinstance(value, torch.Tensor) else value


def _require_finite(rewards: torch.Tensor, groups: Groups) -> None:
    if math.isfinite(rewards.sum()):  # not if one of them is not; many times faster than a look at each
        return
    wrong = (~rewards[groups.rows].isfinite()).nonzero().flatten()[:8]
    if len(wrong):
        rows = groups.rows[wrong]
        raise ValueError(
            f"krpo got rewards that are not finite: {rewards[rows].tolist()} in rows {rows.tolist()} of prompts "
            f"{groups.label_of(wrong)}; make the reward function return finite numbers"
        )
