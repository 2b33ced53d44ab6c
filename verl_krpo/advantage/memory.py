"""KRPO with a memory: one Kalman filter a prompt over training time, which no step resets.

Training visits the same prompts again and again, and between two visits the policy drifts. The expected reward of a
prompt is a level L that all prompts share (what the policy gains everywhere) plus a deviation d of its own, which
wanders by Q a step and keeps the spread P0 that prompts have:

    d_{s+1} = rho d_s + w,   w ~ N(0, Q),   rho^2 = 1 - Q / P0        d ~ N(0, P0) before the first visit
    r = L + d + v,           v ~ N(0, R)                              each of the n rewards of a visit

With Q << P0 that is a random walk, with Q = P0 a prompt is new every time. At a visit k steps after the last one, which
left d ~ N(u, V) (a new prompt has u = 0, V = P0, k = 0):

    predict     u' = rho^k u,   V' = P0 - rho^2k (P0 - V)
    baseline    of a member: the state given the prior N(L + u', V') and the other members' rewards (shrinkage.py)
    update      e = mean(r) - L - u',   K = V' / (V' + R / n):    L + d ~ N(L + u' + K e, (1 - K) V')

The level is filtered as well, with FORGET as its discount (West and Harrison 1997, section 6.3). A group weighs
w = (R + P0) / (V' + R / n), all steps before weigh W:

    W <- FORGET^steps W + sum w            L <- L + sum w (mean(r) - u' - L) / W

and what is stored as d is the state less the new L. The L of a group's own baseline is the one without this group: it
holds what the others gain in this very step, and no reward enters its own baseline. R, P0 and Q come from earlier steps
alone, which are forgotten at the same rate:

    R     squares within the groups over their degrees of freedom; a group of one adds e^2 - V' or, while its prompt is
          new, half of its square between the groups, whose mean is R + P0 (the split is not known yet)
    P0    what the groups of a step differ by, less what R explains (one-way analysis of variance, shrinkage.py)
    Q     P0 times the posterior mean of RATIOS: the likelihood of the innovations of known prompts, each predicted from
          the state that is in use, forgotten like the rest, and a prior that falls by exp(-1) with every factor of two
          away from 1/128; a number fixes Q (at most P0)

Until a step has had two groups there are no such noises: the prior is that of krpo_adaptive, and only moments are kept.
In the first step that has two, the prior still is, while the states are stored with that step's own R and P0.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from hashlib import blake2b
from os import PathLike
from typing import Any, NamedTuple

import numpy as np
import torch

from verl_krpo.advantage.groups import Groups
from verl_krpo.advantage.shrinkage import PUBLISHED_MEASUREMENT_VAR, Prior, group_moments, sum_of_others
from verl_krpo.config import AUTO

FORGET = 0.9  # a step: ten steps later a third is left
RATIOS = 2.0 ** torch.arange(-16, 1, dtype=torch.float64)  # candidates for Q / P0
PREFERENCE = -(RATIOS.log2() + 7).abs()  # their log-prior
SMALLEST = torch.finfo(torch.float64).tiny


class Noise(NamedTuple):
    """R, P0 and Q / P0."""

    measurement_var: float
    init_var: float
    ratio: float


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


def _zeros(dtype: type, *shape: int) -> Any:
    return field(default_factory=lambda: np.zeros(shape, dtype))


@dataclass(frozen=True, eq=False)
class PromptMemory:
    """All that a run remembers. A value: `observe` returns a new one. `PromptMemory()` knows nothing.

    Attributes:
        keys: (prompts,) a hash of each prompt's id, sorted
        deviation, var: (prompts,) d ~ N(deviation, var) after the last visit
        visited: (prompts,) step of the last visit
        step: of the last observation
        level, weight: L and W
        moments: squares within groups and their count of R, squares between groups and their counts of R and of P0
        evidence: (candidates,) log-likelihood of RATIOS
    """

    keys: np.ndarray = _zeros(np.uint64, 0)
    deviation: np.ndarray = _zeros(np.float64, 0)
    var: np.ndarray = _zeros(np.float64, 0)
    visited: np.ndarray = _zeros(np.int64, 0)
    step: int = 0
    level: float = 0.0
    weight: float = 0.0
    moments: np.ndarray = _zeros(np.float64, 5)
    evidence: np.ndarray = _zeros(np.float64, len(RATIOS))

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

    def noise(self, memory_var: float | str = AUTO) -> Noise | None:
        """R, P0 and Q / P0 from the steps so far, None before one had two groups. memory_var: Q, or `auto`."""
        squares, degrees, between, groups, spread = self.moments
        if groups == 0:
            return None
        # As in krpo_adaptive: the published R where no rewards of a group differ.
        measurement_var = squares / degrees if squares > 1e-30 * degrees else PUBLISHED_MEASUREMENT_VAR
        init_var = max(0.0, (between - groups * measurement_var) / spread)
        if memory_var == AUTO:
            ratio = (torch.from_numpy(self.evidence) + PREFERENCE).softmax(dim=0) @ RATIOS
        else:
            ratio = min(1.0, float(memory_var) / init_var) if init_var else 1.0
        return Noise(float(measurement_var), float(init_var), float(ratio))

    def _find(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where each key is, or would be, and whether it is there."""
        at = np.searchsorted(self.keys, keys)
        known = at < len(self)
        known[known] = self.keys[at[known]] == keys[known]
        return at, known

    def recall(self, prompts: Iterable, step: int) -> Visits:
        """The states of prompt ids (groups,) at `step`; zeros for a prompt that is not known."""
        keys = _hash(prompts)
        at, known = self._find(keys)

        def column(values: np.ndarray) -> torch.Tensor:
            result = np.zeros(len(keys), values.dtype)
            result[known] = values[at[known]]
            return torch.from_numpy(result)

        age = torch.where(torch.from_numpy(known), step - column(self.visited), 0)
        return Visits(torch.from_numpy(known), age, column(self.deviation), column(self.var))

    def store(self, prompts: Iterable, step: int, deviation: torch.Tensor, var: torch.Tensor) -> "PromptMemory":
        """A memory in which the states of prompt ids (groups,) after `step` are these."""
        keys = _hash(prompts)
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


def observe(
    memory: PromptMemory,
    visits: Visits,
    values: torch.Tensor,
    groups: Groups,
    step: int,
    memory_var: float | str,
    prior: Prior,
) -> tuple[Prior, PromptMemory]:
    """The prior of every group for the rewards of `step`, values (groups, width), and the memory after them.

    visits: what the memory recalls of the groups. memory_var: Q, or `auto`. prior: that of krpo_adaptive; it stays
    until there is a better one, and for `scale_var`, by which advantages are scaled. ValueError where the memory has
    already observed a later step.
    """
    if step < memory.step:
        raise ValueError(f"krpo's memory has observed step {memory.step}: it cannot go back to step {step}")
    if not len(groups.labels):
        return prior, memory
    # From the level on, at first from a reward on, so that rewards that are all equal give exact zeros.
    level = memory.level if memory.weight else values[0, 0].item()
    means, squares = (x.cpu() for x in group_moments(values - level, groups))
    sizes, single = groups.sizes.cpu().double(), groups.sizes.cpu() == 1
    between = sizes * (means - (sizes * means).sum() / sizes.sum()).square()
    squares = torch.where(single, between / 2, squares)
    forget = FORGET ** (step - memory.step)
    moments = forget * memory.moments + _moments(sizes, squares, between)

    learned = memory.noise(memory_var)
    noise = learned or replace(memory, moments=moments).noise(memory_var)
    if noise is None:
        return prior, replace(memory, moments=moments, step=step)
    deviation, var = visits.predict(noise.ratio, noise.init_var)
    weight = (noise.measurement_var + noise.init_var) / (var + noise.measurement_var / sizes)
    excess, before = weight * (means - deviation), forget * memory.weight
    rise = excess.sum() / (before + weight.sum())  # of the level
    rise_by_others = sum_of_others(excess) / (before + sum_of_others(weight)).clamp(min=SMALLEST)
    error = means - deviation - rise_by_others
    gain = var / (var + noise.measurement_var / sizes)

    squares = torch.where(single & visits.known, error.square() - var, squares)
    evidence = forget * memory.evidence
    if visits.known.any():
        evidence = evidence + _log_likelihood(visits, means - rise_by_others, sizes, noise)
    after = memory.store(groups.labels, step, deviation + gain * error + rise_by_others - rise, (1 - gain) * var)
    after = replace(
        after,
        step=step,
        level=float(level + rise),
        weight=float(before + weight.sum()),
        moments=forget * memory.moments + _moments(sizes, squares, between),
        evidence=evidence,
    )
    if learned:
        learned_var, mean = torch.full_like(var, noise.measurement_var), level + rise_by_others + deviation
        prior = Prior(*(x.to(values.device) for x in (learned_var, mean, var, prior.scale_var)))
    return prior, after


def _moments(sizes: torch.Tensor, squares: torch.Tensor, between: torch.Tensor) -> np.ndarray:
    """A step's sums for `PromptMemory.moments`."""
    groups, members = len(sizes), sizes.sum()
    counts = (sizes - 1).clamp(min=1).sum()
    spread = members - sizes.square().sum() / members
    return np.array([squares.sum(), counts, between.sum(), groups - 1, spread])


def _log_likelihood(visits: Visits, above_level: torch.Tensor, sizes: torch.Tensor, noise: Noise) -> np.ndarray:
    """Of RATIOS, given what the known groups' means are above the level from the other groups."""
    deviation, var = visits.predict(RATIOS[:, None], noise.init_var)
    var = var + noise.measurement_var / sizes
    terms = -0.5 * (var.log() + (above_level - deviation).square() / var)
    return terms[:, visits.known].sum(dim=1).numpy()


def _hash(prompts: Iterable) -> np.ndarray:
    """64 bits a prompt id, the same in every process and from run to run."""
    return np.array(
        [int.from_bytes(blake2b(str(prompt).encode(), digest_size=8).digest(), "big") for prompt in prompts], np.uint64
    )
