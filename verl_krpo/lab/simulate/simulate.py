"""Rewards from known laws, estimators under one signature, and what a gradient makes of their advantages.

A law draws prompts and, twice over, their rewards: (2, prompts, size), the true mean of each reward, (prompts, size),
and its standard deviation around it. An estimator turns the rewards of a batch, (prompts, size), into (baseline,
advantage) of the same shape.

A study is a module of this folder: `measure(seed)` gives rows, `figures(rows)` figures by name, and `table(rows)` what
is printed of them.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from verl_krpo.advantage import ESTIMATORS
from verl_krpo.config import Baseline, KrpoConfig, Order, Scale
from verl_krpo.report import figure, tables

Law = Callable[[np.random.Generator, int, int], tuple[np.ndarray, np.ndarray, np.ndarray | float]]
Estimator = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]

TWICE = 2  # rewards are drawn for the same prompts: what two draws share is signal, the rest is noise
GAUSSIAN_STD = 0.3  # of the prompts' means around 0.5, and of the rewards around them
DRIFT_VAR = 0.02  # of the drifting law, from one response to the next
INFORMATIVE = 0.05  # correlation of the score with the reward where it is nearly independent of it


def run(study: ModuleType, out: Path, seed: int = 0) -> str:
    """Write the study's CSV, of its name, and its figures to `out`; its table."""
    rows = study.measure(seed)
    tables.write_csv(out / f"{study.__name__.rpartition('.')[2]}.csv", rows)
    for name, drawn in study.figures(rows).items():
        figure.save(drawn, out / name)
    return tables.markdown(study.table(rows))


def bernoulli(draw_p: Callable) -> Law:
    """Rewards 0 or 1, with one p a prompt."""

    def law(rng, prompts, size):
        p = _columns(draw_p(rng, prompts).clip(1e-9, 1 - 1e-9), size)
        return (rng.random((TWICE, prompts, size)) < p).astype(float), p, np.sqrt(p * (1 - p))

    return law


def gaussian(rng, prompts, size):
    """theta ~ N(0.5, GAUSSIAN_STD^2), r ~ N(theta, GAUSSIAN_STD^2)."""
    theta = _columns(rng.normal(0.5, GAUSSIAN_STD, prompts), size)
    return theta + rng.normal(0, GAUSSIAN_STD, (TWICE, prompts, size)), theta, GAUSSIAN_STD


def drifting(rng, prompts, size):
    """As gaussian, and theta moves by N(0, DRIFT_VAR) before every response."""
    steps = np.cumsum(rng.normal(0, DRIFT_VAR**0.5, (prompts, size)), axis=1)
    theta = rng.normal(0.5, GAUSSIAN_STD, (prompts, 1)) + steps
    return theta + rng.normal(0, GAUSSIAN_STD, (TWICE, prompts, size)), theta, GAUSSIAN_STD


def mixture(rng, prompts, size):
    """The published reward: 1 right, 0.5 contained, 0.01 wrong, 0 no answer, with their odds drawn a prompt."""
    odds = rng.dirichlet([1.0, 0.3, 1.0, 0.3], prompts)
    values = np.array([1.0, 0.5, 0.01, 0.0])
    picks = (rng.random((TWICE, prompts, size, 1)) > odds.cumsum(axis=1)[:, None, :-1]).sum(axis=-1)
    mean = odds @ values
    return values[picks], _columns(mean, size), _columns(np.sqrt(odds @ values**2 - mean**2), size)


def _columns(means, size):
    return np.repeat(means[:, None], size, axis=1)


CHANCES: dict[str, Callable[[np.random.Generator, int], np.ndarray]] = {
    "uniform": lambda rng, n: rng.random(n),
    "Beta(.5,.5)": lambda rng, n: rng.beta(0.5, 0.5, n),
    "Beta(5,5)": lambda rng, n: rng.beta(5, 5, n),
    "Beta(1,8)": lambda rng, n: rng.beta(1, 8, n),
    "constant .5": lambda rng, n: np.full(n, 0.5),
    "two-point": lambda rng, n: rng.choice([0.05, 0.95], n),
}
PROMPT_MEANS: dict[str, Law] = {name: bernoulli(draw_p) for name, draw_p in CHANCES.items()}
LAWS: dict[str, Law] = PROMPT_MEANS | {"gaussian": gaussian, "drifting": drifting, "mixture": mixture}


def ours(name: str, settings: Any = None) -> Estimator:
    """The plugin's estimator of that name; settings: its keys, None for the defaults."""

    def estimator(rewards):
        uids = np.repeat(np.arange(len(rewards)), rewards.shape[1])
        estimate = ESTIMATORS[name].estimate(torch.from_numpy(rewards.ravel()), uids, settings)
        matrices = (estimate.groups.scatter(m).numpy() for m in (estimate.baseline, estimate.advantage))
        return tuple(m.reshape(rewards.shape) for m in matrices)

    return estimator


def krpo(**settings: Any) -> Estimator:
    """Groups are filtered as they stand: but for the drift, places mean nothing here."""
    return ours("krpo", KrpoConfig(order=Order.arrival, **settings))


def with_verl(name: str, **options) -> Estimator:
    """One of verl's own estimators. Its baseline is the mean of the group, or for RLOO of the other members."""
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    function = get_adv_estimator_fn(name)

    def estimator(rewards):
        size = rewards.shape[1]
        column = torch.from_numpy(rewards.ravel())[:, None]
        index = np.repeat(np.arange(len(rewards)), size)
        advantage, _ = function(column, torch.ones_like(column), index=index, **options)
        baseline = np.broadcast_to(rewards.mean(axis=1, keepdims=True), rewards.shape)
        if name.startswith("rloo"):
            baseline = (size * baseline - rewards) / (size - 1)
        return baseline, advantage.numpy().reshape(rewards.shape)

    return estimator


def estimators() -> dict[str, Estimator]:
    """Everything that is compared."""
    return {
        "GRPO": with_verl("grpo_vectorized"),
        "Dr.GRPO": with_verl("grpo_vectorized", norm_adv_by_std_in_grpo=False),
        "RLOO": with_verl("rloo_vectorized"),
        "krpo (published)": krpo(),
        "krpo predicted": krpo(baseline=Baseline.predicted, scale=Scale.innovation_std),
        "krpo posterior": krpo(baseline=Baseline.posterior),
        "krpo smoothed": krpo(baseline=Baseline.smoothed),
        "krpo leave_one_out": krpo(baseline=Baseline.leave_one_out),
        "krpo_adaptive": ours("krpo_adaptive"),
    }


@dataclasses.dataclass
class Moments:
    """The gradient's signal and its second moment in every simulated batch, (batches,), under two policies.

    independent     score s = rho u + sqrt(1 - rho^2) e, u = (r - theta) / std(r | prompt) and e ~ N(0, 1) drawn apart
                    from the reward, one parameter for all prompts: the score's correlation with the reward is rho, so
                    nearly all of it says nothing about the reward, as for a language model. The mean over e is exact.
    bandit          score s = r - theta, the reward is the action, with parameters of its own for every prompt. (Its
                    best baseline for a Bernoulli reward is 1 - p, which flatters any prior near 0.5.)
    """

    signal: dict[str, np.ndarray]
    second: dict[str, np.ndarray]

    @classmethod
    def of(cls, noise: np.ndarray, std: np.ndarray, advantage: np.ndarray) -> "Moments":
        """noise r - theta, its standard deviation std, advantage: (batches, 2, prompts, size) or broadcast to it."""
        gradient = (advantage * noise).mean(axis=3)  # (batches, 2, prompts)
        shared = INFORMATIVE * (advantage * noise / std).mean(axis=(2, 3))
        rest = (1 - INFORMATIVE**2) * (advantage**2).mean(axis=(2, 3)) / advantage[0, 0].size
        return cls(
            signal={"independent": shared.prod(axis=1), "bandit": gradient.prod(axis=1).mean(axis=1)},
            second={"independent": (shared**2 + rest).mean(axis=1), "bandit": (gradient**2).mean(axis=(1, 2))},
        )

    def snr(self, policy: str, weights: np.ndarray) -> np.ndarray:
        """|E g|^2 / tr Var g for given prompts, under every row of weights (resamples, batches)."""
        signal = weights @ self.signal[policy]
        return signal / (weights @ self.second[policy] - signal)


def draw(law: str, rng: np.random.Generator, prompts: int, size: int, batches: int) -> tuple[np.ndarray, ...]:
    """rewards (batches, 2, prompts, size), their true means and standard deviations (batches, 1, prompts, size)."""
    drawn = [LAWS[law](rng, prompts, size) for _ in range(batches)]
    rewards, truth, std = (np.stack(values) for values in zip(*drawn, strict=True))
    truth = truth[:, None]
    return rewards, truth, np.broadcast_to(std.reshape(batches, 1, *std.shape[1:] or (1, 1)), truth.shape)
