"""krpo/* scalars in the trainer's log.

verl gives an advantage estimator no way to report anything. So the estimator leaves its scalars here, and verl's
`Tracking.log`, which every trainer calls once a step in the process that computes advantages, takes them along
(hooks.py): they reach console, file, tensorboard and wandb alike.

    krpo/advantage_std                   standard deviation of A_i: the scale that a learning rate meets, 4 to 17
                                         published, about 1 adaptive
    krpo/advantage_abs_first_over_last   mean |A_1| over mean |A_n|, of groups of two or more: 1 where places do not
                                         matter, 0.003 to 0.02 published; left out where A_n = 0
    krpo/baseline_mean                   mean of b_i, follows the mean reward
    krpo/gain_first, krpo/gain_last      mean over the groups of the filter's K_1, near 1 where the first reward
                                         overrides the prior, and K_n, near 1/n where nothing is forgotten
    krpo/nis                             mean of innovation squared over its variance: 1 when Q, R and the prior fit,
                                         far above when R is too small
    krpo/measurement_var                 R, as it enters the scale; with `batch` the estimate
    krpo/prior_mean, krpo/prior_var      mean over the groups of the m0 and P0 that were used; P0 is 0 where prompts
                                         look alike, inf with fewer than three groups
    krpo/groups, krpo/singletons         prompts, and those with a single response
    krpo/group_size_min                  members of the smallest group; below rollout.n responses were lost

and with memory=prompt

    krpo/memory_prompts                  prompts that are remembered
    krpo/memory_known                    share of the batch's prompts that were so before this step
    krpo/memory_age                      steps since their last visit, mean
    krpo/memory_nis                      krpo/nis of these
    krpo/memory_var                      Q a step, learned or given

Only counted rows enter. Several estimates within one step (the last 16) are averaged; `groups` and `singletons` are
summed, and of `group_size_min` the smallest is kept. Nothing is computed before a log asks for it.
"""

from collections import deque

import torch

from verl_krpo.advantage.krpo import Estimate
from verl_krpo.advantage.memory import PromptMemory, Visits
from verl_krpo.config import KrpoConfig
from verl_krpo.kalman import LocalLevel, innovations

_MERGE = {"krpo/groups": sum, "krpo/singletons": sum, "krpo/group_size_min": min}
_pending: deque[tuple[Estimate, KrpoConfig]] = deque(maxlen=16)  # bounded, for where nothing ever logs


def scalars(estimate: Estimate, settings: KrpoConfig) -> dict[str, float]:
    """The metrics of one estimate."""
    groups, prior = estimate.groups, estimate.prior
    if not len(groups.labels):
        return {"krpo/groups": 0}
    model = LocalLevel(settings.process_var, prior.measurement_var, prior.init_mean, prior.init_var)
    innovation, innovation_var = innovations(estimate.rewards, groups.mask, model)
    gain_of = 1 - prior.measurement_var[:, None] / innovation_var
    innovation_var = innovation_var + (prior.scale_var - prior.measurement_var)[:, None]
    last = (groups.sizes - 1)[:, None]
    gain = torch.cat([gain_of[:, :1], gain_of.gather(1, last)], dim=1)
    size = torch.cat([estimate.advantage[:, :1], estimate.advantage.gather(1, last)], dim=1).abs() * (last > 0)

    def members(matrix: torch.Tensor) -> torch.Tensor:
        return matrix[groups.mask]

    fit, fits = innovation.square() / innovation_var, groups.mask & innovation_var.isfinite()
    nis = fit[fits]
    first, final = size.sum(dim=0).tolist()
    gain_first, gain_last = gain.mean(dim=0).tolist()
    result = {
        "krpo/baseline_mean": members(estimate.baseline).mean().item(),
        "krpo/gain_first": gain_first,
        "krpo/gain_last": gain_last,
        "krpo/advantage_std": members(estimate.advantage).std(correction=0).item(),
        "krpo/measurement_var": prior.scale_var[0].item(),
        "krpo/prior_mean": prior.init_mean.mean().item(),
        "krpo/prior_var": prior.init_var.mean().item(),
        "krpo/groups": len(groups.labels),
        "krpo/group_size_min": groups.sizes.min().item(),
        "krpo/singletons": (last == 0).sum().item(),
    }
    if final > 0:
        result["krpo/advantage_abs_first_over_last"] = first / final
    if len(nis):
        result["krpo/nis"] = nis.mean().item()
    if estimate.memory is not None and estimate.visits is not None:
        result |= _memory(estimate.memory, estimate.visits, settings, fit, fits)
    return result


def _memory(
    memory: PromptMemory, visits: Visits, settings: KrpoConfig, fit: torch.Tensor, fits: torch.Tensor
) -> dict[str, float]:
    known = visits.known
    result = {"krpo/memory_prompts": len(memory), "krpo/memory_known": known.double().mean().item()}
    noise = memory.noise(settings.memory_var)
    if noise:
        result["krpo/memory_var"] = noise.ratio * noise.init_var
    if known.any():
        result["krpo/memory_age"] = visits.age[known].double().mean().item()
        result["krpo/memory_nis"] = fit[fits & known.to(fits.device)[:, None]].mean().item()
    return result


def record(estimate: Estimate, settings: KrpoConfig) -> None:
    """Keep a `krpo.Estimate` until the next log."""
    _pending.append((estimate, settings))


def discard() -> None:
    """Forget what was recorded."""
    _pending.clear()


def drain() -> dict[str, float]:
    """The metrics of what was recorded since the last call, merged."""
    steps = [scalars(*recorded) for recorded in _pending]
    _pending.clear()
    keys = {key: None for step in steps for key in step}
    return {key: _MERGE.get(key, _mean)([step[key] for step in steps if key in step]) for key in keys}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
