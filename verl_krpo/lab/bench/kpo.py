"""What the KPO loss costs, forward and backward with every metric, against verl's `vanilla` and the published loss,
the latter re-implemented from its description."""

import functools
import statistics
from collections.abc import Callable
from types import SimpleNamespace

import torch

from verl_krpo.config import Gain, KpoConfig
from verl_krpo.lab.bench.filter import published
from verl_krpo.lab.bench.timing import median_ratio, paired, peak_bytes

SHAPES = ((8, 4096), (8, 16384), (2, 131072))
MODE = "seq-mean-token-mean"


class _Config(SimpleNamespace):
    def get(self, key, default=None):
        return getattr(self, key, default)


def actor_config(kpo: KpoConfig | None = None) -> _Config:
    """As much of verl's actor config as the losses read, with KPO's clip range."""
    return _Config(
        clip_ratio=0.2,
        clip_ratio_low=3e-4,
        clip_ratio_high=4e-4,
        clip_ratio_c=3.0,
        global_batch_info={},
        policy_loss=_Config(kpo=kpo),
    )


def published_loss(old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config):
    """The published loss from its description, everything that it computes included.

    `filter.published` filters. The loss logs the mean filtered ratio beside what verl's losses log, and takes the
    unfiltered ratio and that mean once more for its debugging output.
    """
    from verl.trainer.ppo.core_algos import agg_loss
    from verl.utils.torch_functional import masked_mean

    log_ratio = log_prob - old_log_prob
    with torch.no_grad():
        filtered = published(log_ratio.detach(), response_mask)
    ratio = (log_prob - log_prob.detach() + filtered).clamp(max=10.0).exp()
    loss = -advantages * ratio
    bounded = -advantages * ratio.clamp(1 - config.clip_ratio_low, 1 + config.clip_ratio_high)
    total = agg_loss(torch.maximum(loss, bounded), response_mask, loss_agg_mode)
    clipfrac = masked_mean((bounded > loss).float(), response_mask)
    kl = masked_mean(-(log_prob - old_log_prob), response_mask)
    metrics = {
        "actor/pg_clipfrac": clipfrac.item(),
        "actor/ppo_kl": kl.item(),
        "actor/pg_clipfrac_lower": 0.0,
        "actor/sequence_ratio_mean": ratio.detach().mean().item(),
    }
    _debug = log_ratio.exp().detach(), ratio.detach().mean().item(), clipfrac.item()
    return total, metrics


def losses() -> dict[str, Callable]:
    """What is compared, by name; each takes (old_log_prob, log_prob, advantages, response_mask)."""
    from verl.trainer.ppo.core_algos import compute_policy_loss_vanilla

    from verl_krpo.plugin.loss import compute_policy_loss

    def bound(loss, kpo=None):
        config = actor_config(kpo)
        return lambda *tensors: loss(*tensors, MODE, config)

    measuring = bound(compute_policy_loss, KpoConfig(measurement_var="batch"))

    def measuring_anew(old_log_prob, *tensors):
        # By the last digit other data each time: in training no call finds the gains that the last one has made.
        old_log_prob.mul_(1 + 2**-23)
        return measuring(old_log_prob, *tensors)

    return {
        "vanilla": bound(compute_policy_loss_vanilla),
        "published": bound(published_loss),
        "kpo": bound(compute_policy_loss),
        "kpo, clip=false": bound(compute_policy_loss, KpoConfig(clip=False)),
        "kpo, gain=steady": bound(compute_policy_loss, KpoConfig(gain=Gain.steady)),
        "kpo, measurement_var=batch": measuring_anew,
        "kpo, innovation_clip=3": bound(compute_policy_loss, KpoConfig(measurement_var=1e-4, innovation_clip=3.0)),
    }


def batch(rows: int, width: int, holes: bool, device: str, seed: int = 0) -> tuple[torch.Tensor, ...]:
    """Responses of width/2 to width tokens, log-ratios of standard deviation 0.01; `holes`: a tenth is masked."""
    make = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, width, generator=make)
    new = old + 0.01 * torch.randn(rows, width, generator=make)
    advantages = torch.randn(rows, 1, generator=make).repeat(1, width)
    mask = torch.arange(width) < torch.randint(width // 2, width + 1, (rows, 1), generator=make)
    if holes:
        mask &= torch.rand(rows, width, generator=make) > 0.1
    return old.to(device), new.to(device).requires_grad_(), advantages.to(device), mask.to(device)


def step(loss: Callable, tensors: tuple[torch.Tensor, ...]) -> None:
    """One forward and backward pass."""
    loss(*tensors)[0].backward()
    tensors[1].grad = None


def table(rounds: int, device: str) -> list[dict]:
    """One row a shape, mask and loss."""
    return [row for shape in SHAPES for holes in (False, True) for row in _rows(*shape, holes, rounds, device)]


def _rows(rows: int, width: int, holes: bool, rounds: int, device: str) -> list[dict]:
    tensors = batch(rows, width, holes, device)
    calls = {name: functools.partial(step, loss, tensors) for name, loss in losses().items()}
    if holes:
        calls = {name: calls[name] for name in ("vanilla", "published", "kpo")}
    times = paired(calls, rounds, device)
    return [
        {
            "rows x tokens": f"{rows} x {width:,}",
            "mask": "holes" if holes else "padding",
            "loss": name,
            "ms": statistics.median(times[name]) * 1e3,
            "/ vanilla": median_ratio(times[name], times["vanilla"]),
            "/ published": median_ratio(times[name], times["published"]),
            "peak extra memory / log-probs": peak_bytes(call, device) / tensors[1].nbytes,
        }
        for name, call in calls.items()
    ]
