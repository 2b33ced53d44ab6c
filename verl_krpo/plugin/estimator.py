"""verl's advantage estimators, under every name of ESTIMATORS: verl's arguments in, verl's answers out."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from verl_krpo.advantage import ESTIMATORS, settings_of
from verl_krpo.config import MemoryConfig, Weight
from verl_krpo.plugin import metrics, prompt_memory, scores, sessions


def compute_advantage(
    name: str,
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    index: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The estimator `name`, as verl calls it.

    token_level_rewards, response_mask: (rows, tokens). A row's reward is the sum of the whole row: it sits on the last
    token, which may be masked. config: verl's `algorithm` node, with or without `name`. index: (rows,) prompt ids.
    Returns (advantages, returns), both the same (rows, tokens) tensor: A_i times the mask. A row whose mask is all
    zero (padding, a rejected response) has advantage 0 and is no member of its group.

    ValueError names the rows and prompts of rewards that are not finite, or the wrong key of `algorithm.<name>`.
    RuntimeError: the trainer would count a session of several outputs more than once, tells a memory no prompts, or
    has no log-probs for weights.
    """
    sessions.check_trainer()
    settings = settings_of(name, config)
    with torch.no_grad():
        dtype = torch.promote_types(token_level_rewards.dtype, torch.float32)
        rewards = token_level_rewards.sum(dim=-1, dtype=dtype)
        mask = response_mask.bool()
        found = scores.at_hand()
        weights, counted = scores.chosen(name, getattr(settings, "weight", Weight.none), found), mask.any(dim=-1)
        visit = None
        if isinstance(settings, MemoryConfig):
            run = prompt_memory.run()
            before, prompts = run.memory, run.prompts(index)
            estimate, run.memory = ESTIMATORS[name].estimate(
                rewards, prompts, before, settings, weights, run.step, counted
            )
            visit = metrics.Visit(before, run.memory, run.step)
        else:
            estimate = ESTIMATORS[name].estimate(rewards, index, settings, weights, counted)
        metrics.record(estimate, settings, found.get(Weight.score), visit)
        by_row = estimate.advantages()
        if isinstance(settings, MemoryConfig):
            by_row = prompt_memory.run().weigh(by_row, index)
        advantages = torch.where(mask, by_row.to(dtype)[:, None], 0.0)
    return advantages, advantages


# As verl registers them: a function of its own for every name.
BY_NAME: dict[str, Callable] = {
    name: functools.update_wrapper(functools.partial(compute_advantage, name), compute_advantage) for name in ESTIMATORS
}
