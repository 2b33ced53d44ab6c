"""What a number from a sample is worth: the bootstrap, Student's interval, p-values of differences. Intervals: 95 %."""

import itertools
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

RESAMPLES = 10_000
ALL_SIGNS_UP_TO = 14  # up to so many non-zero differences every pattern of signs is tried
SEED = 0


class Measured(NamedTuple):
    """A value and its interval."""

    value: float
    low: float
    high: float

    def columns(self, name: str) -> dict[str, float]:
        """Of a line of a CSV."""
        return {name: self.value, f"{name}_low": self.low, f"{name}_high": self.high}


def resampled(values: Sequence[float]) -> Measured:
    """Mean over problems with the 95 % percentile interval of its bootstrap."""
    return of_weighted(_of_problems(len(values)) @ np.asarray(values, dtype=np.float64))


@lru_cache(maxsize=1)
def _of_problems(count: int) -> np.ndarray:
    """The metrics of a benchmark share it."""
    return weights(np.random.default_rng(SEED), count, RESAMPLES)


def times_drawn(rng: np.random.Generator, count: int, resamples: int) -> np.ndarray:
    """How often each of `count` is in each bootstrap resample, (resamples, count)."""
    return rng.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float64)


def weights(rng: np.random.Generator, count: int, resamples: int = 400) -> np.ndarray:
    """Weights of means over the sample itself, in the first row, and over its resamples, (1 + resamples, count)."""
    return np.concatenate([np.full((1, count), 1 / count), times_drawn(rng, count, resamples) / count])


def of_weighted(values: np.ndarray) -> Measured:
    """Of a statistic under every row of `weights`: its value, and the interval of its resamples."""
    return Measured(float(values[0]), *middle(values[1:]))


def bootstrapped(
    statistic: Callable[..., np.ndarray],
    *paired: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 2000,
    method: str = "linear",
) -> Measured:
    """Of a statistic of paired arrays (count, ...), which gets them with an axis of resamples before that too."""
    chosen = rng.integers(len(paired[0]), size=(resamples, len(paired[0])))
    return Measured(float(statistic(*paired)), *middle(statistic(*(array[chosen] for array in paired)), method))


def middle(values: np.ndarray, method: str = "linear") -> tuple[float, float]:
    """The 2.5 and 97.5 percentiles. method `nearest`: percentiles that are among the values, as some may be inf."""
    low, high = np.percentile(values, [2.5, 97.5], method=method)
    return float(low), float(high)


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of a zero mean under independent random signs: every pattern of signs if few, else 10,000 drawn."""
    differences = np.asarray([d for d in differences if d != 0], dtype=np.float64)
    if not len(differences):
        return 1.0
    observed = abs(differences.sum()) - 1e-9
    if len(differences) <= ALL_SIGNS_UP_TO:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(differences))))
        return float(np.mean(np.abs(signs @ differences) >= observed))
    signs = np.random.default_rng(SEED).choice((-1, 1), size=(RESAMPLES, len(differences)))
    return float((1 + np.sum(np.abs(signs @ differences) >= observed)) / (1 + RESAMPLES))


def half_width(values: np.ndarray) -> np.ndarray:
    """Of the 95 % interval (Student's t) of the mean over the first axis; NaN of one value, 0 of equal ones."""
    from scipy import stats

    if len(values) < 2:
        return np.full(np.shape(values)[1:], np.nan)[()]
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)


def mean_and_half(differences: np.ndarray) -> tuple[float, float]:
    """Mean of paired differences (pairs,), and `half_width` of it."""
    return float(differences.mean()), float(half_width(differences))
