"""Methods over the seeds that they share with one of them: mean paired differences and their 95 % intervals.

Seeds are paired as far as verl pairs them: with `actor_rollout_ref.rollout.full_determinism=true` and `data.seed` runs
of one seed begin alike.
"""

import math
import re
from collections.abc import Mapping

import numpy as np

from verl_krpo.report.intervals import mean_and_half


def by_seed(values: Mapping[str, float]) -> dict[str, dict[int, float]]:
    """Method -> seed -> value, from the values of runs by name. ValueError for a name that does not end in `_seedN`."""
    methods: dict[str, dict[int, float]] = {}
    for name, value in values.items():
        if not (found := re.fullmatch(r"(.+)_seed(\d+)", name)):
            raise ValueError(f"{name}: runs are paired by the `_seedN` at the end of their names")
        methods.setdefault(found[1], {})[int(found[2])] = value
    return methods


def differences(values: Mapping[str, float], against: str) -> dict[str, tuple[int, float, float, float]]:
    """Method -> seeds shared with `against`, mean value, mean difference to `against`, half of its interval.

    values: one a run, by its name; NaN is kept. The difference is NaN for `against` itself, half is NaN of one seed.
    """
    methods = by_seed(values)
    if against not in methods:
        raise ValueError(f"no run of {against} among {', '.join(methods)}")
    result = {}
    for method, runs in methods.items():
        if seeds := sorted(runs.keys() & methods[against].keys()):
            own, other = (np.array([of[seed] for seed in seeds]) for of in (runs, methods[against]))
            difference, half = mean_and_half(own - other)
            result[method] = len(seeds), own.mean(), math.nan if method == against else difference, half
    return result
