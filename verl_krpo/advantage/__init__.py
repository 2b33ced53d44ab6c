"""Rewards to advantages: every estimator a function in a file of its name."""

from collections.abc import Callable
from typing import Any, NamedTuple

from verl_krpo.advantage.adaptive import krpo_adaptive
from verl_krpo.advantage.jspo import jspo
from verl_krpo.advantage.krpo import krpo
from verl_krpo.advantage.memory import krpo_memory
from verl_krpo.config import AdaptiveConfig, JspoConfig, KrpoConfig, MemoryConfig, read


class Estimator(NamedTuple):
    """keys: the dataclass of `algorithm.<name>.*`.

    estimate: (rewards, prompts, settings, weights, counted) -> Estimate; krpo_memory takes and gives its memory too.
    """

    keys: type
    estimate: Callable


# By the name of algorithm.adv_estimator, of the config group, and of its node in `algorithm`.
ESTIMATORS = {
    "krpo": Estimator(KrpoConfig, krpo),
    "krpo_adaptive": Estimator(AdaptiveConfig, krpo_adaptive),
    "krpo_memory": Estimator(MemoryConfig, krpo_memory),
    "jspo": Estimator(JspoConfig, jspo),
}


def settings_of(name: str, algorithm: Any) -> Any:
    """The keys of the estimator `name` in verl's `algorithm` node (DictConfig, AlgoConfig, dict or None), typed.

    ValueError names a wrong one.
    """
    return read(ESTIMATORS[name].keys, None if algorithm is None else algorithm.get(name), f"algorithm.{name}")
