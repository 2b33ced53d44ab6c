"""`verl-krpo study forecast`: how well does each tracker foretell a prompt's next visit, on recorded rollouts?

Every tracker goes through a run's steps in order. Before a step it forecasts the prompts that have come before: p, the
mean of the chance that a response is right, and the variance of that chance. Scored on the group of n that then comes,
of which k are right:

    log loss       -log P(k), P the beta-binomial law whose chance has this mean and variance (lower is better)
    Brier          mean over the responses of (r - p)^2 (lower is better)
    dead foretold  share of the dead groups, all right or all wrong, that can be named with a precision of 95 %: those
                   of the largest (p - 1/2)^2 + variance, as many as the precision allows (higher is better). Of pairs
                   that is the order of P(0) + P(2); groups of one do not count

In the first two p is clipped to CHANCES and a + b of the Beta to SURENESS, so that no law rules out what comes.
By the steps since the prompt's last visit, too: 1, 2 to 4, 5 to 19, 20 and more. Intervals: 95 %, resampling prompts
with all their visits.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from verl_krpo.replay import rollouts
from verl_krpo.replay.trackers import TRACKERS
from verl_krpo.report import figure, intervals, tables

CHANCES = 0.01, 0.99
SURENESS = 1.0, 1e6  # responses
PRECISION = 0.95
RESAMPLES = 200  # of prompts
FEWEST = 16  # prompts, for an age to have a row
AGES = {"all": (1, np.inf), "1": (1, 2), "2 to 4": (2, 5), "5 to 19": (5, 20), "20 on": (20, np.inf)}
OURS = next(iter(TRACKERS))


class Visits(NamedTuple):
    """A step: prompts (numbers, each once) with `right` of `total` responses."""

    step: int
    prompts: np.ndarray
    right: np.ndarray
    total: np.ndarray


class Forecasts(NamedTuple):
    """(visits,), of prompts that have come before: what came; and (trackers, visits) what was foretold."""

    prompts: np.ndarray
    age: np.ndarray
    right: np.ndarray
    total: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def read(where: str | Path) -> list[Visits]:
    """The visits of a run. ValueError: a prompt cannot be known again, or a reward is neither 0 nor 1."""
    number: dict[str, int] = {}
    reading, result = rollouts.Reading(), []
    for step in rollouts.steps(where, reading):
        if step.names is None:
            raise ValueError(f"{where}, step {step.number}: rows have no input, so no prompt is known again")
        odd = step.rewards[(step.rewards != 0) & (step.rewards != 1)]
        if len(odd):
            raise ValueError(
                f"{where}, step {step.number}: a reward is {odd[0]:g}; right answers are counted, so rewards must be "
                "0 or 1"
            )
        prompts = np.array([number.setdefault(name, len(number)) for name in step.names])
        prompts, at = np.unique(prompts, return_inverse=True)
        right = np.bincount(at, weights=step.rewards).astype(np.int64)
        result.append(Visits(step.number, prompts, right, np.bincount(at)))
    if reading.damaged:
        raise ValueError(f"{where} has {reading.damaged} damaged lines, the first {reading.examples[0]}")
    steps = [visits.step for visits in result]
    if steps != sorted(set(steps)):
        raise ValueError(f"{where}: a step comes twice or goes back, but a forecast needs steps in their order")
    return result


def forecast(run: Sequence[Visits]) -> Forecasts:
    """Every tracker before every step."""
    count = 1 + max(visits.prompts.max() for visits in run)
    trackers = [make(count) for make in TRACKERS.values()]
    last = np.zeros(count, dtype=np.int64)
    begin = run[0].step - 1  # trackers count steps from 1
    rows = []
    for visits in run:
        step = visits.step - begin
        known = last[visits.prompts] > 0
        prompts = visits.prompts[known]
        mean, var = np.array([tracker.predict(prompts, step) for tracker in trackers]).swapaxes(0, 1)
        rows.append(Forecasts(prompts, step - last[prompts], visits.right[known], visits.total[known], mean, var))
        for tracker in trackers:
            tracker.update(visits.prompts, step, visits.right, visits.total)
        last[visits.prompts] = step
    return _joined(rows)


def join(runs: Sequence[Forecasts]) -> Forecasts:
    """Those of several runs, whose prompts are other prompts."""
    first = np.cumsum([0, *(1 + run.prompts.max(initial=-1) for run in runs)])
    return _joined([run._replace(prompts=run.prompts + at) for run, at in zip(runs, first, strict=False)])


def _joined(parts: Sequence[Forecasts]) -> Forecasts:
    return Forecasts(*(np.concatenate(column, axis=-1) for column in zip(*parts, strict=True)))


def law(mean: np.ndarray, var: np.ndarray, right: np.ndarray, total: np.ndarray) -> np.ndarray:
    """log P(right of total), beta-binomial with mean and variance of the chance."""
    from scipy.special import betaln, gammaln

    mean = mean.clip(*CHANCES)
    sureness = (mean * (1 - mean) / var.clip(1e-12) - 1).clip(*SURENESS)
    a, b = mean * sureness, (1 - mean) * sureness
    ways = gammaln(total + 1) - gammaln(right + 1) - gammaln(total - right + 1)
    return ways + betaln(right + a, total - right + b) - betaln(a, b)


def foretold(claim: np.ndarray, dead: np.ndarray) -> Callable[[np.ndarray], float]:
    """The function of weights (visits,) that gives the share of the dead that can be named with PRECISION.

    claim: (visits,), the larger the sooner a group is named; equal ones together. NaN where none is dead.
    """
    order = np.argsort(-claim, kind="stable")
    dead = dead[order]
    ends = np.flatnonzero(np.diff(claim[order], append=np.nan))

    def share(weights: np.ndarray) -> float:
        weights = weights[order]
        hits, named = (weights * dead).cumsum()[ends], weights.cumsum()[ends]
        return hits[hits >= PRECISION * named].max(initial=0.0) / hits[-1] if len(ends) and hits[-1] else np.nan

    return share


def measure(found: Forecasts, seed: int = 0) -> list[dict]:
    """A row for every age that enough prompts have, and tracker."""
    rows = []
    for age, (low, high) in AGES.items():
        at = (low <= found.age) & (found.age < high)
        if len(np.unique(found.prompts[at])) >= FEWEST:
            rows += _measure(age, Forecasts(*(column[..., at] for column in found)), np.random.default_rng(seed))
    if not rows:
        raise ValueError(f"fewer than {FEWEST} prompts come twice in these runs: too few to compare forecasts")
    return rows


def _measure(age: str, found: Forecasts, rng: np.random.Generator) -> list[dict]:
    _, prompts = np.unique(found.prompts, return_inverse=True)
    right, total, count = found.right, found.total, prompts.max() + 1
    several, mean_reward = total > 1, right / total
    dead = (right == 0) | (right == total)
    shares, per_prompt = [], []
    for mean, var in zip(found.mean, found.var, strict=True):
        p = mean.clip(*CHANCES)
        brier = p**2 - 2 * p * mean_reward + mean_reward  # as r^2 = r
        per_prompt += [np.bincount(prompts, value, count) for value in (-law(p, var, right, total), brier)]
        shares.append(foretold(((mean - 0.5) ** 2 + var)[several], dead[several]))
    sums, visits = np.stack(per_prompt, axis=1), np.bincount(prompts)

    def statistics(weights: np.ndarray) -> np.ndarray:
        """(trackers, 4) of prompts with these weights: log loss, the same less that of ours, Brier, dead foretold."""
        loss, brier = (weights @ sums / (weights @ visits)).reshape(-1, 2).T
        weights = weights[prompts][several]
        return np.stack([loss, loss - loss[0], brier, [share(weights) for share in shares]], axis=1)

    draws = (np.bincount(rng.integers(count, size=count), minlength=count) for _ in range(RESAMPLES))
    values = np.stack([statistics(np.ones(count)), *map(statistics, draws)])
    rows = []
    for k, name in enumerate(TRACKERS):
        row = {"steps_since": age, "tracker": name, "visits": len(prompts), "prompts": count}
        row["dead"] = float(dead[several].mean()) if several.any() else np.nan
        for j, key in enumerate(("log_loss", "to_ours", "brier", "dead_foretold")):
            row[key], row[f"{key}_low"], row[f"{key}_high"] = intervals.of_weighted(values[:, k, j])
        rows.append(row)
    return rows


def text(rows: list[dict]) -> str:
    """Two tables of at most 80 columns: all visits, and the log loss by the steps since the last one."""
    first = rows[0]
    head = (
        f"{first['visits']:,} visits of {first['prompts']:,} prompts that have come before, {first['dead']:.0%} of the "
        "groups dead.\n95 % intervals (± half of them); log loss and Brier: lower is better.\n"
    )

    def half(row: dict, key: str, sign: str = "") -> str:
        return f"{row[key]:{sign}.3f} ±{(row[f'{key}_high'] - row[f'{key}_low']) / 2:.3f}"

    lines = []
    for row in rows:
        if row["steps_since"] == first["steps_since"]:
            share = f"{row['dead_foretold']:.2f} ({row['dead_foretold_low']:.2f}-{row['dead_foretold_high']:.2f})"
            numbers = [f"{row['log_loss']:.3f}", half(row, "to_ours", "+"), half(row, "brier")]
            lines.append([row["tracker"], *numbers, "-" if np.isnan(row["dead_foretold"]) else share])
    ages = list(dict.fromkeys(row["steps_since"] for row in rows))
    by_age = {(row["steps_since"], row["tracker"]): f"{row['log_loss']:.3f}" for row in rows}
    table = tables.table(["tracker", "log loss", f"to {OURS}", "Brier", "dead foretold"], lines)
    return f"{head}\n{table}\n\nLog loss by the steps since the last visit:\n\n" + tables.table(
        ["tracker", *ages], [[name, *(by_age[age, name] for age in ages)] for name in TRACKERS]
    )


def draw(rows: list[dict], path: Path) -> None:
    """All visits: every tracker's three numbers and their intervals."""
    rows = [row for row in rows if row["steps_since"] == rows[0]["steps_since"]][::-1]
    drawn, axes = figure.axes(1, 3, 9, 3.2, sharey=True)
    titles = {"to_ours": f"log loss less {OURS}'s", "brier": "Brier", "dead_foretold": "dead groups foretold"}
    colors = [figure.color("krpo_memory") if row["tracker"] == OURS else "#4d4d4d" for row in rows]
    for axis, (key, title) in zip(axes[0], titles.items(), strict=True):
        for at, (row, color) in enumerate(zip(rows, colors, strict=True)):
            axis.plot([row[f"{key}_low"], row[f"{key}_high"]], [at, at], color=color, lw=1.5)
            axis.plot(row[key], at, "o", color=color, ms=4)
        axis.set_xlabel(title)
    axes[0, 0].axvline(0, color="#bdbdbd", lw=0.8, zorder=0)
    axes[0, 0].set_yticks(range(len(rows)), [row["tracker"] for row in rows])
    figure.save(drawn, path)


def run(runs: Sequence[str | Path], out: Path, seed: int = 0) -> str:
    """Write forecast.csv and forecast.png to `out`; the tables as text."""
    rows = measure(join([forecast(read(where)) for where in runs]), seed)
    tables.write_csv(out / "forecast.csv", rows)
    draw(rows, out / "forecast.png")
    return text(rows)
