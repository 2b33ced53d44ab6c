"""Methods over the seeds that they share with one of them: mean paired differences and their 95 % intervals.

Over a whole run the mean reward fluctuates less than an accuracy at its end; both are shown. Seeds are paired as far as
verl pairs them: with `actor_rollout_ref.rollout.full_determinism=true` and `data.seed` runs of one seed begin alike.
"""

import math
import re
import statistics
from collections.abc import Callable, Sequence

import numpy as np

from verl_krpo.runs.log import Series
from verl_krpo.runs.seeds import half_width


def by_seed(names: Sequence[str]) -> dict[str, dict[int, int]]:
    """Method -> seed -> which name. ValueError for a name that does not end in `_seedN`."""
    methods: dict[str, dict[int, int]] = {}
    for k, name in enumerate(names):
        if not (found := re.fullmatch(r"(.+)_seed(\d+)", name)):
            raise ValueError(f"{name}: runs are paired by the `_seedN` at the end of their names")
        methods.setdefault(found[1], {})[int(found[2])] = k
    return methods


def over_run(series: Series) -> float:
    """Mean over all steps; NaN where nothing was logged."""
    return statistics.fmean(series.values()) if series else math.nan


def at_end(series: Series) -> float:
    """Of the last step; NaN where nothing was logged."""
    return series[max(series)] if series else math.nan


def rows(
    names: Sequence[str], series: Sequence[Series], value: Callable[[Series], float], against: str
) -> list[tuple[str, int, float, float, float]]:
    """(method, seeds shared with `against`, mean value, mean difference to `against`, half of its interval).

    The difference is NaN for `against` itself, and where a run did not log the series; half is NaN of one seed.
    """
    methods = by_seed(names)
    if against not in methods:
        raise ValueError(f"no run of {against} among {', '.join(methods)}")
    lines = []
    for method, runs in methods.items():
        if seeds := sorted(runs.keys() & methods[against].keys()):
            own, other = (np.array([value(series[of[seed]]) for seed in seeds]) for of in (runs, methods[against]))
            difference = math.nan if method == against else (own - other).mean()
            lines.append((method, len(seeds), own.mean(), difference, half_width(own - other)))
    return lines
