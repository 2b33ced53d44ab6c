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
# Tokens worked on at a time, at most. A CPU does a small tensor in one go, for the calls would cost more than the
# arithmetic; else blocks stay in cache, and what one needs is small beside the tensor. Elsewhere few kernels count.
CPU_BLOCK, DEVICE_BLOCK = 2**15, 2**22
SCALARS = 14  # behind the metrics
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
        value, slope, host = _rows(pair, advantages, mask, rollout_is_weights, rule)
        host = torch.cat([host, count]).cpu().numpy()  # the one wait for the device
        scalars, counts = host[:SCALARS].tolist(), host[SCALARS:].astype(int)
        weight = _row_weights(loss_agg_mode, count, counts, mask.shape[-1], value.dtype, config.global_batch_info)
    return _Sloped.apply(log_prob, value, slope, weight), _metrics(scalars, counts, mask.shape[-1], rule)


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
    return _keep(new - old, _bits(mask, dtype))


def _dtype(pair):
    return torch.float64 if pair[0].dtype == torch.float64 else torch.float32


def _bits(mask, dtype):
    """All bits where the mask is true, none elsewhere: an integer tensor as wide as `dtype`, for `_keep`."""
    return mask.view(torch.int8).to(torch.int64 if dtype == torch.float64 else torch.int32).neg_()


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


def _rows(pair, advantages, mask, weights, rule):
    """Per row the sum of its tokens' losses (rows,), their slope (rows, tokens), and the scalars behind the metrics."""
    slope, saturates = _filtered(pair, mask, rule)  # a filtered log-ratio waits where its slope will be written
    value = slope.new_zeros(len(slope))
    zero = value.new_zeros(())
    sums, counts, peaks = [zero.expand(8)], [zero.long().expand(4)], [zero]
    for rows, spans in _blocks(mask):
        # A block's first token has the last of the one before it for a neighbour.
        before = mask.new_zeros(3, len(mask[rows]), 1)
        for columns in spans:
            at = (rows, columns)
            new, old, advantage, seen = (tensor[at] for tensor in (*pair, advantages, mask))
            weight = None if weights is None else weights[at]
            loss, before, *of_block = _block(new, old, slope[at], advantage, seen, weight, before, rule)
            value[rows] += loss
            for tally, part in zip((sums, counts, peaks), of_block, strict=True):
                tally.append(part)
    hits = zero if saturates is None else torch.count_nonzero(saturates)
    scalars = [torch.stack(part).double().sum(dim=0) for part in (sums, counts)]
    return value, slope, torch.cat([*scalars, torch.stack([hits.double(), torch.stack(peaks).amax().double()])])


def _blocks(mask):
    """(rows, its spans of columns): whole rows where they fit in a block, so that it lies together in memory."""
    rows, width = mask.shape
    size = DEVICE_BLOCK
    if mask.device.type == "cpu":
        size = CPU_BLOCK if mask.numel() <= CPU_BLOCK else min(CPU_BLOCK, mask.numel() // 4)
    height = min(rows, max(1, size // max(1, width)))
    return ((part, _slices(width, max(1, size // height))) for part in _slices(rows, height))


def _filtered(pair, mask, rule):
    """x (rows, tokens), anything under the mask, and where innovations were clipped, if they are."""
    z = _log_ratio(pair, mask)
    model = dict(**rule.noise._asdict(), init_var=rule.kpo.init_var, gain=rule.kpo.gain.value)
    if rule.kpo.innovation_clip is not None:
        return saturated.filtered_mean(z, mask, innovation_clip=rule.kpo.innovation_clip, **model)
    # With nothing observed behind a masked token, the filter has nothing to skip.
    solid = not kalman_filter.any_true(mask[:, 1:] > mask[:, :-1])
    if z.device.type != "cpu":
        return kalman_filter.filtered_mean(z, None if solid else mask, **model), None
    if solid:
        for rows in _slices(len(z), -(-len(z) // 2)):
            z[rows] = kalman_filter.filtered_mean(z[rows], **model)
    else:
        for row, seen in zip(z, mask, strict=True):  # one row's packed tokens at a time take little memory
            packed = row.masked_select(seen)[None]
            row.masked_scatter_(seen, kalman_filter.filtered_mean(packed, **model))
    return z, None


def _block(log_prob, old_log_prob, slope, advantages, seen, weight, before, rule):
    """The losses of a block of tokens, (rows, tokens), from its log-ratios: of the filtered ones in `slope`.

    Leaves the slope d loss_t / d log pi(y_t) where the filtered log-ratios were. Returns the rows' losses (rows,); of
    the last tokens whether they were seen and are clipped, raw and filtered (3, rows, 1), as `before` is of the tokens
    before the block; of raw and filtered each the sums of log-ratios, of their absolute values, of ratio - 1 and of its
    square (8,); what `_counts` counts (4,); and the largest raw ratio.
    """
    kpo, dtype = rule.kpo, slope.dtype
    bits = _bits(seen, dtype)
    both = slope.new_empty(2, *slope.shape)
    torch.sub(log_prob.to(dtype), old_log_prob.to(dtype), out=both[0])
    both[1] = slope
    _keep(both, bits)
    of = [both.sum(dim=(1, 2)), both.abs().sum(dim=(1, 2))]
    flat = both[1] > kpo.ratio_log_max
    off = both.expm1_()  # ratio - 1: float32 keeps small ones exact
    peak = _keep(off[0] + 1.0, bits).amax()
    off.clamp_(max=math.expm1(kpo.ratio_log_max))
    sums = torch.cat([*of, off.sum(dim=(1, 2)), torch.linalg.vector_norm(off, dim=(1, 2)).square_()])

    cost = _keep(advantages.to(dtype).neg(), bits)
    weight = None if weight is None else _keep(weight.to(dtype, copy=True), bits)
    del bits
    loss = off.add_(1.0) * cost
    bounded = both.clamp_(1.0 - rule.low, 1.0 + rule.high).mul_(cost)
    clipped = bounded > loss
    loss = loss[1]
    if kpo.clip:
        torch.maximum(loss, bounded[1], out=loss)
        flat |= clipped[1]
    if weight is not None:
        loss *= weight
    value = loss.sum(dim=-1)
    del both, off, bounded, cost
    slope.copy_(_keep(loss, _bits(flat.logical_not_(), dtype)))  # d ratio / d log pi = ratio
    chain = torch.cat([before, torch.cat([seen[None], clipped])], dim=-1)
    return value, chain[..., -1:].clone(), sums, _counts(chain), peak


def _counts(chain):
    """Clipped tokens, neighbouring pairs, and pairs clipped differently, raw and filtered, (4,).

    chain: seen, clipped raw and clipped filtered (3, rows, 1 + tokens), with the token before them in front.
    """
    here, before = chain[..., 1:], chain[..., :-1]
    pairs = here[0] & before[0]
    raw, filtered = (here[1:] ^ before[1:]).logical_and_(pairs)
    return torch.stack([torch.count_nonzero(part) for part in (here[2], pairs, raw, filtered)])


def _slices(n, size):
    return (slice(start, start + size) for start in range(0, n, max(1, size)))


def _metrics(scalars: list[float], counts: np.ndarray, width: int, rule: _Rule) -> dict[str, float]:
    kpo, noise = rule.kpo, rule.noise
    z, _, z_abs, x_abs, raw, off, raw_sq, off_sq, clipped, pairs, switch_raw, switch, hits, peak = scalars
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
