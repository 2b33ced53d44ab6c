"""A control for runs in verl: `algorithm.adv_estimator=none`, a reward is its own advantage.

export PYTHONPATH=scripts VERL_USE_EXTERNAL_MODULES=no_baseline
bash recipes/run_krpo_cpu.sh algorithm.adv_estimator=none
"""

import torch
from verl.trainer.ppo.core_algos import register_adv_est


@register_adv_est("none")
def no_baseline(token_level_rewards: torch.Tensor, response_mask: torch.Tensor, **_) -> tuple[torch.Tensor, ...]:
    """Advantages and returns (rows, tokens): the response's reward on each of its tokens."""
    advantages = token_level_rewards.sum(dim=-1, keepdim=True) * response_mask
    return advantages, advantages
