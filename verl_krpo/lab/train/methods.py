"""Every method by its name: an estimator of advantages (verl's own, the product's, controls, and those published beside
it) under REINFORCE, or a policy loss under RLOO's advantages.

An estimator is made anew for every run, for some keep a state; then it takes one batch after the other.
"""

import copy
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from verl_krpo.advantage import ESTIMATORS
from verl_krpo.advantage.krpo import krpo
from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.advantage.weights import length_weights, score_weights
from verl_krpo.config import AdaptiveConfig, AdaptiveScale, Baseline, KrpoConfig, Order, Scale
from verl_krpo.lab.simulate import simulate
from verl_krpo.lab.train.losses import LOSSES, Loss


class Batch(NamedTuple):
    """What a step has sampled: `size` responses to each of its prompts, in rows prompt by prompt.

    rewards: (prompts, size). keys: what identifies a prompt that comes again. step: from 0.
    prompts: (prompts, tokens), first: the model that training begins with; what a value network reads, and starts from.
    responses, mask: (rows, tokens), true up to the end token.
    log_probs, sum_squares: (rows, tokens), log pi_t of every token and sum_k pi_k^2 of what it was drawn from.
    """

    rewards: Tensor
    keys: list[str]
    step: int
    prompts: Tensor
    first: torch.nn.Module
    responses: Tensor
    mask: Tensor
    log_probs: Tensor
    sum_squares: Tensor

    @property
    def owners(self) -> np.ndarray:
        """(rows,) whose response a row is: the place of its prompt in the batch."""
        return np.repeat(np.arange(len(self.rewards)), self.rewards.shape[1])

    @property
    def lengths(self) -> Tensor:
        """(prompts, size) tokens."""
        return self.mask.sum(1).view_as(self.rewards)


Estimate = Callable[[Batch], Tensor]  # -> advantages (prompts, size), or (prompts, size, tokens)


class Method(NamedTuple):
    """make: the estimator of a new run. loss: None is REINFORCE."""

    make: Callable[[], Estimate]
    loss: Loss | None = None

    def __call__(self, batch: Batch) -> Tensor:
        """Advantages of one batch, by an estimator that has seen none."""
        return self.make()(batch)


def exact_weights(batch: Batch) -> Tensor:
    """(rows,) sum_t |grad_logits log pi_t|^2 = sum_t (1 - 2 pi_t + sum_k pi_k^2), of which score_weights knows pi_t."""
    squares = 1 - 2 * batch.log_probs.double().exp() + batch.sum_squares.double()
    return (squares * batch.mask).sum(1)


WEIGHTS: dict[str, Callable[[Batch], Tensor | None]] = {
    "none": lambda batch: None,
    "length": lambda batch: length_weights(batch.mask),
    "score": lambda batch: score_weights(batch.log_probs, batch.mask),
    "exact": exact_weights,
}


def _ours(name: str, settings: Any = None, weight: str = "none") -> Callable[[], Estimate]:
    def method(batch: Batch) -> Tensor:
        estimate = ESTIMATORS[name].estimate(batch.rewards.flatten(), batch.owners, settings, WEIGHTS[weight](batch))
        return estimate.advantages().view_as(batch.rewards)

    return lambda: method


def _krpo(**settings: Any) -> Callable[[], Estimate]:
    # Samples of one prompt are exchangeable here, so that there is nothing to shuffle.
    return _ours("krpo", KrpoConfig(order=Order.arrival, **settings))


def _memory(weight: str = "none") -> Callable[[], Estimate]:
    def make() -> Estimate:
        memory = PromptMemory()

        def method(batch: Batch) -> Tensor:
            nonlocal memory
            keys = np.array(batch.keys, dtype=object)[batch.owners]
            weights = WEIGHTS[weight](batch)
            estimate, memory = krpo_memory(batch.rewards.flatten(), keys, memory, weights=weights, step=batch.step)
            return estimate.advantages().view_as(batch.rewards)

        return method

    return make


def _verl(name: str, **options: Any) -> Callable[[], Estimate]:
    """An estimator of verl's that reads rewards alone."""
    estimator = simulate.with_verl(name, **options)
    return lambda: lambda batch: torch.from_numpy(np.ascontiguousarray(estimator(batch.rewards.numpy())[1]))


def _verl_by_token(name: str, **columns: Callable[[Batch], Tensor]) -> Callable[[], Estimate]:
    """One of verl's that reads the mask and `columns` (rows, tokens) besides; the reward is the last token's."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    def method(batch: Batch) -> Tensor:
        mask = batch.mask.double()
        last = torch.where(mask.cumsum(1) == mask.sum(1, keepdim=True), mask, 0.0)
        read = {key: column(batch).double() for key, column in columns.items()}
        rewards = last * batch.rewards.view(-1, 1)
        advantage, _ = get_adv_estimator_fn(name)(rewards, mask, index=batch.owners, **read)
        return advantage.view(*batch.rewards.shape, -1)

    return lambda: method


def _sorted(key: Callable[[Batch], Tensor]) -> Callable[[], Estimate]:
    """The published filter goes through a group from the smallest key to the largest."""
    inner = _krpo()()

    def method(batch: Batch) -> Tensor:
        order = key(batch).argsort(dim=1, stable=True)
        advantage = inner(batch._replace(rewards=batch.rewards.gather(1, order)))
        return torch.empty_like(advantage).scatter_(1, order, advantage)

    return lambda: method


def _variance_only() -> Estimate:
    """The group's mean as in GRPO, over the published filter's standard deviation."""
    settings = KrpoConfig(order=Order.arrival)

    def method(batch: Batch) -> Tensor:
        estimate = krpo(batch.rewards.flatten(), batch.owners, settings)
        std = estimate.groups.scatter(estimate.baseline_var).view_as(batch.rewards).sqrt()
        return (batch.rewards - batch.rewards.mean(1, keepdim=True)) / (std + settings.epsilon)

    return method


def _spo(keep: float = 0.9, start: float = 8.0) -> Estimate:
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


def _dbb(keep: float = 0.5, prior: float = 1.0) -> Estimate:
    """Discounted Beta-Bernoulli (arXiv 2603.18444): GRPO whose mean and spread of a prompt are a Beta's.

    The Beta begins with one right and one wrong, counts these rewards too, and keeps `keep` of the past a visit, in the
    paper 0.5 and 0.75 for its two models; A = (r - p) / sqrt(p (1 - p)).
    """
    state: dict[str, tuple[float, float]] = {}

    def method(batch: Batch) -> Tensor:
        values = []
        for key, own in zip(batch.keys, batch.rewards, strict=True):
            right, wrong = state.get(key, (prior, prior))
            state[key] = right, wrong = keep * right + float(own.sum()), keep * wrong + float((1 - own).sum())
            values.append(right / (right + wrong))
        value = torch.tensor(values, dtype=torch.float64)[:, None].clamp(1e-6, 1 - 1e-6)
        return (batch.rewards - value) / (value * (1 - value)).sqrt()

    return method


def _value_network(learning_rate: float = 1e-3) -> Estimate:
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


ESTIMATES: dict[str, Callable[[], Estimate]] = {
    "none": lambda: lambda batch: batch.rewards,
    "batch_mean": lambda: lambda batch: batch.rewards - batch.rewards.mean(),
    "grpo": _verl("grpo_vectorized"),
    "drgrpo": _verl("grpo_vectorized", norm_adv_by_std_in_grpo=False),
    "rloo": _verl("rloo_vectorized"),
    "reinforce++": _verl("reinforce_plus_plus_baseline"),
    "opo": _verl_by_token("opo"),
    "otb": _verl_by_token(
        "optimal_token_baseline",
        old_log_probs=lambda batch: batch.log_probs,
        sum_pi_squared=lambda batch: batch.sum_squares,
    ),
    "spo": _spo,
    "dbb": _dbb,
    "value_network": _value_network,
}
# The product's, with their defaults and with weights: krpo_adaptive, krpo_adaptive_score and so on.
ESTIMATES |= {name: _ours(name) for name in ESTIMATORS} | {"krpo": _krpo(), "krpo_memory": _memory()}
ESTIMATES |= {
    f"krpo_adaptive_{weight}{suffix}".replace("_none", ""): _ours("krpo_adaptive", AdaptiveConfig(scale=scale), weight)
    for weight in WEIGHTS
    for suffix, scale in (("", AdaptiveScale.model), ("_unscaled", AdaptiveScale.none))
}
ESTIMATES |= {
    "krpo_memory_score": _memory("score"),
    "krpo_predicted": _krpo(baseline=Baseline.predicted, scale=Scale.innovation_std),
    "krpo_leave_one_out": _krpo(baseline=Baseline.leave_one_out),
    "krpo_mean_only": _krpo(scale=Scale.none),
    "krpo_variance_only": _variance_only,
    "krpo_by_length": _sorted(lambda batch: batch.lengths),
    "krpo_by_reward": _sorted(lambda batch: batch.rewards),
    "krpo_by_reward_down": _sorted(lambda batch: -batch.rewards),
}
# The published form over its two numbers: krpo_Q1e-05_R0.001 and so on.
ESTIMATES |= {
    f"krpo_Q{q:g}_R{r:g}": _krpo(process_var=q, measurement_var=r)
    for q in (0.0, 1e-5, 1e-3, 1e-1)
    for r in (1e-3, 1e-2, 1e-1, 1.0)
    if (q, r) != (KrpoConfig.process_var, KrpoConfig.measurement_var)
}


def _whitened(estimator: Callable[[], Estimate]) -> Callable[[], Estimate]:
    def method(batch: Batch) -> Tensor:
        advantage = estimator()(batch)
        return advantage / (advantage.std() + 1e-6)

    return lambda: method


METHODS = {name: Method(make) for name, make in ESTIMATES.items()}
METHODS |= {name: Method(_whitened(ESTIMATES["rloo"]), loss) for name, loss in LOSSES.items()}
