"""krpo_memory on prompts that drift as in training: does it help where prompts recur, and cost nothing where not?

A pool of prompts with Bernoulli rewards, logits drawn from N(-0.5, 1.3); before every step all rise by `rise` and each
wanders by `wander` (their standard deviation). A step takes `batch` prompts, without replacement until all have come.
Measured is the residual E(r_i - b_i)^2 = E (p - b_i)^2 + p (1 - p) of every step after three visits, of krpo_memory
over that of RLOO (at one response a prompt: of the mean of the other responses of the batch) and of krpo_adaptive; 95 %
intervals over seeds (bootstrap), the same prompts and rewards for all.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from verl_krpo.advantage.adaptive import krpo_adaptive
from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.report import figure, intervals, tables

SIZES = (1, 2, 4, 8)
SEEDS = 24
VISITS = 3  # before it counts
RATIOS = {
    "memory_to_rloo": ("krpo_memory", "reference"),
    "adaptive_to_rloo": ("krpo_adaptive", "reference"),
    "memory_to_adaptive": ("krpo_memory", "krpo_adaptive"),
}


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
            for key, (over, under) in RATIOS.items():
                row |= ratio(columns[over], columns[under], rng).columns(key)
            rows.append(row)
    return rows


def figures(rows: list[dict]) -> dict:
    lines = [
        {"training": row["training"], "size": row["size"], "baseline": RATIOS[key][0]}
        | {f"ratio{end}": row[f"{key}{end}"] for end in ("", "_low", "_high")}
        for row in rows
        for key in ("adaptive_to_rloo", "memory_to_rloo")
    ]
    colors = figure.colors(["krpo_adaptive", "krpo_memory"])
    label = {"ratio": "E(r-b)$^2$ / RLOO's\n(n = 1: the batch mean's)"}
    drawn, panels = figure.over_sizes(lines, "training", label, colors, "baseline")
    for panel in panels.flat:
        panel.axhline(1, color="#4d4d4d", lw=0.8, ls="--")
    return {"memory": drawn}


def table(rows: list[dict]) -> list[dict]:
    return [
        {
            "training": row["training"],
            "n": str(row["size"]),
            "krpo_memory / RLOO": tables.interval(row, "memory_to_rloo"),
            "krpo_adaptive / RLOO": tables.interval(row, "adaptive_to_rloo"),
            "krpo_memory / krpo_adaptive": tables.interval(row, "memory_to_adaptive"),
            "nis": f"{row['nis']:.2f}",
        }
        for row in rows
    ]
