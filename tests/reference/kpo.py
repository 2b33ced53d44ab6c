"""KPO in float64: a filter that walks token by token, and the loss through autograd."""

import math
from types import SimpleNamespace

import torch

from reference.local_level import sequential

NAN, INF = float("nan"), float("inf")


def filter(z, mask, q_var, r_var, p_var, steady=False, kappa=None):
    """x_t, carried over masked tokens, and where the innovation saturates at kappa sigma: (rows, tokens)."""
    kappa = math.inf if kappa is None else kappa
    mean, _, side = sequential(z, mask, q_var, r_var, 0.0, p_var, steady, kappa)
    return mean, side != 0


def losses(
    old_log_prob, log_prob, advantages, mask, low=3e-4, high=4e-4, *, q_var=1e-6, r_var=1.0, p_var=0.0,
    clip=True, steady=False, kappa=None, log_max=10.0,
):  # fmt: skip
    """The published loss of every token in float64: sequential filter, autograd through the ratio."""
    seen = mask.bool()

    def clean(tensor):
        return torch.where(seen, tensor.to(torch.float64), 0.0)

    new, old, adv = clean(log_prob), clean(old_log_prob), clean(advantages)
    x, _ = filter((new - old).detach(), seen, q_var, r_var, p_var, steady, kappa)
    ratio = (new - new.detach() + x).clamp(max=log_max).exp()
    result = -adv * ratio
    if clip:
        result = torch.maximum(result, -adv * ratio.clamp(1 - low, 1 + high))
    return result


def loss(old_log_prob, log_prob, advantages, mask, mode, config, weights=None, **settings):
    """The same, times the weights of the tokens, through verl's agg_loss."""
    from verl.trainer.ppo.core_algos import agg_loss

    seen = mask.bool()
    result = losses(old_log_prob, log_prob, advantages, mask, config.clip_ratio_low, config.clip_ratio_high, **settings)
    if weights is not None:
        result = result * torch.where(seen, weights.to(torch.float64), 0.0)
    return agg_loss(loss_mat=result, loss_mask=seen, loss_agg_mode=mode, **config.global_batch_info)


class _Config(SimpleNamespace):
    def get(self, key, default=None):
        return getattr(self, key, default)


def config(low=3e-4, high=4e-4, kpo=None, **global_batch_info):
    """As much of verl's actor config as its policy losses read."""
    return _Config(
        clip_ratio=0.2,
        clip_ratio_low=low,
        clip_ratio_high=high,
        clip_ratio_c=3.0,
        policy_loss=_Config(loss_mode="kpo", **({} if kpo is None else {"kpo": kpo})),
        global_batch_info=global_batch_info,
    )


def batch(rows=5, width=41, *, scale=0.3, holes=0.2, seed=0, dtype=torch.float32):
    """Log-probs, advantages and a mask with padding on both sides and holes; NaN and infinities under the mask."""
    make = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=make, dtype=torch.float64)

    old = -normal(rows, width).abs()
    new = old + scale * normal(rows, width)
    adv = normal(rows, 1).expand(rows, width).clone()
    adv[0] = normal(width)
    mask = torch.rand(rows, width, generator=make) >= holes
    start = torch.randint(0, width // 4 + 1, (rows, 1), generator=make)
    stop = torch.randint(width // 2, width + 1, (rows, 1), generator=make)
    at = torch.arange(width)
    mask &= (at >= start) & (at < stop)
    poison = torch.tensor([NAN, INF, -INF, 1e30])[torch.randint(0, 4, (rows, width), generator=make)]

    def planted(tensor, shift):
        return torch.where(mask, tensor, poison.roll(shift, 1)).to(dtype)

    return SimpleNamespace(old=planted(old, 0), new=planted(new, 1), adv=planted(adv, 2), mask=mask)
