"""KPO: a policy loss whose importance ratios are Kalman-filtered along the response (arXiv 2602.10609).

    z_t = log pi(y_t) - log pi_old(y_t)                              the token's log-ratio, an observation
    x_t = x_{t-1} + K_t (z_t - x_{t-1})                              the filtered log-ratio, `kalman.filter`
    ratio_t = exp(min(log pi - sg(log pi) + sg(x_t), ratio_log_max))     value exp(x_t), gradient through log pi alone
    loss_t = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - low, 1 + high))    clip=false: -A_t ratio_t

A masked token is no observation: state and gain index carry over it, and nothing under the mask is read.
"""

import functools
import math
from typing import Any, NamedTuple

import numpy as np
import torch

from verl_krpo.config import BATCH, KPO_AT, Gain, KpoConfig, read
from verl_krpo.kalman import filter as kalman_filter
from verl_krpo.kalman import local_level, moments, saturated

DEFAULTS = KpoConfig()
INTEGERS = {torch.float32: torch.int32, torch.float64: torch.int64}
MINUS_INF = {torch.float32: -(2**23), torch.float64: -(2**52)}  # read as such integers
MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean")


def compute_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = MODES[-1],
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The KPO loss, registered in verl as `loss_mode=kpo`.

    old_log_prob, log_prob, advantages, response_mask (bool or 0/1) and rollout_is_weights: (rows, tokens). The first
    two in nats, any float dtype; the arithmetic is float32 (float64 for float64 log-probs), whatever autocast says.
    config: verl's actor config; `clip_ratio*`, `global_batch_info` and `policy_loss.kpo` are read.
    Returns the loss aggregated by verl's agg_loss and the metrics, the same keys on every call.
    ValueError: an invalid `policy_loss.kpo`, or a loss_agg_mode that verl does not have.
    """
    kpo = settings(config)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    with torch.no_grad(), torch.autocast(log_prob.device.type, enabled=False):
        mask = response_mask.bool()
        count = mask.sum(dim=-1, dtype=torch.int32)
        pair = (log_prob.detach(), old_log_prob)
        rule = _Rule(kpo, *_noise(pair, mask, kpo), low, high)
        advantages = advantages.to(_dtype(pair))
        # Each makes the log-ratios anew: kept for the next they would be a third tensor in memory.
        scalars = _raw(pair, advantages, mask, rule)
        x, hits = _filtered(pair, mask, rule)
        value, slope, *of_filtered = _gains(x, advantages, mask, rollout_is_weights, rule)
        pairs = torch.count_nonzero(mask[:, 1:] & mask[:, :-1])
        scalars = torch.stack([*scalars, *of_filtered, pairs.float(), hits.float()]).double()
        host = torch.cat([scalars, count]).cpu().numpy()  # the one wait for the device
        scalars, counts = host[: len(scalars)].tolist(), host[len(scalars) :].astype(int)
        weight = _row_weights(loss_agg_mode, count, counts, mask.shape[-1], value.dtype, config.global_batch_info)
    return _Sloped.apply(log_prob, value, slope, -weight), _metrics(scalars, counts, mask.shape[-1], rule)


def settings(config: Any) -> KpoConfig:
    """`policy_loss.kpo` of an actor config in its typed form; the published defaults where it is missing."""
    node = config.policy_loss.get("kpo")
    if node is None:
        return DEFAULTS
    return node if isinstance(node, KpoConfig) else _typed(tuple(node.items()))


@functools.lru_cache(maxsize=8)
def _typed(items: tuple) -> KpoConfig:
    return read(KpoConfig, {key: value for key, value in items if key != "_target_"}, KPO_AT)


class _Rule(NamedTuple):
    kpo: KpoConfig
    noise: moments.Noise
    logged_var: float
    low: float
    high: float


class _Sloped(torch.autograd.Function):
    """sum_rows weight value, of which the derivative by log_prob (rows, tokens) is known: weight slope.

    With it the backward pass needs one tensor instead of the dozen that autograd would keep.
    """

    @staticmethod
    def forward(ctx, log_prob, value, slope, weight):
        ctx.save_for_backward(slope, weight)
        ctx.dtype = log_prob.dtype
        return (value * weight).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        slope, weight = ctx.saved_tensors
        return (slope * (grad * weight)[:, None]).to(ctx.dtype), None, None, None


def _log_ratio(pair, mask):
    """z (rows, tokens), 0 under the mask, in the dtype of the arithmetic."""
    dtype = _dtype(pair)
    new, old = (tensor.to(dtype) for tensor in pair)
    z = new - old
    return _keep(z, _bits(mask, torch.empty_like(z)))


def _dtype(pair):
    return torch.float64 if pair[0].dtype == torch.float64 else torch.float32


def _bits(mask, out):
    """All bits where the mask is true, none elsewhere, for `_keep`: integers in the memory of `out`, a float tensor."""
    return out.view(INTEGERS[out.dtype]).copy_(mask.view(torch.int8)).neg_()


def _keep(x, bits):
    """x in place, 0 where there are no bits, be it NaN: on a CPU many times faster than a choice at every token."""
    x.view(bits.dtype).bitwise_and_(bits)
    return x


def _noise(pair, mask, kpo) -> tuple[moments.Noise, float]:
    """The Q and R in use, and the R to log."""
    if kpo.measurement_var != BATCH:
        return moments.Noise(kpo.process_var, kpo.measurement_var), kpo.measurement_var
    measured = moments.from_differences(_log_ratio(pair, mask), mask, smallest_ratio=kpo.process_var)
    if measured is None:  # no two neighbours differ, as in an on-policy update: nothing to measure, nothing to filter
        return moments.Noise(kpo.process_var, 1.0), 0.0
    return measured, measured.measurement_var


def _filtered(pair, mask, rule):
    """x (rows, tokens), anything under the mask, and how many innovations were clipped."""
    z = _log_ratio(pair, mask)
    model = dict(**rule.noise._asdict(), init_var=rule.kpo.init_var, gain=rule.kpo.gain.value)
    # With nothing observed behind a masked token, the filter has nothing to skip.
    holes = kalman_filter.any_true(mask[:, 1:] > mask[:, :-1])
    if rule.kpo.innovation_clip is not None:
        model["innovation_clip"] = rule.kpo.innovation_clip
        x, saturates = saturated.filtered_mean(z, mask if holes else None, **model)
        return x, torch.count_nonzero(saturates & mask)
    if not holes:
        for half in z.chunk(2):  # for float64 on the way takes memory
            kalman_filter.filtered_mean(half, **model, out=half)
    elif z.device.type == "cpu":
        for row, seen in zip(z, mask, strict=True):  # one row's packed tokens at a time take little memory
            packed = row.masked_select(seen)[None]
            row.masked_scatter_(seen, kalman_filter.filtered_mean(packed, **model, out=packed))
    else:
        z = kalman_filter.filtered_mean(z, mask, **model)
    return z, mask.new_zeros((), dtype=torch.int64)


def _raw(pair, advantages, seen, rule):
    """Of the ratios before the filter: the largest, what `_exponentiate` returns, how often neighbours differ."""
    z = _log_ratio(pair, seen)
    scratch = torch.empty_like(z)
    peak = _largest(z, seen, scratch).exp_()
    sums = _exponentiate(z, scratch, rule)
    torch.mul(z, advantages, out=scratch)
    clipped = _bound(z, advantages, rule).lt_(scratch).bool()
    del scratch
    return [peak, *sums, _switches(clipped, seen)]


def _gains(x, advantages, seen, weight, rule):
    """A token's gain is min(A ratio, A clip(ratio)), its loss with the other sign: per row their sum, (rows,).

    Behind it d gain_t / d log pi(y_t), in the memory of the filtered log-ratios x; what `_exponentiate` returns, how
    often neighbours differ, and how many tokens are clipped.
    """
    scratch = torch.empty_like(x)
    _keep(x, _bits(seen, scratch))
    sums = _exponentiate(x, scratch, rule)
    torch.mul(x, advantages, out=scratch)
    _bound(x, advantages, rule)
    if rule.kpo.clip:
        clipped = scratch.gt_(torch.minimum(scratch, x, out=x)).bool()
    else:
        clipped = x.lt_(scratch).bool()
        x.copy_(scratch)
    if weight is not None:
        x *= weight
    value = _keep(x, _bits(seen, scratch)).sum(dim=-1)

    # d ratio / d log pi = ratio, but 0 where the ratio stands at its upper bound, and where it is clipped.
    torch.mul(advantages, _upper_bound(rule.kpo.ratio_log_max, x.dtype), out=scratch)
    if weight is not None:
        scratch *= weight
    x *= scratch.ne_(x)
    if rule.kpo.clip:
        x.addcmul_(x, scratch.copy_(clipped), value=-1.0)
    del scratch
    return value, x, *sums, _switches(clipped, seen), torch.count_nonzero(clipped).float()


@functools.lru_cache(maxsize=8)
def _upper_bound(ratio_log_max, dtype):
    """The largest ratio to the last bit, as `_exponentiate` makes it."""
    return torch.tensor(math.expm1(ratio_log_max), dtype=dtype).add_(1.0).item()


def _largest(x, seen, scratch):
    """The largest observed entry of x; -inf if there is none."""
    bits = _bits(seen, scratch).bitwise_not_().bitwise_and_(MINUS_INF[x.dtype])
    bits.bitwise_or_(x.view(bits.dtype))
    return scratch.amax() if scratch.numel() else scratch.new_full((), -math.inf)


def _exponentiate(x, scratch, rule):
    """Log-ratios to ratios in place; the sums of x, of |x|, of ratio - 1 and of its square."""
    sums = [x.sum(), torch.abs(x, out=scratch).sum()]
    off = x.expm1_().clamp_(max=math.expm1(rule.kpo.ratio_log_max))  # float32 keeps small ones exact
    sums += [off.sum(), torch.square(off, out=scratch).sum()]
    off.add_(1.0)
    return sums


def _bound(ratio, advantages, rule):
    """A clip(ratio), in the place of the ratio.

    What is compared with it is compared in place, to 0 and 1: making bools of floats costs a CPU several times as much.
    """
    return ratio.clamp_(1.0 - rule.low, 1.0 + rule.high).mul_(advantages)


def _switches(clipped, seen):
    """How many pairs of neighbouring observed tokens have one clipped and the other not, as a float."""
    differ = clipped[:, 1:] ^ clipped[:, :-1]
    return torch.count_nonzero(differ.logical_and_(seen[:, 1:]).logical_and_(seen[:, :-1])).float()


def _metrics(scalars: list[float], counts: np.ndarray, width: int, rule: _Rule) -> dict[str, float]:
    kpo, noise = rule.kpo, rule.noise
    peak, z, z_abs, raw, raw_sq, switch_raw, _, x_abs, off, off_sq, switch, clipped, pairs, hits = scalars
    n, pairs, last = max(1, int(counts.sum())), max(1.0, pairs), counts[counts > 0] - 1
    if kpo.gain is Gain.steady:
        gain = local_level.steady_gain(*noise)
    else:
        gains = local_level.schedule(width, *noise, kpo.init_var).gain
        gain = float(gains.numpy()[last].mean()) if len(last) else 0.0
    return {
        "actor/pg_clipfrac": clipped / n if kpo.clip else 0.0,
        "actor/pg_clipfrac_lower": 0.0,
        "actor/ppo_kl": -z / n,
        "actor/kpo_ratio_std_raw": math.sqrt(max(0.0, raw_sq / n - (raw / n) ** 2)),
        "actor/kpo_ratio_std_filtered": math.sqrt(max(0.0, off_sq / n - (off / n) ** 2)),
        "actor/kpo_ratio_max_raw": min(peak, torch.finfo(torch.float32).max),
        "actor/kpo_logratio_abs_mean_raw": z_abs / n,
        "actor/kpo_logratio_abs_mean_filtered": x_abs / n,
        "actor/kpo_gain_last": gain,
        "actor/kpo_measurement_var": float(rule.logged_var),
        "actor/kpo_innovation_clipfrac": hits / n,
        "actor/kpo_switch_raw": switch_raw / pairs,
        "actor/kpo_switch_filtered": switch / pairs,
    }


def _row_weights(loss_agg_mode, count, counts, width, dtype, global_batch_info):
    """What verl's agg_loss weights the sum of a row's token losses with, (rows,): it is linear in them.

    count (rows,) and counts, the same numbers on the host: a row's observed tokens.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    if loss_agg_mode not in MODES:
        raise ValueError(f"loss_agg_mode={loss_agg_mode!r} is not one of {', '.join(MODES)}")
    info = dict(global_batch_info)
    # What agg_loss would count in the mask. Across ranks it insists on being told, and still does.
    if info.get("dp_size", 1) == 1:
        if info.get("batch_num_tokens") is None:
            info["batch_num_tokens"] = max(1, int(counts.sum()))
        if info.get("global_batch_size") is None:
            info["global_batch_size"] = max(1, int((counts > 0).sum()))
    if info.get("loss_scale_factor") is None:
        info["loss_scale_factor"] = width
    one = torch.ones(1, 1, dtype=dtype, device=count.device)
    weight = agg_loss(one, one, loss_agg_mode, **info)
    return weight / count.clamp(min=1) if loss_agg_mode == "seq-mean-token-mean" else weight.expand(len(count))
