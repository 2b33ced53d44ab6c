"""What a user can set: the defaults are the published ones, a wrong value names its key.

Both classes are plain dataclasses. OmegaConf checks keys, types and words, `__post_init__` the ranges.
"""

import functools
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

NumberOrWord = int | float | str  # the words are "batch" and "auto"
BATCH = "batch"
AUTO = "auto"
KRPO_AT = "algorithm.krpo"
KPO_AT = "actor_rollout_ref.actor.policy_loss.kpo"


class Order(str, Enum):
    shuffled = "shuffled"
    arrival = "arrival"


class Baseline(str, Enum):
    causal = "causal"
    predicted = "predicted"
    posterior = "posterior"
    smoothed = "smoothed"
    leave_one_out = "leave_one_out"
    jspo = "jspo"


class Scale(str, Enum):
    filter_std = "filter_std"
    innovation_std = "innovation_std"
    group_std = "group_std"
    none = "none"


class Memory(str, Enum):
    none = "none"
    prompt = "prompt"


class Gain(str, Enum):
    scheduled = "scheduled"
    steady = "steady"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Rule = tuple[Callable[[Any], bool], str]  # what holds for a valid value, and in words
FINITE_OR_BATCH: Rule = (lambda v: v == BATCH or _finite(v), "a finite number or the word batch")
NON_NEGATIVE: Rule = (lambda v: _finite(v) and v >= 0, "a finite number >= 0")
NON_NEGATIVE_OR_AUTO: Rule = (lambda v: v == AUTO or (_finite(v) and v >= 0), f"{NON_NEGATIVE[1]} or the word auto")
NON_NEGATIVE_OR_BATCH: Rule = (lambda v: v == BATCH or (_finite(v) and v >= 0), f"{NON_NEGATIVE[1]} or the word batch")
POSITIVE: Rule = (lambda v: _finite(v) and v > 0, "a finite number > 0")
POSITIVE_OR_BATCH: Rule = (lambda v: v == BATCH or (_finite(v) and v > 0), f"{POSITIVE[1]} or the word batch")
POSITIVE_OR_NULL: Rule = (lambda v: v is None or (_finite(v) and v > 0), f"{POSITIVE[1]} or null")


def _validate(config: Any, at: str, rules: dict[str, Rule], words: dict[str, type[Enum]]) -> None:
    """ValueError names a value that breaks its rule; a plain word becomes its enum."""
    for key, (holds, rule) in rules.items():
        value = getattr(config, key)
        if not holds(value):
            raise ValueError(f"{at}.{key}={value!r} is not valid: {rule}")
    for key, enum in words.items():
        value = getattr(config, key)
        if value not in list(enum):
            raise ValueError(f"{at}.{key}={value!r} is not valid: one of {', '.join(enum.__members__)}")
        setattr(config, key, enum(value))


SHRUNK = {  # a group's mean is shrunk towards those of the batch
    "process_var": 0.0,
    "measurement_var": BATCH,
    "init_mean": BATCH,
    "init_var": BATCH,
    "baseline": Baseline.leave_one_out,
}


@dataclass
class KrpoConfig:
    """`algorithm.krpo.*`, the advantage estimator (arXiv 2505.07527).

    Attributes:
        process_var: Q >= 0, variance of the drift between two members of a group, in squared reward units
        measurement_var: R > 0, variance of a reward around the state, or `batch`: estimated from the other groups
        init_mean: m0, prior mean of the state in reward units, or `batch`
        init_var: P0 >= 0, prior variance of the state, or `batch`
        epsilon: added to the standard deviation that divides, >= 0
        order: in which order the members of a group are filtered; `arrival` is in verl shortest first, `shuffled` a
            permutation by the prompt's id
        baseline: which estimate of the state is subtracted from the reward; jspo (arXiv 2511.03710), which is no
            filter, reads neither the model nor the order and goes with scale `none` or `group_std`
        scale: what the difference is divided by
        memory: `prompt` keeps a state a prompt over training time (advantage/memory.py)
        memory_var: Q >= 0 of such a state, variance of its drift in a step, or `auto`: learned
    """

    process_var: float = 1e-5
    measurement_var: NumberOrWord = 1e-2
    init_mean: NumberOrWord = 0.0
    init_var: NumberOrWord = 1.0
    epsilon: float = 1e-8
    order: Order = Order.shuffled
    baseline: Baseline = Baseline.causal
    scale: Scale = Scale.filter_std
    memory: Memory = Memory.none
    memory_var: NumberOrWord = AUTO

    def __post_init__(self) -> None:
        rules = {
            "process_var": NON_NEGATIVE,
            "measurement_var": POSITIVE_OR_BATCH,
            "init_mean": FINITE_OR_BATCH,
            "init_var": NON_NEGATIVE_OR_BATCH,
            "epsilon": NON_NEGATIVE,
            "memory_var": NON_NEGATIVE_OR_AUTO,
        }
        _validate(self, KRPO_AT, rules, {"order": Order, "baseline": Baseline, "scale": Scale, "memory": Memory})
        if self.baseline == Baseline.jspo and self.scale in (Scale.filter_std, Scale.innovation_std):
            raise ValueError(
                f"{KRPO_AT}.scale={self.scale.value} needs the variance of a filter, which {KRPO_AT}.baseline=jspo is "
                "not: use scale=none, the published one, or scale=group_std"
            )
        others = [f"{key}={getattr(self, key)}" for key, value in SHRUNK.items() if getattr(self, key) != value]
        if self.memory == Memory.prompt and others:
            raise ValueError(
                f"{KRPO_AT}.memory=prompt has the prior and the baseline of krpo_adaptive, not {', '.join(others)}: "
                "start from +algorithm=krpo_memory, or set memory=none"
            )
        if self.scale == Scale.filter_std and self.process_var == 0 and self.init_var in (0, BATCH):
            raise ValueError(
                f"{KRPO_AT}.scale=filter_std divides by the state's standard deviation, which process_var=0 with "
                f"init_var={self.init_var} can make zero: use scale=innovation_std, or a process_var > 0"
            )


@dataclass
class KpoConfig:
    """`actor_rollout_ref.actor.policy_loss.kpo.*`, the policy loss (arXiv 2602.10609).

    Attributes:
        process_var: Q >= 0, variance of the log-ratio's drift from token to token; with measurement_var=batch the
            smallest Q/R
        measurement_var: R > 0, variance of a token's log-ratio around the state, or `batch`: measured by micro-batch
        init_var: P0 >= 0, prior variance of the state before the first token
        clip: clip the filtered ratio to [1 - clip_ratio_low, 1 + clip_ratio_high] as PPO does
        gain: `scheduled`: the exact gains K_1, K_2, ...; `steady`: their limit at every token
        innovation_clip: kappa > 0: saturate innovations at kappa predicted standard deviations; null: do not
        ratio_log_max: upper bound of the log-ratio before it is exponentiated, > 0
    """

    process_var: float = 1e-6
    measurement_var: NumberOrWord = 1.0
    init_var: float = 0.0
    clip: bool = True
    gain: Gain = Gain.scheduled
    innovation_clip: float | None = None
    ratio_log_max: float = 10.0

    def __post_init__(self) -> None:
        rules = {
            "process_var": NON_NEGATIVE,
            "measurement_var": POSITIVE_OR_BATCH,
            "init_var": NON_NEGATIVE,
            "innovation_clip": POSITIVE_OR_NULL,
            "ratio_log_max": POSITIVE,
        }
        _validate(self, KPO_AT, rules, {"gain": Gain})


# Our recommended estimator, the preset `krpo_adaptive`: unbiased, order-free, its noise and prior fitted to the batch.
ADAPTIVE = KrpoConfig(**SHRUNK, scale=Scale.innovation_std)
# The same with a state a prompt that lasts, the preset `krpo_memory`.
MEMORY = replace(ADAPTIVE, memory=Memory.prompt)
# By name: of algorithm.adv_estimator, and of the config group that opens algorithm.krpo.
PRESETS = {"krpo": KrpoConfig(), "krpo_adaptive": ADAPTIVE, "krpo_memory": MEMORY}

Config = TypeVar("Config", KrpoConfig, KpoConfig)


def read(cls: type[Config], node: Mapping | Config | None, at: str) -> Config:
    """The typed form of a config node, `None` giving the defaults.

    ValueError on an unknown key, a wrong type, an unknown word or a value out of range; it names the key below `at`.
    """
    if isinstance(node, cls):
        return node
    values = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else dict(node or {})
    return _read(cls, json.dumps(values, default=lambda value: getattr(value, "name", str(value))), at)


@functools.lru_cache(maxsize=64)  # a reading takes longer than the filter does
def _read(cls: type[Config], text: str, at: str) -> Config:
    node = cast(DictConfig, OmegaConf.create(json.loads(text)))
    node.pop("_target_", None)
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), node)))
    except OmegaConfBaseException as error:
        key = f"{at}.{error.full_key}" if error.full_key else at
        known = ", ".join(cls.__dataclass_fields__)
        raise ValueError(f"{key}: {str(error).splitlines()[0]} (keys of {at}: {known})") from error


def krpo_settings(algorithm: Any) -> KrpoConfig:
    """The settings of verl's `algorithm` node (DictConfig, AlgoConfig, dict or None): the preset that adv_estimator
    names, with the keys of its `krpo` over it; ValueError if wrong."""
    node, name = (algorithm.get("krpo"), algorithm.get("adv_estimator")) if algorithm is not None else (None, None)
    if isinstance(node, KrpoConfig):
        return node
    preset = PRESETS[name] if name in PRESETS else PRESETS["krpo"]
    return read(KrpoConfig, {**vars(preset), **(node or {})}, KRPO_AT)
