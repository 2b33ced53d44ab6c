"""Policy losses by name: verl's own by their `loss_mode`, the product's `kpo` among them, and REINFORCE."""

import functools
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Loss(NamedTuple):
    """verl's loss_mode, its clip range, and keys of policy_loss.kpo."""

    mode: str
    low: float = 0.2
    high: float = 0.2
    kpo: tuple[tuple[str, object], ...] = ()


def _kpo(low: float = 3e-4, high: float = 4e-4, **keys: object) -> Loss:
    return Loss("kpo", low, high, tuple(keys.items()))


LOSSES = {
    "reinforce": None,
    "vanilla": Loss("vanilla"),
    "vanilla_tight": Loss("vanilla", 3e-4, 4e-4),
    "vanilla_clip0.004": Loss("vanilla", 4e-3, 4e-3),
    "gspo": Loss("gspo", 3e-4, 4e-4),
    "gspo_clip0.004": Loss("gspo", 4e-3, 4e-3),
    "gmpo": Loss("geo_mean", 0.4, 0.4),
    "cispo": Loss("cispo"),
    "kpo": _kpo(),
    "kpo_unclipped": _kpo(process_var=1e-4, clip=False),
    "kpo_steady": _kpo(gain="steady"),
    "kpo_measured": _kpo(measurement_var="batch"),
    "kpo_innovation_clip": _kpo(measurement_var="batch", innovation_clip=3.0),
}
LOSSES |= {
    f"kpo_Q{q:g}_clip{clip:g}": _kpo(clip, clip, process_var=q)
    for q in (1e-4, 1e-3, 1e-2)
    for clip in (4e-3, 2e-2, 1e-1)
}


@functools.cache
def of_verl(loss: Loss, loss_agg_mode: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """(old_log_prob, log_prob, advantages, mask), all (rows, tokens), -> the loss."""
    from hydra import compose, initialize_config_module
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.utils.config import omega_conf_to_dataclass

    actor = "actor_rollout_ref.actor"
    overrides = [f"{actor}.ppo_micro_batch_size_per_gpu=1", "actor_rollout_ref.rollout.n=2"]
    overrides += [f"{actor}.clip_ratio_low={loss.low}", f"{actor}.clip_ratio_high={loss.high}"]
    if loss.mode == "kpo":
        overrides += [f"+actor@{actor}.policy_loss=kpo"]
        overrides += [f"{actor}.policy_loss.kpo.{key}={value}" for key, value in loss.kpo]
    else:
        overrides += [f"{actor}.policy_loss.loss_mode={loss.mode}"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = omega_conf_to_dataclass(compose("ppo_trainer", overrides=overrides).actor_rollout_ref.actor)
    config.global_batch_info.update(dp_size=1, batch_num_tokens=None, global_batch_size=None, loss_scale_factor=None)
    function = get_policy_loss_fn(loss.mode)

    def objective(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
        return function(
            old_log_prob=old_log_prob,
            log_prob=log_prob,
            advantages=advantages.expand_as(log_prob),
            response_mask=mask.to(log_prob.dtype),
            loss_agg_mode=loss_agg_mode,
            config=config,
            rollout_is_weights=None,
        )[0]

    return objective


def reinforce(log_prob: Tensor, advantages: Tensor, mask: Tensor, whole: Tensor, loss_agg_mode: str) -> Tensor:
    """The loss whose gradient is the policy gradient, every ratio at 1; in all modes it is a mean of -A log pi.

    whole: mask of the mini-batch; rows of it without advantage may be missing among the others, but count.
    """
    values = -advantages * log_prob * mask
    if loss_agg_mode == "seq-mean-token-mean":
        return (values.sum(1) / mask.sum(1)).sum() / len(whole)
    return values.sum() / whole.sum()
