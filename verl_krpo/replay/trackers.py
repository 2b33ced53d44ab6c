"""What a prompt's next visit will bring, by every tracker that has been published for it, and krpo_memory's.

A tracker is made for a run of `count` prompts, numbered from 0. Before a step it says what it holds of the chance that
a response of these prompts is right: mean and variance, (prompts,); the variance is 0 where a method knows none. After
the step it is told how many of their responses were right.

Of a visit with S of N right, mean r = S / N:

    last        v = r
    EMA         v <- (v + r) / 2, at first r
    batch mean  the mean over all prompts of the step before
    Beta(a, b)  a <- k a + (1 - k) c + S,  b <- k b + (1 - k) c + N - S:    mean a / (a + b)
        SPO     (arXiv 2509.13232)  c = 0, k = 0.9; SPO's k follows the policy's KL within 0.875 .. 0.96, which a log
                does not tell. A new prompt begins with the mean of its batch, worth eight responses (SPO: eight
                responses sampled beforehand)
        MoPPS   (2507.04632)  c = 1, begins with Beta(1, 1); k = 1 in its runs on MATH; 0.5 forgets
        DBB     (2603.18444)  c = 0, begins with Beta(1, 1); k = 0.5 and 0.75 for its two models
    DPS         (2603.10887)  a hidden Markov model, see DPS
    memory      krpo_memory's own (advantage/memory.py); without level: L stays that of the first step
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch

from verl_krpo.advantage.memory import PromptMemory, krpo_memory

UNKNOWN = 0.5, 1 / 12  # mean and variance of Beta(1, 1)


class Tracker(Protocol):
    def predict(self, prompts: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance of the chance of each of these prompts before `step`."""
        ...

    def update(self, prompts: np.ndarray, step: int, right: np.ndarray, total: np.ndarray) -> None:
        """right of total (prompts,) responses were right."""
        ...


class Average:
    def __init__(self, count: int, weight: float):
        self.weight, self.value = weight, np.full(count, np.nan)

    def predict(self, prompts, step):
        return np.nan_to_num(self.value[prompts], nan=UNKNOWN[0]), np.zeros(len(prompts))

    def update(self, prompts, step, right, total):
        mean, before = right / total, self.value[prompts]
        self.value[prompts] = np.where(np.isnan(before), mean, before + self.weight * (mean - before))


class BatchMean:
    def __init__(self, count: int):
        self.mean = UNKNOWN[0]

    def predict(self, prompts, step):
        return np.full(len(prompts), self.mean), np.zeros(len(prompts))

    def update(self, prompts, step, right, total):
        self.mean = right.sum() / total.sum()


class Beta:
    """keep: k; back: c; worth: responses that the mean of its batch counts for a new prompt, 0: Beta(1, 1)."""

    def __init__(self, count: int, keep: float, back: float = 0.0, worth: float = 0.0):
        self.keep, self.back, self.worth = keep, back, worth
        self.counts, self.new = np.ones((count, 2)), np.ones(count, dtype=bool)

    def predict(self, prompts, step):
        a, b = self.counts[prompts].T
        mean = a / (a + b)
        return mean, mean * (1 - mean) / (a + b + 1)

    def update(self, prompts, step, right, total):
        if self.worth:
            mean = right.sum() / total.sum()
            self.counts[prompts[self.new[prompts]]] = self.worth * np.array([mean, 1 - mean])
        self.new[prompts] = False
        seen = np.stack([right, total - right], axis=1)
        self.counts[prompts] = self.keep * self.counts[prompts] + (1 - self.keep) * self.back + seen


class DPS:
    """States: all of a group wrong, some right, all right; seen without noise at a visit, else moved every step by P.

    P's columns are the means of Dirichlet counts C of moves, a prompt its own; with pi a distribution of states:

        pi' = P pi,   P = C / its columns' sums         C <- k C + (1 - k) 1 + P o (pi' pi^T) / its sum

    the last term at visits alone, where pi' is what was seen. k = 0.7 and counts from 1 as in its runs on MATH. Of the
    chance it holds that it is 0, 1/2 or 1.
    """

    KEEP = 0.7
    LONG = 64  # steps, after which nothing is left of what was seen: KEEP^LONG is 1e-10

    def __init__(self, count: int):
        self.moves, self.states = np.ones((count, 3, 3)), np.full((count, 3), 1 / 3)
        self.at = np.zeros(count, dtype=np.int64)  # step of `states`, 0 before the first visit

    def _forward(self, prompts: np.ndarray, step: int) -> tuple[np.ndarray, np.ndarray]:
        """C and pi of the step before `step`."""
        moves, states = self.moves[prompts], self.states[prompts]
        unseen = np.where(self.at[prompts] > 0, step - 1 - self.at[prompts], 0)
        for passed in range(min(self.LONG, unseen.max(initial=0))):
            on = unseen > passed
            moves[on], states[on] = self.KEEP * moves[on] + 1 - self.KEEP, _moved(moves[on], states[on])
        return moves, states

    def predict(self, prompts, step):
        states = _moved(*self._forward(prompts, step))
        mean = states @ [0, 0.5, 1]
        return mean, states @ [0, 0.25, 1] - mean**2

    def update(self, prompts, step, right, total):
        moves, states = self._forward(prompts, step)
        seen = np.eye(3)[np.where(right == 0, 0, np.where(right == total, 2, 1))]
        move = moves / moves.sum(axis=1, keepdims=True) * seen[:, :, None] * states[:, None, :]
        moves = self.KEEP * moves + 1 - self.KEEP + move / move.sum(axis=(1, 2), keepdims=True)
        self.moves[prompts], self.states[prompts], self.at[prompts] = moves, seen, step


def _moved(moves: np.ndarray, states: np.ndarray) -> np.ndarray:
    return np.einsum("pij,pj->pi", moves / moves.sum(axis=1, keepdims=True), states)


class Memory:
    def __init__(self, count: int, level: bool = True):
        self.memory, self.level = PromptMemory(), level

    def predict(self, prompts, step):
        if self.memory.model() is None:
            return np.full(len(prompts), UNKNOWN[0]), np.full(len(prompts), UNKNOWN[1])
        mean, std, _, _ = self.memory.forecast(prompts, step)
        return mean, std**2

    def update(self, prompts, step, right, total):
        members = np.arange(total.max()) < total[:, None]
        rewards = (np.arange(total.max()) < right[:, None])[members]
        rows = torch.from_numpy(rewards.astype(np.float64))
        _, self.memory = krpo_memory(rows, prompts.repeat(total), self.memory, step=step)
        if not self.level:
            self.memory = replace(self.memory, weight=np.inf)  # so sure of L that nothing moves it


TRACKERS: dict[str, Callable[[int], Tracker]] = {
    "krpo_memory": Memory,
    "without level": lambda count: Memory(count, level=False),
    "EMA": lambda count: Average(count, 0.5),
    "SPO": lambda count: Beta(count, 0.9, worth=8),
    "MoPPS": lambda count: Beta(count, 1.0, back=1),
    "MoPPS 0.5": lambda count: Beta(count, 0.5, back=1),
    "DBB 0.5": lambda count: Beta(count, 0.5),
    "DBB 0.75": lambda count: Beta(count, 0.75),
    "DPS": DPS,
    "last visit": lambda count: Average(count, 1.0),
    "batch mean": BatchMean,
}
