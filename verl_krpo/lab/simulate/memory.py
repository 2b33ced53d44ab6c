"""krpo_memory on prompts that drift as in training: does it help where prompts recur, and cost nothing where not?

A pool of prompts with Bernoulli rewards, logits drawn from N(-0.5, 1.3); before every step all rise by `rise` and each
wanders by `wander` (their standard deviation). A step takes `batch` prompts, without replacement until all have come.
Measured is the residual E(r_i - b_i)^2 = E (p - b_i)^2 + p (1 - p) of every step after three visits, of krpo_memory
over that of RLOO (at one response a prompt: of the mean of the other responses of the batch) and of krpo_adaptive; 95 %
intervals over seeds (bootstrap), the same prompts and rewards for all.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from verl_krpo.advantage.adaptive import krpo_adaptive
from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.report import figure, intervals, tables

SIZES = (1, 2, 4, 8)
SEEDS = 24
VISITS = 3  # before it counts


@dataclass(frozen=True)
class Training:
    """Which prompts come when, and how their chances of a reward move."""

    rise: float = 0.03
    wander: float = 0.05
    pool: int = 128
    batch: int = 32
    steps: int = 60
    once: bool = False  # every prompt is a new one
    reshuffled: bool = False  # a prompt's rewards are another prompt's at every visit

    @property
    def begin(self) -> int:
        """The first step that counts."""
        return VISITS * (1 if self.once else self.pool // self.batch)

    def draw(self, size: int, rng: np.random.Generator) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """Prompts (batch,), chances (batch,) and rewards (batch, size) of every step."""
        pool = self.batch * self.steps if self.once else self.pool
        logits = rng.normal(-0.5, 1.3, pool)
        waiting: list[int] = []
        for _ in range(self.steps):
            logits += self.rise + self.wander * rng.normal(size=pool)
            if len(waiting) < self.batch:
                waiting = rng.permutation(pool).tolist()
            prompts, waiting = np.array(waiting[: self.batch]), waiting[self.batch :]
            chances = 1 / (1 + np.exp(-logits[rng.permutation(pool)[: self.batch] if self.reshuffled else prompts]))
            yield prompts, chances, (rng.random((self.batch, size)) < chances[:, None]).astype(float)


TRAININGS = {
    "as in training": Training(),
    "static": Training(rise=0, wander=0),
    "improving": Training(rise=0.03, wander=0),
    "forgetting": Training(rise=-0.03),
    "fast": Training(rise=0.1, wander=0.2),
    "rewards reshuffled": Training(reshuffled=True),
    "prompts once": Training(once=True),
    "8 prompts a step": Training(pool=32, batch=8, steps=120),
    "8 a step, once": Training(batch=8, once=True),
}


def residuals(training: Training, size: int, seed: int) -> dict[str, float]:
    """Mean residual of each baseline over the steps that count, and krpo/nis of the memory."""
    rng = np.random.default_rng(seed)
    memory, sums = PromptMemory(), []
    for step, (prompts, chances, rewards) in enumerate(training.draw(size, rng)):
        rows, labels = torch.from_numpy(rewards.reshape(-1)), prompts.repeat(size)
        remembered, memory = krpo_memory(rows, labels, memory, step=step)
        total = rewards.sum(axis=1, keepdims=True)
        baselines = {
            "reference": (total - rewards) / (size - 1) if size > 1 else (total.sum() - total) / (len(total) - 1),
            "krpo_adaptive": krpo_adaptive(rows, labels).baseline.numpy(),
            "krpo_memory": remembered.baseline.numpy(),
        }
        if step < training.begin:
            continue
        chance = chances[:, None]
        found = {name: np.mean((chance - b) ** 2 + chance * (1 - chance)) for name, b in baselines.items()}
        spread = remembered.baseline_var + remembered.model.columns(len(labels) // size, rows.device)[1][:, None]
        found["nis"] = ((remembered.rewards - remembered.baseline).square() / spread).mean().item()
        sums.append(found)
    return {name: float(np.mean([found[name] for found in sums])) for name in sums[0]}


def ratio(over: list[float], under: list[float], rng: np.random.Generator) -> intervals.Measured:
    """Mean of `over` by mean of `under`, paired by seed, and its 95 % interval."""

    def statistic(over: np.ndarray, under: np.ndarray) -> np.ndarray:
        return over.mean(-1) / under.mean(-1)

    return intervals.bootstrapped(statistic, np.array(over), np.array(under), rng=rng)


def measure(seed: int = 0, trainings: dict[str, Training] = TRAININGS, sizes=SIZES, seeds: int = SEEDS) -> list[dict]:
    """One row a training and group size."""
    rng, rows = np.random.default_rng(seed), []
    for name, training in trainings.items():
        for size in sizes:
            runs = [residuals(training, size, seed * seeds + k) for k in range(seeds)]
            columns = {key: [run[key] for run in runs] for key in runs[0]}
            row = {"training": name, "size": size, "nis": float(np.mean(columns["nis"]))}
            for key, over, under in (
                ("memory_to_rloo", "krpo_memory", "reference"),
                ("adaptive_to_rloo", "krpo_adaptive", "reference"),
                ("memory_to_adaptive", "krpo_memory", "krpo_adaptive"),
            ):
                row[key], row[f"{key}_low"], row[f"{key}_high"] = ratio(columns[over], columns[under], rng)
            rows.append(row)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    names = list(dict.fromkeys(row["training"] for row in rows))
    drawn, axes = figure.axes(1, len(names), 1.6 * len(names) + 1, 2.8, sharex=True, sharey=True)
    for axis, name in zip(axes[0], names, strict=True):
        cells = [row for row in rows if row["training"] == name]
        size = [row["size"] for row in cells]
        for key, label in (("adaptive_to_rloo", "krpo_adaptive"), ("memory_to_rloo", "krpo_memory")):
            value = np.array([row[key] for row in cells])
            error = np.abs(np.array([[row[f"{key}_low"], row[f"{key}_high"]] for row in cells]).T - value)
            axis.errorbar(size, value, yerr=error, fmt="o-", ms=3, lw=1.3, color=figure.color(label), label=label)
        axis.axhline(1, color="#4d4d4d", lw=0.8, ls="--")
        axis.set_xscale("log", base=2)
        axis.set_xticks(size, [str(n) for n in size])
        axis.set_title(name, fontsize=9)
        axis.set_xlabel("group size")
    axes[0, 0].set_ylabel("E(r-b)$^2$ / RLOO's\n(n = 1: the batch mean's)")
    axes[0, 0].legend(fontsize=8)
    figure.save(drawn, path)


def run(out: Path, seed: int = 0) -> str:
    """Write memory.csv and memory.png to `out`; every cell as text."""
    rows = measure(seed)
    tables.write_csv(out / "memory.csv", rows)
    draw(rows, out / "memory.png")

    def cell(row: dict, key: str) -> str:
        return f"{row[key]:.3f} ({row[key + '_low']:.3f}-{row[key + '_high']:.3f})"

    keys = ("memory_to_rloo", "adaptive_to_rloo", "memory_to_adaptive")
    lines = [[r["training"], str(r["size"]), *(cell(r, k) for k in keys), f"{r['nis']:.2f}"] for r in rows]
    header = ["training", "n", "krpo_memory / RLOO", "krpo_adaptive / RLOO", "krpo_memory / krpo_adaptive", "nis"]
    return tables.table(header, lines)
