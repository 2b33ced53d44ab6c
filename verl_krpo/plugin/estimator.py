"""verl's advantage estimators `krpo`, `krpo_adaptive`, `krpo_memory`: verl's arguments in, verl's answers out."""

from typing import Any

import torch

from verl_krpo.advantage.krpo import krpo
from verl_krpo.config import Memory, krpo_settings
from verl_krpo.plugin import metrics, prompt_memory, sessions


def compute_advantage(
    token_level_rewards: torch.Tensor,
    response_mask: torch.Tensor,
    config: Any = None,
    index: Any = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """verl's advantage estimator, under every name of PRESETS.

    token_level_rewards, response_mask: (rows, tokens). A row's reward is the sum of the whole row: it sits on the last
    token, which may be masked. config: verl's `algorithm` node, with or without `krpo`. index: (rows,) prompt ids.
    Returns (advantages, returns), both the same (rows, tokens) tensor: A_i times the mask. A row whose mask is all
    zero (padding, a rejected response) has advantage 0 and is no member of its group.

    ValueError names the rows and prompts of rewards that are not finite, or the wrong key of `algorithm.krpo`.
    RuntimeError: the trainer would count a session of several outputs more than once, or tells a memory no prompts.
    """
    sessions.check_trainer()
    settings = krpo_settings(config)
    with torch.no_grad():
        dtype = torch.promote_types(token_level_rewards.dtype, torch.float32)
        rewards = token_level_rewards.sum(dim=-1, dtype=dtype)
        mask = response_mask.bool()
        if settings.memory == Memory.none:
            estimate = krpo(rewards, index, settings, counted=mask.any(dim=-1))
        else:
            run = prompt_memory.run()
            estimate = krpo(rewards, run.prompts(index), settings, mask.any(dim=-1), run.memory, run.step)
            assert estimate.memory is not None  # where one goes in, one comes out
            run.memory = estimate.memory
        metrics.record(estimate, settings)
        advantages = torch.where(mask, estimate.advantages().to(dtype)[:, None], 0.0)
    return advantages, advantages
