"""A saturating curve through a run's held-out accuracy: does a method change how fast a model learns, or how far?

    a(t) = a_0 + (A - a_0) / (1 + (t_mid / t)^B)            (arXiv 2510.13786, section 2)

t: steps of training, a_0: the accuracy before the first. ceiling A: where it would end; speed B: how steep it is;
midpoint t_mid: the step at which half of the way is done. By least squares.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from verl_krpo.report.intervals import half_width
from verl_krpo.runs.log import Series

FEWEST = 5  # points after the first, for three unknowns


class Fit(NamedTuple):
    ceiling: float
    speed: float
    midpoint: float


def saturating(steps: np.ndarray, start: float, ceiling: float, speed: float, midpoint: float) -> np.ndarray:
    """a(t) at steps > 0."""
    return start + (ceiling - start) / (1 + (midpoint / steps) ** speed)


def fit(accuracy: Series) -> Fit:
    """Of a run's {step: accuracy in 0..1}, the first one before training.

    ValueError with fewer than FEWEST later points, or where they do not say what the curve is (it has not bent yet);
    RuntimeError where the least squares do not converge.
    """
    from scipy.optimize import curve_fit

    if len(accuracy) <= FEWEST:
        raise ValueError(f"{len(accuracy)} accuracies: a curve needs one and {FEWEST} more; set trainer.test_freq")
    (first, start), *later = sorted(accuracy.items())
    steps, values = np.array(later, dtype=float).T
    steps = steps - first
    guess, most = Fit(min(0.99, max(values.max(), start) + 0.02), 1.0, float(np.median(steps))), 100 * steps[-1]
    found, _ = curve_fit(
        lambda t, *numbers: saturating(t, start, *numbers),
        steps,
        values,
        p0=guess,
        bounds=([0, 0.1, 0], [1, 10, most]),
    )
    fitted = Fit(*map(float, found))
    if fitted.midpoint > steps[-1]:
        raise ValueError(
            f"half of the way would be done at step {fitted.midpoint:.0f}, and the run ends at {steps[-1]:.0f}: its "
            "ceiling cannot be told yet"
        )
    return fitted


def over_seeds(fits: Sequence[Fit]) -> tuple[Fit, Fit]:
    """Mean over runs of one method, and half of its 95 % interval (Student's t); NaN of one run."""
    values = np.array(fits)
    return Fit(*values.mean(0)), Fit(*half_width(values))
