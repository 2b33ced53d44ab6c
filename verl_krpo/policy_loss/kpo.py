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
# Tokens worked on at a time. A CPU does a small tensor in one go; else its blocks stay in cache, and what they need is
# small beside the tensor. Elsewhere the number of kernels is kept small.
CPU_BLOCK, DEVICE_BLOCK = 2**15, 2**22
CPU_GROUPS = 4  # of rows
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


def _log_ratio(pair, unseen):
    """z (rows, tokens), 0 where unseen, in the dtype of the arithmetic."""
    new, old = (tensor.to(_dtype(pair)) for tensor in pair)
    return (new - old).masked_fill_(unseen, 0.0)


def _dtype(pair):
    return torch.float64 if pair[0].dtype == torch.float64 else torch.float32


def _noise(pair, mask, kpo) -> tuple[moments.Noise, float]:
    """The Q and R in use, and the R to log."""
    if kpo.measurement_var != BATCH:
        return moments.Noise(kpo.process_var, kpo.measurement_var), kpo.measurement_var
    measured = moments.from_differences(_log_ratio(pair, ~mask), mask, smallest_ratio=kpo.process_var)
    if measured is None:  # no two neighbours differ, as in an on-policy update: nothing to measure, nothing to filter
        return moments.Noise(kpo.process_var, 1.0), 0.0
    return measured, measured.measurement_var


class _Tally(NamedTuple):
    """What the metrics are made of, block by block: sums (8,) and peaks () as of `_block`, counts (4,), hits ()."""

    sums: list[torch.Tensor]
    counts: list[torch.Tensor]
    hits: list[torch.Tensor]
    peaks: list[torch.Tensor]


def _rows(pair, advantages, mask, weights, rule):
    """Per row the sum of its tokens' losses (rows,), their slope (rows, tokens), and the scalars behind the metrics."""
    rows = len(mask)
    groups, block = 1, DEVICE_BLOCK
    if mask.device.type == "cpu":
        groups, block = (1 if mask.numel() <= CPU_BLOCK else CPU_GROUPS), CPU_BLOCK
    # Nothing observed behind a masked token: the filter has nothing to skip.
    solid = not (mask[:, 1:] & ~mask[:, :-1]).any()

    slope = torch.empty(mask.shape, dtype=_dtype(pair), device=mask.device)
    value = slope.new_zeros(rows)
    zero = value.new_zeros(())
    tally = _Tally([zero.expand(8)], [zero.int().expand(4)], [zero.long()], [zero - math.inf])
    for group in _slices(rows, -(-rows // groups)):
        of_group = [tensor[group] for tensor in (*pair, advantages, mask, value, slope)]
        _group(*of_group, None if weights is None else weights[group], rule, solid, block, tally)
    scalars = [torch.stack(part).double().sum(dim=0).reshape(-1) for part in tally[:3]]
    return value, slope, torch.cat([*scalars, torch.stack(tally.peaks).amax()[None]])


def _group(log_prob, old_log_prob, advantages, mask, value, slope, weights, rule, solid, block, tally):
    """The losses of some rows and their slope, written to `value` and `slope`, and the tally."""
    z = _log_ratio((log_prob, old_log_prob), ~mask)
    # The filtered log-ratios wait where their slope will be written.
    slope[:], saturates = _filter(z, mask, solid, rule)
    if saturates is not None:
        tally.hits.append(torch.count_nonzero(saturates))
    before = mask.new_zeros(3, len(z), 1)
    for columns in _slices(z.shape[1], -(-block // max(1, len(z)))):
        at = (slice(None), columns)
        weight = None if weights is None else weights[at]
        clipped, loss = _block(z[at], slope[at], advantages[at], mask[at], weight, rule, tally)
        value += loss
        chain = torch.cat([before, torch.cat([mask[at][None], clipped])], dim=-1)
        tally.counts.append(_counts(chain, clipped))
        before = chain[..., -1:].clone()  # the next block's first token has it for a neighbour


def _filter(z, mask, solid, rule):
    """x (rows, tokens), anything under the mask, and where innovations were clipped, if they are."""
    model = dict(**rule.noise._asdict(), init_var=rule.kpo.init_var, gain=rule.kpo.gain.value)
    if rule.kpo.innovation_clip is not None:
        return saturated.filtered_mean(z, mask, innovation_clip=rule.kpo.innovation_clip, **model)
    if solid or z.device.type != "cpu":
        return kalman_filter.filtered_mean(z, None if solid else mask, **model), None
    x = torch.zeros_like(z)
    for row, seen in enumerate(mask):  # one row's packed tokens at a time take little memory
        packed = z[row].masked_select(seen)[None]
        x[row].masked_scatter_(seen, kalman_filter.filtered_mean(packed, **model))
    return x, None


def _block(z, slope, advantages, seen, weight, rule, tally):
    """The losses of a block of tokens from its log-ratios (rows, tokens): z, and the filtered ones in `slope`.

    Returns what raw and filtered ratios have clipped (2, rows, tokens) and the rows' losses (rows,). Leaves the slope
    d loss_t / d log pi(y_t) where the filtered log-ratios were. Tallies, of raw and filtered each, the sums of
    log-ratios, of their absolute values, of ratio - 1 and of its square, and the largest raw log-ratio.
    """
    kpo, lowest, highest = rule.kpo, 1.0 - rule.low, 1.0 + rule.high
    unseen = ~seen
    absent = unseen.to(slope.dtype)
    both = torch.stack([z, slope])
    both[1].addcmul_(both[1], absent, value=-1.0)
    tally.peaks.append(both[0].sub(absent, alpha=1e30).amax())
    del absent
    of = [both.sum(dim=(1, 2)), both.abs().sum(dim=(1, 2))]
    flat = both[1] > kpo.ratio_log_max
    off = both.clamp_(max=kpo.ratio_log_max).expm1_()  # ratio - 1: float32 keeps small ones exact
    tally.sums.append(torch.cat([*of, off.sum(dim=(1, 2)), off.square().sum(dim=(1, 2))]))

    cost = advantages.to(slope.dtype).neg().masked_fill_(unseen, 0.0)
    weight = None if weight is None else weight.to(slope.dtype).masked_fill(unseen, 0.0)
    del unseen
    raw, filtered = off.add_(1.0)
    clipped = torch.empty(2, *seen.shape, dtype=torch.bool, device=seen.device)
    loss = raw * cost
    torch.gt(raw.clamp_(lowest, highest).mul_(cost), loss, out=clipped[0])
    torch.mul(filtered, cost, out=loss)
    bounded = filtered.clamp_(lowest, highest).mul_(cost)
    torch.gt(bounded, loss, out=clipped[1])
    if kpo.clip:
        torch.maximum(loss, bounded, out=loss)
        flat |= clipped[1]
    if weight is not None:
        loss *= weight
    value = loss.sum(dim=-1)
    slope.copy_(loss.masked_fill_(flat, 0.0))  # d ratio / d log pi = ratio
    return clipped, value


def _counts(chain, clipped):
    """Clipped tokens, neighbouring pairs, and pairs clipped differently, raw and filtered; chain: seen and clipped."""
    pairs = chain[0, :, 1:] & chain[0, :, :-1]
    raw, filtered = (chain[1:, :, 1:] ^ chain[1:, :, :-1]).logical_and_(pairs)
    return torch.stack([part.sum(dtype=torch.int32) for part in (clipped[1], pairs, raw, filtered)])


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
        "actor/kpo_ratio_max_raw": math.exp(min(peak, 700.0)),
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
