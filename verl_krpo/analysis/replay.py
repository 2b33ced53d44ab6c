"""`verl-krpo replay`: the advantages that each estimator would give to rollouts a verl job has written.

The rewards of every step go through krpo itself (the published settings, or those given), krpo_adaptive, and verl's
formulas of grpo and rloo. Per step and over all:

    std, max       of the advantages A
    order          root mean square over the responses of the standard deviation of A under random orders of a step's
                   rows, over std(A): how much of A is the order of arrival
    first, last    mean |A| of the first and of the last member of a group
    no signal      groups whose rewards are all equal, and the mean |A| that they get nevertheless
    variance       noise per signal, rloo = 1: rewards drawn anew from each prompt's own (a bootstrap) of mean m,
                   E[A^2] / E[A (r - m)]^2. It is the variance of the policy gradient at equal expected length, if
                   the score function is independent of the reward's deviation
    nis            mean of (r_i - x_{i|i-1})^2 / (P_{i|i-1} + R): 1 where Q, R and the prior fit
    fitted         Q, R, m0, P0 of maximum likelihood, members in the order in which krpo filters them

Memory does not grow with the files: a step is held at a time, sums over steps, and a sample of groups for the fit.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from verl_krpo.advantage.groups import Groups, group
from verl_krpo.advantage.krpo import krpo
from verl_krpo.advantage.shrinkage import prior_of
from verl_krpo.analysis import rollouts
from verl_krpo.config import ADAPTIVE, KRPO_AT, KrpoConfig, Order, read
from verl_krpo.kalman import LocalLevel, innovations, log_likelihood
from verl_krpo.plugin import metrics

METHODS = ("grpo", "rloo", "krpo", "krpo_adaptive")
ORDERS = 8  # random orders of a step's rows
KEPT_GROUPS = 2000  # sample for the fit
GRPO_EPSILON = 1e-6  # verl's
PLACES = 64  # places in a group whose mean |A| is kept
EDGES = np.concatenate([[-np.inf], np.linspace(-6, 6, 121), [np.inf]])  # of A in units of std(A) of its step


@dataclass
class Totals:
    """Sums over the steps for one method."""

    rows: int = 0
    total: float = 0.0
    squares: float = 0.0
    largest: float = 0.0
    order: float = 0.0
    equal: float = 0.0
    equal_rows: int = 0
    signal: float = 0.0
    noise: float = 0.0
    drawn: int = 0
    by_place: np.ndarray = field(default_factory=lambda: np.zeros(PLACES))
    ends: np.ndarray = field(default_factory=lambda: np.zeros(2))
    histogram: np.ndarray = field(default_factory=lambda: np.zeros(len(EDGES) - 1, dtype=np.int64))

    def std(self) -> float:
        return math.sqrt(max(0.0, self.squares / self.rows - (self.total / self.rows) ** 2)) if self.rows else math.nan

    def noise_per_signal(self) -> float:
        return self.noise * self.drawn / self.signal**2 if self.signal else math.nan


@dataclass
class Fit:
    """Q, R, m0 and P0 of maximum likelihood, and how much likelier a reward is under them than under krpo's own."""

    process_var: float
    measurement_var: float
    init_mean: float
    init_var: float
    gain_per_reward: float


@dataclass
class Replay:
    """A run read back. per_step: one dict of numbers a step; totals: method -> Totals."""

    name: str
    settings: KrpoConfig
    reading: rollouts.Reading
    per_step: list[dict] = field(default_factory=list)
    totals: dict[str, Totals] = field(default_factory=lambda: {method: Totals() for method in METHODS})
    groups: int = 0
    singletons: int = 0
    equal_groups: int = 0
    multiple_groups: int = 0
    groups_at: np.ndarray = field(default_factory=lambda: np.zeros(PLACES, dtype=np.int64))
    rewards: list = field(default_factory=lambda: [0, 0.0, 0.0])  # count, sum, sum of squares
    nis: list = field(default_factory=lambda: [0.0, 0])
    fit: Fit | None = None

    def variance(self, method: str) -> float:
        """Noise per signal, as a multiple of rloo's."""
        return self.totals[method].noise_per_signal() / self.totals["rloo"].noise_per_signal()


def advantages(method: str, rewards: torch.Tensor, prompts: np.ndarray, settings: KrpoConfig) -> torch.Tensor:
    """Advantages (rows,) of rewards (rows,) by one of METHODS."""
    if method in ("grpo", "rloo"):
        return _by_group_mean(method, rewards, group(prompts, torch.ones(len(rewards), dtype=torch.bool)))
    return krpo(rewards, prompts, ADAPTIVE if method == "krpo_adaptive" else settings).advantages()


def _by_group_mean(method: str, rewards: torch.Tensor, groups: Groups) -> torch.Tensor:
    """verl's grpo and rloo, which leave the reward of a group of one as it is. (verl's own would bring 200 MB.)"""
    values, sizes = groups.gather(rewards), groups.sizes[:, None]
    deviation = torch.where(groups.mask, values - values[:, :1], 0.0)  # from one of them: equal rewards give exactly 0
    deviation = torch.where(groups.mask, deviation - deviation.sum(dim=1, keepdim=True) / sizes, 0.0)
    several = sizes > 1
    if method == "rloo":
        found = deviation * sizes / (sizes - 1).clamp(min=1)
    else:
        std = (deviation.square().sum(dim=1, keepdim=True) / (sizes - 1).clamp(min=1)).sqrt()
        found = deviation / (std + GRPO_EPSILON)
        values = values / (1 + GRPO_EPSILON)
    return groups.scatter(torch.where(several, found, values))


def replay(
    where: str | Path, settings: KrpoConfig | None = None, advance: Callable[[int], None] = lambda count: None
) -> Replay:
    """Read the rollouts at `where` (a folder or a file) under every method; `settings`: those of `krpo`."""
    settings = settings or KrpoConfig()
    reading = rollouts.Reading()
    result = Replay(str(where), settings, reading)
    sample = _Sample()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for step in rollouts.steps(where, reading, advance):
            _add(result, step, rng)
            sample.add(step)
        if not result.per_step:
            named = "".join(f"\n  {example}" for example in reading.examples)
            raise ValueError(f"{where} holds no rollouts that can be read ({reading.damaged} lines are damaged){named}")
        result.fit = fit(sample.matrix(), settings)
    return result


def _add(result: Replay, step: rollouts.Step, rng: np.random.Generator) -> None:
    rewards = torch.from_numpy(step.rewards)
    arrived = group(step.prompts, torch.ones(len(rewards), dtype=torch.bool))
    values = arrived.gather(rewards)
    equal = _equal(values, arrived)
    drawn = _redrawn(values, arrived, rng)
    deviation = arrived.scatter(drawn - _mean(values, arrived)[:, None])
    redrawn = arrived.scatter(drawn)
    orders = [rng.permutation(len(rewards)) for _ in range(ORDERS)]
    sizes = arrived.sizes
    result.groups += len(sizes)
    result.singletons += int((sizes == 1).sum())
    result.equal_groups += int(equal.sum())
    result.multiple_groups += int((sizes > 1).sum())
    result.groups_at += np.bincount(np.minimum(_places(arrived), PLACES - 1), minlength=PLACES)
    result.rewards[0] += len(rewards)
    result.rewards[1] += rewards.sum().item()
    result.rewards[2] += rewards.square().sum().item()

    row = {"step": step.number, "reward": rewards.mean().item(), "rows": len(rewards), "groups": len(sizes)}
    row["no_signal"] = equal.double().mean().item()
    found = krpo(rewards, step.prompts, result.settings)
    nis = metrics.scalars(found, result.settings.process_var).get("krpo/nis")
    if nis is not None:
        result.nis[0] += nis * len(rewards)
        result.nis[1] += len(rewards)
    row["nis"] = nis if nis is not None else math.nan

    for method in METHODS:
        totals = result.totals[method]
        a = advantages(method, rewards, step.prompts, result.settings)
        spread = a.std(correction=0).item()
        totals.rows += len(a)
        totals.total += a.sum().item()
        totals.squares += a.square().sum().item()
        totals.largest = max(totals.largest, a.abs().max().item())
        if spread > 0:
            totals.histogram += np.histogram((a / spread).numpy(), bins=EDGES)[0]
        first, last = _ends(a, found.groups if method == "krpo" else arrived, totals)
        matrix = arrived.gather(a.abs())[equal]
        totals.equal += matrix.sum().item()
        totals.equal_rows += int(sizes[equal].sum())
        order = 0.0
        if method not in ("grpo", "rloo"):  # their formulas know no order
            order = _order_variance(method, rewards, step.prompts, result.settings, orders)
            totals.order += order * len(a)
        again = advantages(method, redrawn, step.prompts, result.settings)
        totals.noise += again.square().sum().item()
        totals.signal += (again * deviation).sum().item()
        totals.drawn += len(a)
        row[method] = {
            "std": spread,
            "largest": a.abs().max().item(),
            "order": math.sqrt(order) / spread if spread else 0.0,
            "first": first,
            "last": last,
        }
    result.per_step.append(row)


def _order_variance(method: str, rewards: torch.Tensor, prompts: np.ndarray, settings: KrpoConfig, orders) -> float:
    """Mean over the rows of the variance of A under the given orders of the rows."""
    seen = torch.empty(len(orders), len(rewards), dtype=torch.float64)
    for i, order in enumerate(orders):
        seen[i, order] = advantages(method, rewards[order], prompts[order], settings)
    return seen.var(dim=0, correction=1).mean().item()


def _ends(a: torch.Tensor, groups: Groups, totals: Totals) -> tuple[float, float]:
    matrix = groups.gather(a.abs())
    several = groups.sizes > 1
    totals.by_place += np.bincount(
        np.minimum(_places(groups), PLACES - 1), weights=a.abs()[groups.rows].numpy(), minlength=PLACES
    )
    if not several.any():
        return math.nan, math.nan
    last = matrix.gather(1, (groups.sizes - 1)[:, None])[several]
    first = matrix[several, 0]
    totals.ends += [first.sum().item(), last.sum().item()]
    return first.mean().item(), last.mean().item()


def _places(groups: Groups) -> np.ndarray:
    return groups.mask.nonzero()[:, 1].numpy()


def _equal(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    """(groups,): more than one member and all of one reward."""
    same = (values == values[:, :1]) | ~groups.mask
    return same.all(dim=1) & (groups.sizes > 1)


def _mean(values: torch.Tensor, groups: Groups) -> torch.Tensor:
    return values.sum(dim=1) / groups.sizes  # zero where there is no member


def _redrawn(values: torch.Tensor, groups: Groups, rng: np.random.Generator) -> torch.Tensor:
    """Each member's reward drawn anew, with replacement, from its group's."""
    uniform = torch.from_numpy(rng.random(tuple(values.shape)))
    return values.gather(1, (uniform * groups.sizes[:, None]).long())


class _Sample:
    """A uniform sample of KEPT_GROUPS groups of a stream (Vitter 1985), their rewards in krpo's own order."""

    def __init__(self) -> None:
        self.kept: list[np.ndarray] = []
        self.seen = 0
        self.rng = np.random.default_rng(0)

    def add(self, step: rollouts.Step) -> None:
        rewards = torch.from_numpy(step.rewards)
        groups = group(step.prompts, torch.ones(len(rewards), dtype=torch.bool), Order.shuffled)
        for values, size in zip(groups.gather(rewards).numpy(), groups.sizes.tolist(), strict=True):
            self.seen += 1
            if len(self.kept) < KEPT_GROUPS:
                self.kept.append(values[:size].copy())
            elif (at := self.rng.integers(self.seen)) < KEPT_GROUPS:
                self.kept[at] = values[:size].copy()

    def matrix(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Rewards (groups, width) and mask."""
        sizes = np.array([len(values) for values in self.kept])
        mask = np.arange(sizes.max()) < sizes[:, None]
        matrix = np.zeros(mask.shape)
        matrix[mask] = np.concatenate(self.kept)
        return torch.from_numpy(matrix), torch.from_numpy(mask)


def fit(sample: tuple[torch.Tensor, torch.Tensor], settings: KrpoConfig) -> Fit | None:
    """Q, R, m0, P0 of maximum likelihood over groups (groups, width), mask; None where no group has a spread.

    For given q = Q/R and p = P0/R the innovations are linear in m0, and m0 and R follow in closed form (the
    concentrated likelihood: Harvey 1989, section 3.4); q and p are searched on a grid that is refined twice.
    """
    values, mask = sample
    count = int(mask.sum())
    spread = torch.where(mask, (values - values[:, :1]).abs(), 0.0).amax(dim=1)
    if not (spread > 0).any():
        return None

    def concentrated(q: float, p: float) -> tuple[float, float, float]:
        model = LocalLevel(q, 1.0, 0.0, p)
        error, var = innovations(values, mask, model)
        unit, _ = innovations(torch.ones_like(values), mask, model)
        error, unit, var = error[mask], unit[mask], var[mask]
        mean = ((error * unit / var).sum() / (unit.square() / var).sum()).item()
        scale = ((error - mean * unit).square() / var).mean().item()
        likelihood = -0.5 * (count * (math.log(2 * math.pi * scale) + 1) + var.log().sum().item())
        return likelihood, mean, scale

    qs = [0.0, *np.logspace(-6, 1, 15)]
    ps = [0.0, *np.logspace(-3, 3, 13)]
    for _ in range(3):
        tried = {(q, p): concentrated(q, p) for q in qs for p in ps}
        q, p = max(tried, key=lambda at: tried[at][0])
        qs, ps = _around(qs, q), _around(ps, p)
    likelihood, mean, scale = tried[q, p]

    prior = prior_of(values, _as_groups(mask), settings)
    model = LocalLevel(settings.process_var, prior.measurement_var, prior.init_mean, prior.init_var)
    ours = log_likelihood(values, mask, model)
    return Fit(float(q * scale), scale, mean, float(p * scale), (likelihood - ours.sum().item()) / count)


def _around(grid: list[float], best: float) -> list[float]:
    """A finer grid between the neighbours of `best`; 0 stays in it where it is one of them."""
    at = grid.index(best)
    low, high = grid[max(at - 1, 0)], grid[min(at + 1, len(grid) - 1)]
    if high == 0:
        return [0.0]
    if low == 0:
        return [0.0, *np.logspace(math.log10(high) - 1, math.log10(high), 8)]
    return list(np.unique([best, *np.geomspace(low, high, 8)]))


def _as_groups(mask: torch.Tensor) -> Groups:
    labels = np.repeat(np.arange(len(mask)), mask.sum(dim=1).numpy())
    return group(labels, torch.ones(len(labels), dtype=torch.bool))


def settings_from(assignments: list[str]) -> KrpoConfig:
    """KrpoConfig from ["process_var=3e-5", ...]; ValueError names a wrong key or value."""
    from omegaconf import OmegaConf

    wrong = [item for item in assignments if "=" not in item]
    if wrong:
        raise ValueError(f"--krpo {wrong[0]}: write KEY=VALUE, for example process_var=3e-5")
    return read(KrpoConfig, OmegaConf.from_dotlist(assignments), KRPO_AT)
