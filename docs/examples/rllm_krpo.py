"""rLLM: `krpo_adaptive` as its advantage estimator, weighted by the score, and `kpo` as its loss.

    import rllm_krpo                                                       # before the trainer is made
    AgentTrainer(..., traj_group_adv_estimator_map={ROLE: "krpo_adaptive"})  # for each role; there is no key for it

Since its #537 rLLM computes advantages itself: verl's algorithm.adv_estimator=krpo is never called there. verl's losses
are: with this package installed rllm.algorithm.loss_fn=kpo is verl's kpo. Other backends reach it by `register_loss` of
rLLM's branch terminal-rl, with rllm.algorithm.loss_plugins=[rllm_krpo]. Checked: main 9beb6e0f, terminal-rl a5fa9aa1.
"""

from importlib.util import find_spec

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence

from verl_krpo import kpo, krpo_adaptive, score_weights


def krpo_estimator(rewards, algorithm_config, traj_groups, **_):
    """(advantages, returns), each a list of arrays as `rewards`, one a group."""
    sizes = [len(group) for group in rewards]
    prompts = [number for number, size in enumerate(sizes) for _ in range(size)]
    steps = [[step.logprobs for step in each.steps] for group in traj_groups for each in group.trajectories]
    if not all(log_prob for each in steps for log_prob in each):
        raise ValueError("a step has no logprobs: have the rollout collect them, or leave the weights out here")
    weights = trajectory_weights(steps, algorithm_config.loss_agg_mode or "token-mean")
    advantages = krpo_adaptive(np.concatenate(rewards), prompts, weights=weights).advantages().numpy()
    by_group = np.split(advantages, np.cumsum(sizes)[:-1])
    return by_group, by_group


def trajectory_weights(steps: list[list[list[float]]], loss_agg_mode: str) -> torch.Tensor:
    """w of every trajectory, (rows,), from the log-probs of its steps: each step is a sequence of the loss."""
    flat = [torch.tensor(log_prob) for each in steps for log_prob in each]
    mask = pad_sequence([torch.ones_like(log_prob) for log_prob in flat], batch_first=True)
    weights = score_weights(pad_sequence(flat, batch_first=True), mask, loss_agg_mode)
    return torch.stack([part.sum() for part in weights.split([len(each) for each in steps])])


def kpo_loss(ctx):
    """(loss, metrics) of rLLM's LossContext: (rows, tokens), or (tokens,) where a backend gives one sequence."""
    named = (ctx.logp_curr, ctx.logp_old, ctx.advantages, ctx.action_mask)
    clip = dict(clip_low=ctx.params.get("clip_low", 3e-4), clip_high=ctx.params.get("clip_high", 4e-4))
    losses, diagnostics = kpo(*(torch.atleast_2d(tensor) for tensor in named), **clip)
    return ctx.aggregate(losses.view_as(ctx.logp_curr), ctx.action_mask), diagnostics


def register():
    from rllm.trainer.algorithms import advantage

    advantage.register_rllm_adv_estimator("krpo_adaptive")(krpo_estimator)
    if hasattr(advantage, "register_adv_estimator"):  # terminal-rl
        from rllm.trainer.algorithms.loss import register_loss

        register_loss("kpo")(kpo_loss)


if find_spec("rllm"):
    register()
