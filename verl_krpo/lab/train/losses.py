"""Policy losses by name: verl's own by their `loss_mode`, the product's `kpo` among them, REINFORCE, and two that are
verl's clipped loss of other numbers.

minpro      the smallest ratio of the tokens before it stands for the product of their ratios (arXiv 2601.22718)

                loss_t = max(-A m_t ratio_t, -A m_t clip(ratio_t)),   m_t = sg(min(ratio_1 .. ratio_{t-1})),   m_1 = 1

            The paper's own clipping was not at hand: the range of 0.2 and 0.28 is that of a public recipe, and which
            of the two factors it bounds is our choice.
kpo_token   KPO whose noise follows the token, R_t = R (1 - pi_old(y_t))^2: a log-ratio's gradient by the logits is as
            large as 1 - pi, so that those of certain tokens hardly vary
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from verl_krpo.kalman import LocalLevel, filtered

Given = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


class Loss(NamedTuple):
    """verl's loss_mode, its clip range, and keys of policy_loss.kpo.

    given: of (old_log_prob, log_prob, advantages, mask), the (old_log_prob, advantages) that verl's function is given.
    """

    mode: str
    low: float = 0.2
    high: float = 0.2
    kpo: tuple[tuple[str, object], ...] = ()
    given: Given | None = None


def _kpo(low: float = 3e-4, high: float = 4e-4, **keys: object) -> Loss:
    return Loss("kpo", low, high, tuple(keys.items()))


@torch.no_grad()
def minimum_prefix(old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The advantages times m_t."""
    z = torch.where(mask, log_prob - old_log_prob, torch.inf)
    before = torch.nn.functional.pad(z, (1, -1), value=torch.inf).cummin(1).values
    return old_log_prob, advantages * torch.where(before.isinf(), 0.0, before).exp()


@torch.no_grad()
def token_noise(
    old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, mask: Tensor, *, process_var: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """Old log-probs to which the ratio is exp(x_t), the state after token t where R = 1.

    1 - pi is at least 1e-8, about what float32 can tell from 0.
    """
    apart = -torch.where(mask, old_log_prob, -1.0).double().expm1()
    weights = apart.clamp_min(1e-8) ** -2
    x, _ = filtered(log_prob - old_log_prob, mask, LocalLevel(process_var, 1.0), weights)
    return log_prob - x, advantages


def _kpo_token(low: float = 3e-4, high: float = 4e-4, **model: float) -> Loss:
    return Loss("vanilla", low, high, given=functools.partial(token_noise, **model))


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
    "minpro": Loss("vanilla", 0.2, 0.28, given=minimum_prefix),
    "kpo_token": _kpo_token(),
    "kpo_token_Q0.001_clip0.004": _kpo_token(4e-3, 4e-3, process_var=1e-3),
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
        if loss.given:
            old_log_prob, advantages = loss.given(old_log_prob, log_prob, advantages, mask)
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
