"""verl's policy loss `kpo`: verl's arguments in, verl's answers out."""

from typing import Any

import torch

from verl_krpo.config import KPO_AT, KpoConfig, read


def compute_policy_loss(
    old_log_prob: torch.Tensor,
    log_prob: torch.Tensor,
    advantages: torch.Tensor,
    response_mask: torch.Tensor,
    loss_agg_mode: str = "seq-mean-token-mean",
    config: Any = None,
    rollout_is_weights: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, dict[str, float]]:
    """The KPO loss, registered in verl as `loss_mode=kpo`.

    old_log_prob, log_prob, advantages, response_mask (bool or 0/1) and rollout_is_weights: (rows, tokens). config:
    verl's actor config; `clip_ratio*`, `global_batch_info` and `policy_loss.kpo` are read. Returns the loss aggregated
    by verl's agg_loss and the metrics, the same keys on every call.
    ValueError: an invalid `policy_loss.kpo`, or a loss_agg_mode that verl does not have.
    """
    from verl.trainer.ppo.core_algos import agg_loss

    from verl_krpo.policy_loss.kpo import kpo

    settings = settings_of(config)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    mask = response_mask.bool()
    losses, diagnostics = kpo(log_prob, old_log_prob, advantages, mask, settings, clip_low=low, clip_high=high)
    if rollout_is_weights is not None:
        losses = losses * torch.where(mask, rollout_is_weights.to(losses.dtype), 0.0)
    with torch.autocast(losses.device.type, enabled=False):
        loss = agg_loss(losses, mask, loss_agg_mode, **_counts(config.global_batch_info, mask))
    return loss, {f"actor/{name}": value for name, value in diagnostics.items()}


def settings_of(config: Any) -> KpoConfig:
    """`policy_loss.kpo` of an actor config in its typed form; the published defaults where it is missing."""
    return read(KpoConfig, config.policy_loss.get("kpo"), KPO_AT)


def _counts(global_batch_info: dict[str, Any], mask: torch.Tensor) -> dict[str, Any]:
    """verl's global_batch_info; what agg_loss would count in this mask is at least 1, so that an empty one gives 0.

    With dp_size > 1 they stay unset, and agg_loss raises if they are missing.
    """
    info = dict(global_batch_info)
    if info.get("dp_size", 1) == 1:
        for key, count in (("batch_num_tokens", mask.sum()), ("global_batch_size", mask.any(dim=1).sum())):
            if info.get(key) is None:
                info[key] = count.clamp(min=1)
    return info
