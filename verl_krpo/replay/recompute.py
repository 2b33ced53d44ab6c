"""`verl-krpo replay`: the advantages that each estimator would give to rollouts a verl job has written.

The rewards of every step go through every estimator of ours (krpo with the published settings, or those given;
krpo_memory from step to step), verl's formulas of grpo and rloo, and two controls: `none`, A = r, and `batch_mean`, r
less the mean of the batch's other rewards. Per step and over all:

    std, max       of the advantages A
    order          root mean square over the responses of the standard deviation of A under random orders of a step's
                   rows, over std(A): how much of A is the order of arrival
    first, last    mean |A| of the first and of the last member of a group
    no signal      groups whose rewards are all equal, and the mean |A| that they get nevertheless
    variance       noise per signal, rloo = 1: E[A^2] / E[A (r - m)]^2, m the mean reward of the prompt. It is the
                   variance of the policy gradient at equal expected length, if the score function is independent of
                   the reward's deviation; of two baselines b that leave the own reward out, the ratio of E(r - b)^2
    nis            mean of (r_i - x_{i|i-1})^2 / (P_{i|i-1} + R): 1 where Q, R and the prior fit

Where the rollouts have score weights w, the score function is known not to be so, and `variance` is the gradient's own:
E[w A^2] / E[A (r - m)]^2. Then three more run: krpo_adaptive and krpo_memory with these weights (`_score`), and, with
the lengths l, verl's opo (arXiv 2505.23585): r_i - sum l r / sum l over the group.

No reward is drawn anew. E[A^2] and E[A r] are means of what is there. m is not known, but E[A m] = E[A E(m | rewards)],
and for A linear in the rewards the best linear estimate serves in the place of the conditional mean, whatever the law:

    m_g = w mean_g + (1 - w) mean of the step's other groups,    w = P0 / (P0 + R / n)

with R and P0, the variance within and between prompts, by moments over all steps. Where the advantages of a group add
up to zero (grpo, rloo) m drops out. What krpo_memory has learned of a prompt, and what weights say, tells of m beyond
the rewards at hand, so there m is not estimated; but these baselines leave the own reward out, and E[A (r - m)] is
E[(r - m)^2 / scale] whatever the baseline is: the group's variance over the scale.

Memory does not grow with the files: a step is held at a time, sums over steps, and 32 bytes a prompt for krpo_memory.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from verl_krpo.advantage import ESTIMATORS
from verl_krpo.advantage.adaptive import krpo_adaptive
from verl_krpo.advantage.estimate import Estimate
from verl_krpo.advantage.groups import Groups, group, moments, sum_of_others, variation
from verl_krpo.advantage.krpo import krpo
from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.config import KrpoConfig, Weight, read
from verl_krpo.plugin import metrics
from verl_krpo.replay import rollouts
from verl_krpo.report.intervals import middle, times_drawn

CONTROLS = ("none", "batch_mean")
METHODS = ("grpo", "rloo", *CONTROLS, *ESTIMATORS)
MEMORIES = ("krpo_memory", "krpo_memory_score")
INFORMED = (*MEMORIES, "krpo_adaptive_score")  # know of m more than the rewards at hand say
# What else runs where rollouts have such weights.
WEIGHTED = {Weight.score: ("krpo_adaptive_score", "krpo_memory_score"), Weight.length: ("opo",)}
RANDOM_ORDERS = 8  # random orders of a step's rows
RESAMPLES = 1000  # of steps, for intervals
GRPO_EPSILON = 1e-6  # verl's
PLACES_KEPT = 64  # places in a group whose mean |A| is kept
HISTOGRAM_EDGES = np.concatenate([[-np.inf], np.linspace(-6, 6, 121), [np.inf]])  # of A in units of std(A) of its step


@dataclass
class Totals:
    """Sums over the steps for one method."""

    rows: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    order: float = 0.0
    equal: float = 0.0
    by_place: np.ndarray = field(default_factory=lambda: np.zeros(PLACES_KEPT))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(2))
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(HISTOGRAM_EDGES) - 1, dtype=np.int64))
    products: list[np.ndarray] = field(default_factory=list)  # per step (sizes, 4): see _products

    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.rows - (self.total / self.rows) ** 2)) if self.rows else math.nan

    def add(self, a: torch.Tensor, groups: Groups, equal: torch.Tensor, order: float) -> None:
        """a (rows,), groups in the method's order, equal (rows,): no signal there, order: variance of A by order."""
        size, sizes = groups.gather(a.abs()), groups.sizes
        self.rows += len(a)
        self.total += a.sum().item()
        self.squares += a.square().sum().item()
        self.largest = max(self.largest, a.abs().max().item())
        self.order += order * len(a)
        self.equal += a[equal].abs().sum().item()
        self.by_place += np.bincount(_places(groups), weights=size[groups.mask].numpy(), minlength=PLACES_KEPT)
        last = size.gather(1, (sizes - 1)[:, None])[:, 0]
        self.ends += [size[sizes > 1, 0].sum().item(), last[sizes > 1].sum().item()]
        if (spread := a.std(correction=0).item()) > 0:
            self.histogram += np.histogram((a / spread).numpy(), bins=HISTOGRAM_EDGES)[0]


@dataclass
class Replay:
    """A run read back. per_step: one dict a step, of numbers (`_of_rewards`, `add`); totals: method -> Totals."""

    name: str
    settings: KrpoConfig
    reading: rollouts.Reading
    per_step: list[dict] = field(default_factory=list)
    totals: dict[str, Totals] = field(default_factory=dict)
    memories: dict[str, PromptMemory] = field(default_factory=lambda: dict.fromkeys(MEMORIES, PromptMemory()))

    def total(self, key: str) -> Any:
        """Over the steps."""
        return sum(row[key] for row in self.per_step)

    def every(self, key: str) -> bool:
        return all(row[key] for row in self.per_step)

    @property
    def kinds(self) -> tuple[Weight, ...]:
        """Of the weights that these rollouts have."""
        return self.reading.kinds or ()

    @property
    def methods(self) -> tuple[str, ...]:
        """What these rollouts can run."""
        return (*METHODS, *(method for kind in self.kinds for method in WEIGHTED[kind]))

    def variance(self, method: str) -> float:
        """Noise per signal, as a multiple of rloo's; NaN where no group has a spread."""
        return self._variances(method, np.ones((1, len(self.per_step))))[0]

    def interval(self, method: str) -> tuple[float, float] | None:
        """95 % of `variance`, by resampling the steps; None with fewer than ten."""
        steps = len(self.per_step)
        if steps < 10:
            return None
        return middle(self._variances(method, times_drawn(np.random.default_rng(0), steps, RESAMPLES)))

    def _variances(self, method: str, weights: np.ndarray) -> np.ndarray:
        """`variance` under every row of weights (resamples, steps)."""
        within, degrees, between, between_degrees, spread = self.total("moments")
        if within == 0:
            return np.full(len(weights), math.nan)
        noise_var = within / degrees
        rows = np.array([row["rows"] for row in self.per_step])
        prior_var = max(0.0, (between - between_degrees * noise_var) / spread) if spread else math.inf

        def noise_per_signal(method: str) -> np.ndarray:
            sums = []
            for row, products in zip(self.per_step, self.totals[method].products, strict=True):
                square, reward, mean, others = products.T
                w = 1.0 if prior_var == math.inf else prior_var / (prior_var + noise_var / row["sizes"])
                sums.append((square.sum(), (reward - w * mean - (1 - w) * others).sum()))
            square, signal = (weights @ np.array(sums)).T
            return square * (weights @ rows) / signal**2

        return noise_per_signal(method) / noise_per_signal("rloo")


def advantages(
    method: str,
    rewards: torch.Tensor,
    prompts: np.ndarray,
    settings: KrpoConfig,
    weights: dict[Weight, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Advantages (rows,) of rewards (rows,) by a method that is not of INFORMED. settings: those of krpo."""
    weights = weights or {}
    if method == "krpo":
        return krpo(rewards, prompts, settings, _chosen(settings, weights)).advantages()
    if method in ESTIMATORS:
        return ESTIMATORS[method].estimate(rewards, prompts).advantages()
    if method == "none":
        return rewards
    if method == "batch_mean":
        deviation = rewards - rewards[0]  # from one of them: equal rewards give exactly 0
        return (deviation - deviation.mean()) * len(rewards) / max(1, len(rewards) - 1)
    groups = group(prompts, torch.ones(len(rewards), dtype=torch.bool))
    return _by_group_mean(method, rewards, groups, weights)


def _chosen(settings: KrpoConfig, weights: dict[Weight, torch.Tensor]) -> torch.Tensor | None:
    """The weights that krpo's settings ask for."""
    if settings.weight != Weight.none and settings.weight not in weights:
        raise ValueError(
            f"--krpo weight={settings.weight.value}: the rollouts have no such weights, give them log_probs or a "
            "score_weight in every line"
        )
    return weights.get(settings.weight)


def _by_group_mean(
    method: str, rewards: torch.Tensor, groups: Groups, weights: dict[Weight, torch.Tensor]
) -> torch.Tensor:
    """verl's grpo, rloo and opo, which leave the reward of a group of one as it is. (verl's own would bring 200 MB.)"""
    values, sizes = groups.gather(rewards), groups.sizes[:, None]
    counts = groups.gather(weights[Weight.length]) if method == "opo" else groups.mask.double()
    deviation = torch.where(groups.mask, values - values[:, :1], 0.0)  # from one of them: equal rewards give exactly 0
    mean = (counts * deviation).sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp(min=1)
    deviation = torch.where(groups.mask, deviation - mean, 0.0)
    if method == "rloo":
        advantage = deviation * sizes / (sizes - 1).clamp(min=1)
    elif method == "opo":
        advantage = deviation
    else:
        std = (deviation.square().sum(dim=1, keepdim=True) / (sizes - 1).clamp(min=1)).sqrt()
        advantage = deviation / (std + GRPO_EPSILON)
        values = values / (1 + GRPO_EPSILON)
    return groups.scatter(torch.where(sizes > 1, advantage, values))


def replay(
    where: str | Path, settings: KrpoConfig | None = None, advance: Callable[[int], object] = lambda count: None
) -> Replay:
    """Read the rollouts at `where` (a folder or a file) under every method; `settings`: those of `krpo`."""
    settings = settings or KrpoConfig()
    reading = rollouts.Reading()
    result = Replay(str(where), settings, reading)
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for step in rollouts.steps(where, reading, advance):
            add(result, step, rng)
        if not result.per_step:
            named = "".join(f"\n  {example}" for example in reading.examples)
            raise ValueError(f"{where} holds no rollouts that can be read ({reading.damaged} lines are damaged){named}")
    return result


def add(result: Replay, step: rollouts.Step, rng: np.random.Generator) -> None:
    """One step under every method."""
    rewards, prompts = torch.from_numpy(step.rewards), step.prompts
    weights = {kind: torch.from_numpy(values) for kind, values in step.weights.items()}
    arrived = group(prompts, torch.ones(len(rewards), dtype=torch.bool))
    estimate = krpo(rewards, prompts, result.settings, _chosen(result.settings, weights))
    row, equal = _of_rewards(rewards, arrived)
    nis = metrics.scalars(estimate, result.settings).get("krpo/nis", math.nan)
    row |= {"step": step.number, "nis": nis, "named": step.names is not None}

    orders = [rng.permutation(len(rewards)) for _ in range(RANDOM_ORDERS)]
    products = _products(rewards, arrived, weights.get(Weight.score))
    for method in result.methods:
        if method in INFORMED:
            informed = _informed(result, method, rewards, step, weights.get(Weight.score))
            a, signal = informed.advantages(), _signal(informed)
        else:
            a, signal = advantages(method, rewards, prompts, result.settings, weights), None
        order = 0.0
        if method == "krpo":  # the others' formulas know no order
            order = _order_variance(rewards, prompts, result.settings, weights, orders)
        totals = result.totals.setdefault(method, Totals())
        totals.add(a, estimate.groups if method == "krpo" else arrived, equal, order)
        totals.products.append(products(a, signal))
        spread = a.std(correction=0).item()
        row[method] = {"std": spread, "order": math.sqrt(order) / spread if spread else 0.0}
    result.per_step.append(row)


def _informed(
    result: Replay, method: str, rewards: torch.Tensor, step: rollouts.Step, scores: torch.Tensor | None
) -> Estimate:
    """A method of INFORMED. A memory has seen all steps before, where a step that goes back counts as the last one.

    Without names it knows no prompt again.
    """
    weights = scores if method.endswith("_score") else None
    if method not in MEMORIES:
        return krpo_adaptive(rewards, step.prompts, weights=weights)
    memory, names = result.memories[method], step.prompts if step.names is None else step.names
    number = max(step.number, memory.step)
    estimate, result.memories[method] = krpo_memory(rewards, names, memory, weights=weights, step=number)
    return estimate


def _signal(estimate: Estimate) -> torch.Tensor:
    """(rows,) whose sum estimates that of A (r - m): the variance of the own group, or of all, over the scale."""
    groups, degrees = estimate.groups, estimate.groups.sizes - 1
    _, squares = moments(estimate.rewards, groups.mask.double())
    pooled = squares.sum() / degrees.sum().clamp(min=1)
    var = torch.where(degrees > 0, squares / degrees.clamp(min=1), pooled)
    return groups.scatter(var[:, None] / (estimate.baseline_var + estimate.scale_var).sqrt())


def _of_rewards(rewards: torch.Tensor, groups: Groups) -> tuple[dict, torch.Tensor]:
    """The numbers of a step before any method; (rows,): in a group of more than one member, all of one reward."""
    values, sizes = groups.gather(rewards), groups.sizes
    equal = ((values == values[:, :1]) | ~groups.mask).all(dim=1) & (sizes > 1)
    rows = groups.scatter(equal[:, None].expand_as(groups.mask))
    found = variation(values - rewards.mean(), groups.mask.double(), torch.sum)
    numbers = {
        "rows": len(rewards),
        "reward": rewards.mean().item(),
        "sum": rewards.sum().item(),
        "squares": rewards.square().sum().item(),
        "binary": bool(((rewards == 0) | (rewards == 1)).all()),
        "groups": len(sizes),
        "groups_of_several": int((sizes > 1).sum()),
        "equal_groups": int(equal.sum()),
        "equal_rows": int(rows.sum()),
        "no_signal": equal.double().mean().item(),
        "groups_at": np.bincount(_places(groups), minlength=PLACES_KEPT),
        "moments": np.array([float(x) for x in found]),
        "sizes": sizes.unique().double().numpy(),
    }
    return numbers, rows


def _products(rewards: torch.Tensor, groups: Groups, weights: torch.Tensor | None) -> Callable[..., np.ndarray]:
    """The function that sums w A^2, A r, A mean_g, A mean of the other groups by group size.

    Given the signal too, it takes that in the place of A r, and of the other two 0.
    """
    sizes = groups.sizes.double()
    means, _ = moments(groups.gather(rewards), groups.mask.double())
    known = sum_of_others(sizes)
    others = torch.where(known > 0, sum_of_others(sizes * means) / known, means)

    def rows(value: torch.Tensor) -> np.ndarray:
        return groups.scatter(value[:, None].expand_as(groups.mask)).numpy()

    _, at = np.unique(rows(sizes), return_inverse=True)
    factors = rewards.numpy(), rows(means), rows(others)
    weighed = 1.0 if weights is None else weights.numpy()

    def sums(a: torch.Tensor, signal: torch.Tensor | None = None) -> np.ndarray:
        own = a.numpy()
        products = [own * factor for factor in factors] if signal is None else [signal.numpy(), 0 * own, 0 * own]
        return np.stack([np.bincount(at, weights=product) for product in (weighed * own**2, *products)], axis=1)

    return sums


def _order_variance(
    rewards: torch.Tensor, prompts: np.ndarray, settings: KrpoConfig, weights: dict[Weight, torch.Tensor], orders
) -> float:
    """Mean over the rows of the variance of krpo's A under the given orders of the rows."""
    drawn = torch.empty(len(orders), len(rewards), dtype=torch.float64)
    for i, order in enumerate(orders):
        moved = {kind: values[order] for kind, values in weights.items()}
        drawn[i, order] = advantages("krpo", rewards[order], prompts[order], settings, moved)
    return drawn.var(dim=0, correction=1).mean().item()


def _places(groups: Groups) -> np.ndarray:
    """Place in its group of every member, the last counted ones together."""
    return np.minimum(groups.mask.nonzero()[:, 1].numpy(), PLACES_KEPT - 1)


def settings_from(assignments: list[str]) -> KrpoConfig:
    """KrpoConfig from ["process_var=3e-5", ...]; ValueError names a wrong key or value."""
    from omegaconf import OmegaConf

    wrong = [item for item in assignments if "=" not in item]
    if wrong:
        raise ValueError(f"--krpo {wrong[0]}: write KEY=VALUE, for example process_var=3e-5")
    return read(KrpoConfig, OmegaConf.from_dotlist(assignments), "algorithm.krpo")
