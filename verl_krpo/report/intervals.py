"""What a mean over problems is worth: 95 % intervals by resampling problems, p-values of paired differences."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

RESAMPLES = 10_000
ENUMERATED = 14  # up to so many non-zero differences every pattern of signs is tried
SEED = 0


@dataclass
class Estimate:
    value: float
    low: float
    high: float


def resampled(values: Sequence[float]) -> Estimate:
    """Mean over problems with the 95 % percentile interval of its bootstrap."""
    values = np.asarray(values, dtype=np.float64)
    low, high = np.percentile(_times_drawn(len(values)) @ values / len(values), [2.5, 97.5])
    return Estimate(float(values.mean()), float(low), float(high))


@lru_cache(maxsize=1)
def _times_drawn(problems: int) -> np.ndarray:
    """How often each problem is in each resample, (resamples, problems); the metrics of a benchmark share it."""
    rng = np.random.default_rng(SEED)
    return rng.multinomial(problems, np.full(problems, 1 / problems), size=RESAMPLES).astype(np.float64)


def p_value(differences: Sequence[float]) -> float:
    """Two-sided p of a zero mean under independent random signs: every pattern of signs if few, else 10,000 drawn."""
    differences = np.asarray([d for d in differences if d != 0], dtype=np.float64)
    if not len(differences):
        return 1.0
    observed = abs(differences.sum()) - 1e-9
    if len(differences) <= ENUMERATED:
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
