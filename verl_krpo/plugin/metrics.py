"""krpo/* scalars in the trainer's log.

verl gives an advantage estimator no way to report anything. So the estimator leaves its scalars here, and verl's
`Tracking.log`, which every trainer calls once a step in the process that computes advantages, takes them along
(hooks.py): they reach console, file, tensorboard and wandb alike.

    krpo/reward_mean                     mean of r_i
    krpo/baseline_mean                   mean of b_i: near the mean reward, or with weight=score below it where right
                                         answers are likely ones
    krpo/advantage_std                   standard deviation of A_i: the scale that a learning rate meets, 4 to 17
                                         published, about 1 adaptive
    krpo/groups, krpo/singletons         prompts, and those with a single response
    krpo/group_size_min                  members of the smallest group; below rollout.n responses were lost
    krpo/advantage_abs_first_over_last   mean |A_1| over mean |A_n|, of groups of two or more: 1 where places do not
                                         matter, 0.003 to 0.02 published; left out where A_n = 0

where the trainer has log-probs, with w_i = sum over the tokens of (1 - pi_t)^2 whatever `weight` says,

    krpo/score_weight_cv                 standard deviation of w_i over their mean
    krpo/gradient_var_over_rloo          sum w_i (r_i - b_i)^2 over the same with RLOO's b_i: variance of the gradient,
                                         RLOO = 1; left out where b_i knows r_i (causal, posterior, smoothed)
    krpo/gradient_var_over_none          the same with b_i = 0

where the estimator has a model (jspo has none),

    krpo/gain_first, krpo/gain_last      mean over the groups of the filter's K_1, near 1 where the first reward
                                         overrides the prior, and K_n, near 1/n where nothing is forgotten
    krpo/nis                             mean of innovation squared over its variance: 1 when Q, R and the prior fit,
                                         far above when R is too small
    krpo/measurement_var                 R, as it enters the scale
    krpo/prior_mean, krpo/prior_var      mean over the groups of the m0 and P0 that were used; P0 is 0 where prompts
                                         look alike, inf with fewer than three groups

and for krpo_memory

    krpo/memory_prompts                  prompts that are remembered
    krpo/memory_known                    share of the batch's prompts that were so before this step
    krpo/memory_age                      steps since their last visit, mean
    krpo/memory_nis                      krpo/nis of these
    krpo/memory_var                      Q a step, learned or given
    krpo/pool_low, krpo/pool_median, krpo/pool_high   quartiles, over all prompts that are remembered, of what each is
                                         expected to earn in the next step
    krpo/pool_std                        mean standard deviation of that expectation
    krpo/dead_foretold                   share of the groups of two or more that were expected to have equal rewards
    krpo/dead                            share of them that have

of them for jobs with select or allocate, of every fetch of prompts, of which the asynchronous trainers have many a step

    krpo/candidates_new                  share of the candidates that are not remembered
    krpo/effective_prompts               (sum w)^2 / sum w^2 of the weights of objective=same: so many prompts, all
                                         alike, would make the gradient as certain
    krpo/rollouts_saved                  share of rollouts saved, as foretold, to one who takes all prompts alike: at
                                         the same sum of signals, or with objective=same, and for allocate, at the same
                                         variance of the gradient

Only counted rows enter. Several estimates within one step (the last 16) are averaged; `groups` and `singletons` are
summed, and of `group_size_min` the smallest is kept. Nothing is computed before a log asks for it.
"""

from collections import deque
from typing import Any, NamedTuple

import numpy as np
import torch

from verl_krpo import choice
from verl_krpo.advantage.estimate import Estimate
from verl_krpo.advantage.groups import sum_of_others
from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.config import Baseline, KrpoConfig, MemoryConfig
from verl_krpo.kalman import LocalLevel, innovations

QUARTILES = {"low": 0.25, "median": 0.5, "high": 0.75}
_MERGE = {"krpo/groups": sum, "krpo/singletons": sum, "krpo/group_size_min": min}


class Visit(NamedTuple):
    """krpo_memory before and after a step."""

    before: PromptMemory
    after: PromptMemory
    step: int


class Record(NamedTuple):
    """An estimate, the keys of its estimator, the score weights of its rows, and the memory's visit."""

    estimate: Estimate
    settings: Any
    scores: torch.Tensor | None = None
    visit: Visit | None = None


_pending: deque[Record] = deque(maxlen=16)  # bounded, for where nothing ever logs
_noted: deque[dict[str, float]] = deque(maxlen=16)


def scalars(
    estimate: Estimate, settings: Any, scores: torch.Tensor | None = None, visit: Visit | None = None
) -> dict[str, float]:
    """The metrics of one estimate. scores: score weights (rows,)."""
    groups = estimate.groups
    if not len(groups.labels):
        return {"krpo/groups": 0}
    last = (groups.sizes - 1)[:, None]
    size = torch.cat([estimate.advantage[:, :1], estimate.advantage.gather(1, last)], dim=1).abs() * (last > 0)
    first, final = size.sum(dim=0).tolist()
    result = {
        "krpo/reward_mean": estimate.rewards[groups.mask].mean().item(),
        "krpo/baseline_mean": estimate.baseline[groups.mask].mean().item(),
        "krpo/advantage_std": estimate.advantage[groups.mask].std(correction=0).item(),
        "krpo/groups": len(groups.labels),
        "krpo/group_size_min": groups.sizes.min().item(),
        "krpo/singletons": (last == 0).sum().item(),
    }
    if final > 0:
        result["krpo/advantage_abs_first_over_last"] = first / final
    own = isinstance(settings, KrpoConfig) and settings.baseline not in (Baseline.predicted, Baseline.leave_one_out)
    if scores is not None:
        result |= _gradient(estimate, groups.gather(scores), own)
    if estimate.model is not None:
        result |= _model(estimate, estimate.model, visit, settings)
    return result


def _gradient(estimate: Estimate, scores: torch.Tensor, own: bool) -> dict[str, float]:
    """How much the scores differ, and the variance of the gradient beside RLOO's and that without a baseline."""
    members = scores[estimate.groups.mask]
    if not (mean := members.mean().item()):  # no response has a score
        return {}
    result = {"krpo/score_weight_cv": members.std(correction=0).item() / mean}
    if own:
        return result
    rewards, others = estimate.rewards, (estimate.groups.sizes - 1).clamp(min=1)[:, None]
    rloo = sum_of_others(rewards, dim=1) / others  # of a single response 0, as verl has it
    for name, baseline in (("rloo", rloo), ("none", 0.0)):
        if theirs := (scores * (rewards - baseline).square()).sum().item():
            mine = (scores * (rewards - estimate.baseline).square()).sum().item()
            result[f"krpo/gradient_var_over_{name}"] = mine / theirs
    return result


def _model(estimate: Estimate, model: LocalLevel, visit: Visit | None, settings: Any) -> dict[str, float]:
    """How well the model fits, and the parameters that were used."""
    groups, weights = estimate.groups, estimate.weights
    _, measurement_var, init_mean, init_var = model.columns(len(groups.labels), weights.device)
    innovation, var = innovations(estimate.rewards, groups.mask, model, weights)
    noise_var = measurement_var[:, None] / weights
    gain = torch.where(noise_var.isfinite(), 1 - noise_var / var, 0.0)
    last = (groups.sizes - 1)[:, None]
    gain_first, gain_last = torch.cat([gain[:, :1], gain.gather(1, last)], dim=1).mean(dim=0).tolist()
    fit, fits = innovation.square() / var, groups.mask & var.isfinite()
    result = {
        "krpo/gain_first": gain_first,
        "krpo/gain_last": gain_last,
        "krpo/measurement_var": estimate.scale_var,
        "krpo/prior_mean": init_mean.mean().item(),
        "krpo/prior_var": init_var.mean().item(),
    }
    if fits.any():
        result["krpo/nis"] = fit[fits].mean().item()
    if visit is not None:
        result |= _memory(visit, settings, estimate, fit, fits)
    return result


def _memory(
    visit: Visit, settings: MemoryConfig, estimate: Estimate, fit: torch.Tensor, fits: torch.Tensor
) -> dict[str, float]:
    groups = estimate.groups
    visits = visit.before.recall(groups.labels, visit.step)
    known = visits.known
    result = {"krpo/memory_prompts": len(visit.after), "krpo/memory_known": known.double().mean().item()}
    several = (groups.sizes > 1).cpu().numpy()
    if several.any():
        first = estimate.rewards[:, :1]
        dead = ((estimate.rewards == first) | ~groups.mask).all(dim=1).cpu().numpy()
        result["krpo/dead"] = dead[several].mean().item()
        if visit.before.weight:
            forecast = visit.before.forecast(groups.labels[several], visit.step, settings.memory_var)
            result["krpo/dead_foretold"] = choice.dead(*forecast, groups.sizes.cpu().numpy()[several]).mean().item()
    if (model := visit.after.model(settings.memory_var)) is not None:
        result["krpo/memory_var"] = model.numbers()[0]
        pool = visit.after.forecast(None, visit.step + 1, settings.memory_var)
        quartiles = np.quantile(pool.mean, list(QUARTILES.values())).tolist()
        result |= {f"krpo/pool_{name}": value for name, value in zip(QUARTILES, quartiles, strict=True)}
        result["krpo/pool_std"] = float(pool.std.mean())
    if known.any():
        result["krpo/memory_age"] = visits.age[known].double().mean().item()
        result["krpo/memory_nis"] = fit[fits & known.to(fits.device)[:, None]].mean().item()
    return result


def record(estimate: Estimate, settings: Any, scores: torch.Tensor | None = None, visit: Visit | None = None) -> None:
    """Keep an estimate until the next log."""
    _pending.append(Record(estimate, settings, scores, visit))


def note(values: dict[str, float]) -> None:
    """Keep scalars until the next log."""
    _noted.append(values)


def discard() -> None:
    """Forget what was recorded."""
    _pending.clear()
    _noted.clear()


def drain() -> dict[str, float]:
    """The metrics of what was recorded since the last call, merged."""
    steps = [scalars(*recorded) for recorded in _pending] + list(_noted)
    discard()
    keys = {key: None for step in steps for key in step}
    return {key: _MERGE.get(key, _mean)([step[key] for step in steps if key in step]) for key in keys}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)
