"""The interval of a mean over seeds."""

import numpy as np


def half_width(values: np.ndarray) -> np.ndarray:
    """Of the 95 % interval (Student's t) of the mean over the first axis; NaN of one value, 0 of equal ones."""
    from scipy import stats

    if len(values) < 2:
        return np.full(np.shape(values)[1:], np.nan)[()]
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
