"""Rewards to advantages, every method by its name: verl's own, the product's, and those published beside it.

A method is made anew for every run, for some keep a state; then it takes one batch after the other.
"""

import copy
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from verl_krpo.advantage.krpo import krpo
from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.config import ADAPTIVE, MEMORY, Baseline, KrpoConfig, Order, Scale
from verl_krpo.lab.simulate import simulate


class Batch(NamedTuple):
    """rewards, lengths: (prompts, size), keys: what identifies a prompt that comes again, step: from 0.

    prompts: (prompts, tokens), first: the model that training begins with; what a value network reads, and starts from.
    """

    rewards: Tensor
    lengths: Tensor
    keys: list[str]
    step: int
    prompts: Tensor
    first: torch.nn.Module


Method = Callable[[Batch], Tensor]  # -> advantages (prompts, size)


def _simulated(estimator: simulate.Estimator) -> Callable[[], Method]:
    return lambda: lambda batch: torch.from_numpy(np.ascontiguousarray(estimator(batch.rewards.numpy())[1]))


def _verl(name: str, **options) -> Callable[[], Method]:
    return _simulated(simulate.with_verl(name, **options))


def _krpo(settings: KrpoConfig) -> Callable[[], Method]:
    # Samples of one prompt are exchangeable here, so that there is nothing to shuffle.
    return _simulated(simulate.with_krpo(dataclasses.replace(settings, order=Order.arrival)))


def _sorted(settings: KrpoConfig, key: Callable[[Batch], Tensor]) -> Callable[[], Method]:
    """The filter goes through a group from the smallest key to the largest."""
    inner = _krpo(settings)()

    def method(batch: Batch) -> Tensor:
        order = key(batch).argsort(dim=1, stable=True)
        advantage = inner(batch._replace(rewards=batch.rewards.gather(1, order)))
        return torch.empty_like(advantage).scatter_(1, order, advantage)

    return lambda: method


def _variance_only() -> Method:
    """The group's mean as in GRPO, over the published filter's standard deviation."""
    settings = KrpoConfig(order=Order.arrival)

    def method(batch: Batch) -> Tensor:
        uids = np.repeat(np.arange(len(batch.rewards)), batch.rewards.shape[1])
        estimate = krpo(batch.rewards.flatten(), uids, settings)
        std = estimate.groups.scatter(estimate.baseline_var).view_as(batch.rewards).sqrt()
        return (batch.rewards - batch.rewards.mean(1, keepdim=True)) / (std + settings.epsilon)

    return method


def _memory() -> Method:
    memory = PromptMemory()

    def method(batch: Batch) -> Tensor:
        nonlocal memory
        keys = np.repeat(np.array(batch.keys, dtype=object), batch.rewards.shape[1])
        estimate = krpo(batch.rewards.flatten(), keys, MEMORY, memory=memory, step=batch.step)
        memory = estimate.memory
        return estimate.advantages().view_as(batch.rewards)

    return method


def _spo(keep: float = 0.9, start: float = 8.0) -> Method:
    """SPO's tracker (arXiv 2509.13232): a Beta a prompt, A = r - its mean before this step, whitened over the batch.

    `keep` of the past is kept a visit; SPO lets it follow the policy's KL, in 0.875..0.96. A new prompt begins with the
    batch's mean, worth `start` responses (SPO: eight responses sampled beforehand).
    """
    state: dict[str, tuple[float, float]] = {}

    def method(batch: Batch) -> Tensor:
        mean = float(batch.rewards.mean())
        known = [state.get(key, (start * mean, start * (1 - mean))) for key in batch.keys]
        value = torch.tensor([right / max(right + wrong, 1e-8) for right, wrong in known], dtype=torch.float64)
        for key, (right, wrong), own in zip(batch.keys, known, batch.rewards, strict=True):
            state[key] = keep * right + float(own.sum()), keep * wrong + float((1 - own).sum())
        error = batch.rewards - value[:, None]
        return (error - error.mean()) / (error.std() + 1e-8)

    return method


def _value_network(learning_rate: float = 1e-3) -> Method:
    """PPO's critic: the first model under a linear head of zeros, A = r - V(prompt), whitened over the batch.

    As in verl: values are those before this batch, then one Adam step on the squared error follows, at ten times the
    policy's learning rate. verl's critic values every token, and knows the more the further the response has come.
    """
    critic = head = optimizer = None

    def method(batch: Batch) -> Tensor:
        nonlocal critic, head, optimizer
        if critic is None:
            critic = copy.deepcopy(batch.first.model)
            head = torch.zeros(batch.first.config.hidden_size, requires_grad=True)
            optimizer = torch.optim.Adam([*critic.parameters(), head], lr=learning_rate)
        value = critic(input_ids=batch.prompts).last_hidden_state[:, -1] @ head
        error = batch.rewards - value[:, None]
        optimizer.zero_grad()
        error.square().mean().backward()
        optimizer.step()
        error = error.detach()
        return (error - error.mean()) / (error.std() + 1e-8)

    return method


PUBLISHED = KrpoConfig()
METHODS: dict[str, Callable[[], Method]] = {
    "grpo": _verl("grpo_vectorized"),
    "drgrpo": _verl("grpo_vectorized", norm_adv_by_std_in_grpo=False),
    "rloo": _verl("rloo_vectorized"),
    "reinforce++": _verl("reinforce_plus_plus_baseline"),
    "batch_mean": lambda: lambda batch: batch.rewards - batch.rewards.mean(),
    "jspo": _krpo(KrpoConfig(baseline=Baseline.jspo, scale=Scale.none)),
    "spo": _spo,
    "value_network": _value_network,
    "krpo": _krpo(PUBLISHED),
    "krpo_adaptive": _krpo(ADAPTIVE),
    "krpo_memory": _memory,
    "krpo_adaptive_unscaled": _krpo(dataclasses.replace(ADAPTIVE, scale=Scale.none)),
    "krpo_predicted": _krpo(KrpoConfig(baseline=Baseline.predicted, scale=Scale.innovation_std)),
    "krpo_leave_one_out": _krpo(KrpoConfig(baseline=Baseline.leave_one_out)),
    "krpo_mean_only": _krpo(KrpoConfig(scale=Scale.none)),
    "krpo_variance_only": _variance_only,
    "krpo_by_length": _sorted(PUBLISHED, lambda batch: batch.lengths),
    "krpo_by_reward": _sorted(PUBLISHED, lambda batch: batch.rewards),
    "krpo_by_reward_down": _sorted(PUBLISHED, lambda batch: -batch.rewards),
}
# The published form over its two numbers: krpo_Q1e-05_R0.001 and so on.
METHODS |= {
    f"krpo_Q{q:g}_R{r:g}": _krpo(KrpoConfig(process_var=q, measurement_var=r))
    for q in (0.0, 1e-5, 1e-3, 1e-1)
    for r in (1e-3, 1e-2, 1e-1, 1.0)
    if (q, r) != (PUBLISHED.process_var, PUBLISHED.measurement_var)
}
