"""KPO: a policy loss whose importance ratios are Kalman-filtered along the response (arXiv 2602.10609).

    z_t = log pi(y_t) - log pi_old(y_t)                              the token's log-ratio, an observation
    x_t = x_{t-1} + K_t (z_t - x_{t-1})                              the filtered log-ratio
    ratio_t = exp(min(log pi - sg(log pi) + sg(x_t), ratio_log_max))     value exp(x_t), gradient through log pi alone
    loss_t = max(-A_t ratio_t, -A_t clip(ratio_t, 1 - low, 1 + high))    clip=false: -A_t ratio_t

x_0 = 0; K_t: kalman/local_level.py; sg: the value without its gradient. A masked token is no observation: state and
gain index carry over it, and nothing under the mask is read.
"""

import math

import torch

from verl_krpo.config import BATCH, KpoConfig
from verl_krpo.kalman import LocalLevel, filtered_mean, noise, saturated
from verl_krpo.kalman.sequence import power_of_two, schedule


def kpo(
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    settings: KpoConfig | None = None,
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> tuple[torch.Tensor, dict[str, float]]:
    """loss_t of every token (rows, tokens), 0 under the mask, with the gradient by log_prob; and diagnostics.

    log_prob, old_log_prob (nats), advantages: (rows, tokens), any float dtype; mask: (rows, tokens), bool or 0/1. The
    arithmetic is float32 (float64 for float64 log-probs), whatever autocast says. settings, clip_low, clip_high: the
    published ones. Diagnostics: the same keys on every call, see `_diagnostics`. ValueError: a log-prob is not finite.
    """
    settings, mask = settings or KpoConfig(), mask.bool()
    dtype = torch.promote_types(log_prob.dtype, torch.float32)

    def observed(tensor: torch.Tensor) -> torch.Tensor:
        return torch.where(mask, tensor.to(dtype), 0.0)

    def losses(log_ratio: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        ratio = log_ratio.clamp(max=settings.ratio_log_max).exp()
        return -a * ratio, -a * ratio.clamp(1 - clip_low, 1 + clip_high)

    new = observed(log_prob)
    with torch.no_grad(), torch.autocast(log_prob.device.type, enabled=False):
        z, a = new - observed(old_log_prob), observed(advantages)
        model, measured_var = _model(z, mask, settings)
        if settings.innovation_clip is None:
            x, saturates = filtered_mean(z, mask, model, settings.gain), torch.zeros_like(mask)
        else:
            x, saturates = saturated.filtered_mean(z, mask, model, settings.innovation_clip, settings.gain)
        x = torch.where(mask, x, 0.0)
        loss, bounded = losses(x)
        clipped, flat = bounded > loss, x > settings.ratio_log_max
        if settings.clip:
            loss, flat = torch.maximum(loss, bounded), flat | clipped
        slope = loss.masked_fill(flat, 0.0)  # d loss / d log pi is the loss itself; 0 at a bound
        raw_loss, raw_bounded = losses(z)
        diagnostics = _diagnostics(z, x, mask, raw_bounded > raw_loss, clipped, saturates, settings, model)
        diagnostics["kpo_measurement_var"] = measured_var
        if not math.isfinite(diagnostics["ppo_kl"]):  # the mean of -z: it is here without waiting for the device again
            _require_finite("log_prob", new)
            _require_finite("old_log_prob", observed(old_log_prob))
    # The value is the loss and the gradient the slope: all that the backward pass keeps.
    return loss + slope * (new - new.detach()), diagnostics


def _model(z: torch.Tensor, mask: torch.Tensor, settings: KpoConfig) -> tuple[LocalLevel, float]:
    """The filter's model and the R to report."""
    q, r = settings.process_var, settings.measurement_var
    if r == BATCH:  # a token that is not finite is left out here and refused once all is read
        q, r = noise.by_differences(z, mask & z.isfinite(), smallest_ratio=q) or (q, 0.0)
    r = float(r)  # 0: no two neighbors differ, as in an on-policy update; nothing to measure, nothing to filter
    return LocalLevel(q, r or 1.0, 0.0, settings.init_var), r


def _require_finite(name: str, observed: torch.Tensor) -> None:
    if wrong := (~observed.isfinite()).nonzero()[:4].tolist():
        raise ValueError(
            f"kpo got {name}={[observed[row, t].item() for row, t in wrong]} at the observed (row, token) {wrong}: the "
            "policy diverged, or forbids what was sampled. Resume before that at a lower optim.lr, or mask these tokens"
        )


def _diagnostics(
    z: torch.Tensor,
    x: torch.Tensor,
    mask: torch.Tensor,
    raw_clipped: torch.Tensor,
    clipped: torch.Tensor,
    saturates: torch.Tensor,
    settings: KpoConfig,
    model: LocalLevel,
) -> dict[str, float]:
    """What verl logs under `actor/`; means are over observed tokens, `raw` is before the filter.

    pg_clipfrac, pg_clipfrac_lower   share of tokens that are clipped; 0, since there is no dual clip
    ppo_kl   mean of -z, the old log-prob minus the new one
    kpo_ratio_std_raw, kpo_ratio_std_filtered   standard deviation of the ratios; filtered is far smaller
    kpo_ratio_max_raw   the largest ratio, before ratio_log_max bounds it
    kpo_logratio_abs_mean_raw, kpo_logratio_abs_mean_filtered   mean of |z| and |x|; compare x with the clip range
    kpo_gain_last   mean over the rows of the gain at their last token; below 1e-4 the filter hardly moves
    kpo_measurement_var   R in use; with `batch` the estimate, 0 where there was nothing to measure
    kpo_innovation_clipfrac   share of tokens whose innovation saturates
    kpo_switch_raw, kpo_switch_filtered   share of neighboring tokens of which one is clipped (clip=false: would be)
    """
    count, pairs = mask.sum(dim=1), mask[:, 1:] & mask[:, :-1]
    tokens, rows = count.sum().clamp(min=1), (count > 0).sum().clamp(min=1)
    gains = schedule(model, settings.gain, power_of_two(mask.shape[1])).to(z.device)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return values.sum().double() / tokens

    def std(log_ratio: torch.Tensor) -> torch.Tensor:
        off = log_ratio.clamp(max=settings.ratio_log_max).expm1()  # ratio - 1: float32 keeps small ones exact
        return (mean(off.square()) - mean(off) ** 2).clamp(min=0).sqrt()

    def switches(clipped: torch.Tensor) -> torch.Tensor:
        return ((clipped[:, 1:] ^ clipped[:, :-1]) & pairs).sum() / pairs.sum().clamp(min=1)

    largest = torch.where(mask, z, -torch.inf).amax().exp() if mask.numel() else z.new_zeros(())
    values = {
        "pg_clipfrac": mean(clipped) * settings.clip,
        "pg_clipfrac_lower": z.new_zeros(()),
        "ppo_kl": -mean(z),
        "kpo_ratio_std_raw": std(z),
        "kpo_ratio_std_filtered": std(x),
        "kpo_ratio_max_raw": largest.clamp(max=torch.finfo(torch.float32).max),
        "kpo_logratio_abs_mean_raw": mean(z.abs()),
        "kpo_logratio_abs_mean_filtered": mean(x.abs()),
        "kpo_gain_last": (gains[count - 1] * (count > 0)).sum() / rows,
        "kpo_innovation_clipfrac": mean(saturates),
        "kpo_switch_raw": switches(raw_clipped),
        "kpo_switch_filtered": switches(clipped),
    }
    numbers = torch.stack([value.double() for value in values.values()]).tolist()  # the one wait for the device
    return dict(zip(values, numbers, strict=True))
