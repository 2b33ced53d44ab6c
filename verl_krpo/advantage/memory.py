"""`krpo_memory`: krpo_adaptive with one Kalman filter a prompt over training time, which no step resets.

Training visits the same prompts again and again, and between two visits the policy drifts. What a prompt's baseline
should be is a level L that all prompts share (what the policy gains everywhere) plus a deviation d of its own, which
wanders by Q a step and keeps the spread P0 that prompts have:

    d_{s+1} = rho d_s + w,   w ~ N(0, Q),   rho^2 = 1 - Q / P0        d ~ N(0, P0) before the first visit
    r = L + d + v,           v ~ N(0, R / w)                          each of the n rewards of a visit, w its weight

With Q << P0 that is a random walk, with Q = P0 a prompt is new every time. At a visit k steps after the last one, which
left d ~ N(u, V) (a new prompt has u = 0, V = P0, k = 0), with W the sum of the weights (n where all are alike) and the
weighted mean of the rewards:

    predict     u' = rho^k u,   V' = P0 - rho^2k (P0 - V)
    baseline    of a member: the state given the prior N(L + u', V') and the other members' rewards (adaptive.py)
    update      e = mean(r) - L - u',   K = V' / (V' + R / W):    L + d ~ N(L + u' + K e, (1 - K) V')

The level is filtered as well, with FORGET as its discount (West and Harrison 1997, section 6.3). A group counts
c = (R + P0) / (V' + R / W), all steps before count C:

    C <- FORGET^steps C + sum c            L <- L + sum c (mean(r) - u' - L) / C

and what is stored as d is the state less the new L. The L of a group's own baseline is the one without this group: it
holds what the others gain in this very step, and no reward enters its own baseline. R, P0 and Q come from earlier steps
alone, which are forgotten at the same rate:

    R     squares within the groups over their degrees of freedom; a group of one adds W (e^2 - V') or, while its prompt
          is new, half of its square between the groups, whose mean is R + W P0 (the split is not known yet)
    P0    what the groups of a step differ by, less what R explains (one-way analysis of variance, groups.py)
    Q     P0 times the posterior mean of RATIOS: the likelihood of the innovations of known prompts, each predicted from
          the state that is in use, forgotten like the rest, and a prior that falls by exp(-1) with every factor of two
          away from 1/128; a number fixes Q (at most P0)

Until a step has had two groups there are no such noises: the prior is that of krpo_adaptive, and only moments are kept.
In the first step that has two, the prior still is, while the states are stored with that step's own R and P0.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from verl_krpo.advantage import adaptive
from verl_krpo.advantage.estimate import Estimate, Observed, observe
from verl_krpo.advantage.groups import Variation, hashed, moments, sum_of_others, variation
from verl_krpo.config import AUTO, MemoryConfig
from verl_krpo.kalman import LocalLevel

EDGE = 0.01  # of the range of the rewards: no forecast is nearer to its ends
FORGET = 0.9  # a step: ten steps later a third is left
RATIOS = 2.0 ** torch.arange(-16, 1, dtype=torch.float64)  # candidates for Q / P0
PREFERENCE = -(RATIOS.log2() + 7).abs()  # their log-prior
SMALLEST = torch.finfo(torch.float64).tiny


class Visits(NamedTuple):
    """What is remembered of the prompts of a step, (groups,): d ~ N(deviation, var), `age` steps ago, where `known`."""

    known: torch.Tensor
    age: torch.Tensor
    deviation: torch.Tensor
    var: torch.Tensor

    def predict(self, ratio: float | torch.Tensor, init_var: float) -> tuple[torch.Tensor, torch.Tensor]:
        """u' and V', (..., groups) with Q / P0 = ratio (..., 1)."""
        kept = torch.as_tensor(1 - ratio, dtype=torch.float64) ** self.age  # rho^2k
        return kept.sqrt() * self.deviation, torch.where(self.known, init_var - kept * (init_var - self.var), init_var)


class Forecast(NamedTuple):
    """Of prompts before a visit: mean and std of L + d, (groups,), and the range [low, high] of the rewards so far."""

    mean: np.ndarray
    std: np.ndarray
    low: float
    high: float


def _zeros(dtype: type, *shape: int) -> Any:
    return field(default_factory=lambda: np.zeros(shape, dtype))


@dataclass(frozen=True, eq=False)
class PromptMemory:
    """All that a run remembers. A value: `krpo_memory` returns a new one. `PromptMemory()` knows nothing.

    Attributes:
        keys: (prompts,) a hash of each prompt's id, sorted
        deviation, var: (prompts,) d ~ N(deviation, var) after the last visit
        visited: (prompts,) step of the last visit
        step: of the last observation
        level, weight: L and C
        unit: the mean weight of the last step's rewards, in which the next ones are counted: none reads its own
        moments: sums of a groups.Variation over the steps
        evidence: (candidates,) log-likelihood of RATIOS
        lowest, highest: reward so far; inf and -inf before the first
    """

    keys: np.ndarray = _zeros(np.uint64, 0)
    deviation: np.ndarray = _zeros(np.float64, 0)
    var: np.ndarray = _zeros(np.float64, 0)
    visited: np.ndarray = _zeros(np.int64, 0)
    step: int = 0
    level: float = 0.0
    weight: float = 0.0
    unit: float = 1.0
    moments: np.ndarray = _zeros(np.float64, 5)
    evidence: np.ndarray = _zeros(np.float64, len(RATIOS))
    lowest: float = math.inf
    highest: float = -math.inf

    def __len__(self) -> int:
        """Prompts that are remembered."""
        return len(self.keys)

    def save(self, path: str | PathLike) -> None:
        """Write a NumPy archive (npz) of the attributes."""
        with open(path, "wb") as file:
            np.savez(file, **vars(self))

    @classmethod
    def load(cls, path: str | PathLike) -> "PromptMemory":
        """The memory that `save` wrote. ValueError where an archive is none of ours."""
        with np.load(path, allow_pickle=False) as archive:
            if set(archive) != set(cls.__dataclass_fields__):
                raise ValueError(f"{path} holds {sorted(archive)}, a memory of krpo {sorted(cls.__dataclass_fields__)}")
            return cls(**{name: array if array.ndim else array.item() for name, array in archive.items()})

    def model(self, memory_var: float | str = AUTO) -> LocalLevel | None:
        """Q, R, L and P0 from the steps so far, None before one had two groups. memory_var: Q, or `auto`."""
        found = Variation(*torch.from_numpy(self.moments))
        if found.between_degrees == 0:
            return None
        # Moments that are forgotten decay; below this they are rounding.
        squares = torch.where(found.within > 1e-30 * found.within_degrees, found.within, 0.0)
        measurement_var = torch.where(squares > 0, squares / found.within_degrees, adaptive.PUBLISHED_MEASUREMENT_VAR)
        init_var = adaptive.prior_var(found, measurement_var)
        process_var = init_var * self.ratio(memory_var, float(init_var))
        return LocalLevel(float(process_var), float(measurement_var), self.level, float(init_var))

    def ratio(self, memory_var: float | str, init_var: float) -> float:
        """Q / P0."""
        if memory_var == AUTO:
            return float((torch.from_numpy(self.evidence) + PREFERENCE).softmax(dim=0) @ RATIOS)
        return min(1.0, float(memory_var) / init_var) if init_var else 1.0

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each key is, or would be, and whether it is there."""
        at = np.searchsorted(self.keys, keys)
        known = at < len(self)
        known[known] = self.keys[at[known]] == keys[known]
        return at, known

    def recall(self, prompts: Iterable, step: int) -> Visits:
        """The states of prompt ids (groups,) at `step`; zeros for a prompt that is not known."""
        keys = hashed(prompts)
        at, known = self._find(keys)

        def column(values: np.ndarray) -> torch.Tensor:
            result = np.zeros(len(keys), values.dtype)
            result[known] = values[at[known]]
            return torch.from_numpy(result)

        age = torch.where(torch.from_numpy(known), step - column(self.visited), 0)
        return Visits(torch.from_numpy(known), age, column(self.deviation), column(self.var))

    def _all(self, step: int) -> Visits:
        known, age = torch.ones(len(self), dtype=torch.bool), torch.from_numpy(step - self.visited)
        return Visits(known, age, torch.from_numpy(self.deviation), torch.from_numpy(self.var))

    def forecast(self, prompts: Iterable | None, step: int, memory_var: float | str = AUTO) -> Forecast:
        """What each of these prompts (groups,) earns at `step`; a new one has the prior.

        Rewards within [a, b] whose mean m is near an end have less noise than the mean R. A state N(m, V') knows what
        N = R / V' rewards tell. Of right and wrong answers so many leave, by their conjugate Beta law,

            std^2 = (m - a)(b - m) / (N + 1) = (m - a)(b - m) V' / (R + V')

        which for new prompts is P0.

        prompts: None for all that are remembered, in the order of `keys`. Until a step had two groups nothing tells
        prompts apart: all have mean L and std 0.
        """
        visits = self._all(step) if prompts is None else self.recall(prompts, step)
        model = self.model(memory_var)
        low, high = (self.lowest, self.highest) if self.lowest <= self.highest else (self.level, self.level)
        if model is None:
            return Forecast(np.full(len(visits.age), self.level), np.zeros(len(visits.age)), low, high)
        _, measurement_var, _, init_var = model.numbers()
        deviation, var = (x.numpy() for x in visits.predict(self.ratio(memory_var, init_var), init_var))
        edge = EDGE * (high - low)
        mean = (self.level + deviation).clip(low + edge, high - edge)
        return Forecast(mean, np.sqrt((mean - low) * (high - mean) * var / (measurement_var + var)), low, high)

    def store(self, prompts: Iterable, step: int, deviation: torch.Tensor, var: torch.Tensor) -> "PromptMemory":
        """A memory in which the states of prompt ids (groups,) after `step` are these."""
        keys = hashed(prompts)
        new = np.unique(keys[~self._find(keys)[1]])
        at, _ = self._find(new)
        all_keys = np.insert(self.keys, at, new)
        rows = np.searchsorted(all_keys, keys)

        def column(values: np.ndarray, after: Any) -> np.ndarray:
            values = np.insert(values, at, 0)
            values[rows] = after
            return values

        return replace(
            self,
            keys=all_keys,
            deviation=column(self.deviation, deviation.numpy()),
            var=column(self.var, var.numpy()),
            visited=column(self.visited, step),
        )


def krpo_memory(
    rewards: torch.Tensor | Sequence[float],
    prompts: object,
    memory: PromptMemory,
    settings: MemoryConfig | None = None,
    weights: torch.Tensor | None = None,
    step: int | None = None,
    counted: torch.Tensor | None = None,
) -> tuple[Estimate, PromptMemory]:
    """Advantages of rewards (rows,), and the memory after them.

    prompts: (rows,) ids that are the same at every visit. memory: what earlier steps have left, at first
    `PromptMemory()`. step: that of these rewards, None for the next. weights, counted: as in krpo_adaptive.
    ValueError: estimate.observe, and where the memory has already observed a later step.
    """
    settings = settings or MemoryConfig()
    step = memory.step + 1 if step is None else step
    if step < memory.step:
        raise ValueError(f"krpo's memory has observed step {memory.step}: it cannot go back to step {step}")
    seen = observe(rewards, prompts, weights, counted)
    prior, after = (adaptive.fitted(seen), memory) if not len(seen.rewards) else _visit(memory, seen, settings, step)
    return adaptive.leave_one_out(seen, prior, settings), after


def _visit(memory: PromptMemory, seen: Observed, settings: MemoryConfig, step: int) -> tuple[LocalLevel, PromptMemory]:
    """The prior of every group, and the memory after the step."""
    labels, values = seen.groups.labels, seen.rewards.cpu()
    rewards = values[seen.groups.mask.cpu()]
    memory = replace(
        memory,
        lowest=min(memory.lowest, rewards.min().item()),
        highest=max(memory.highest, rewards.max().item()),
    )
    unit = seen.unit / memory.unit if memory.weight else 1.0  # of seen.weights, in that of the memory
    weights = seen.weights.cpu() * unit
    visits, memory_var = memory.recall(labels, step), settings.memory_var
    # From the level on, at first from a reward on, so that rewards that are all equal give exact zeros.
    level = memory.level if memory.weight else values[0, 0].item()
    means, squares = moments(values - level, weights)
    found, weight, members = variation(values - level, weights, torch.sum), weights.sum(dim=1), (weights > 0).sum(dim=1)
    single = members == 1
    between = weight * (means - (weight * means).sum() / weight.sum()).square()
    squares = torch.where(single, between / 2, squares)
    forget = FORGET ** (step - memory.step)

    def all_moments(squares: torch.Tensor) -> np.ndarray:
        degrees = found.within_degrees + single.sum()
        return (
            forget * memory.moments + torch.stack(found._replace(within=squares.sum(), within_degrees=degrees)).numpy()
        )

    learned = memory.model(memory_var)
    model = learned or replace(memory, moments=all_moments(squares)).model(memory_var)
    if model is None:
        return adaptive.fitted(seen), replace(memory, moments=all_moments(squares), step=step, unit=seen.unit)
    _, measurement_var, _, init_var = model.numbers()
    deviation, var = visits.predict(memory.ratio(memory_var, init_var), init_var)
    noise = measurement_var / weight  # inf where no weight is
    count, before = (measurement_var + init_var) / (var + noise), forget * memory.weight
    excess = count * (means - deviation)
    rise = excess.sum() / (before + count.sum())  # of the level
    rise_by_others = sum_of_others(excess) / (before + sum_of_others(count)).clamp(min=SMALLEST)
    error = means - deviation - rise_by_others
    gain = var / (var + noise)

    squares = torch.where(single & visits.known, weight * (error.square() - var), squares)
    evidence = forget * memory.evidence
    told = visits.known & (weight > 0)
    if told.any():
        evidence = (
            evidence + _log_likelihood(visits, means - rise_by_others, noise, init_var)[:, told].sum(dim=1).numpy()
        )
    after = replace(
        memory.store(labels, step, deviation + gain * error + rise_by_others - rise, (1 - gain) * var),
        step=step,
        level=float(level + rise),
        weight=float(before + count.sum()),
        unit=seen.unit,
        moments=all_moments(squares),
        evidence=evidence,
    )
    if not learned:
        return adaptive.fitted(seen), after
    mean = level + rise_by_others + deviation
    return LocalLevel(0.0, measurement_var / unit, mean.to(seen.rewards.device), var.to(seen.rewards.device)), after


def _log_likelihood(visits: Visits, above_level: torch.Tensor, noise: torch.Tensor, init_var: float) -> torch.Tensor:
    """(candidates, groups): of RATIOS, given what the groups' means are above the level from the other groups."""
    deviation, var = visits.predict(RATIOS[:, None], init_var)
    var = var + noise
    return -0.5 * (var.log() + (above_level - deviation).square() / var)
