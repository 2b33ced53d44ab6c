"""What a user can set: the defaults are the published ones, a wrong value names its key.

Both classes are plain dataclasses. OmegaConf checks keys, types and words, `__post_init__` the ranges.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

Number = int | float | str  # str only for the word "batch"
BATCH = "batch"
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


class Scale(str, Enum):
    filter_std = "filter_std"
    innovation_std = "innovation_std"
    group_std = "group_std"
    none = "none"


class Gain(str, Enum):
    scheduled = "scheduled"
    steady = "steady"


def _require(holds: bool, key: str, value: object, rule: str) -> None:
    if not holds:
        raise ValueError(f"{key}={value!r} is not valid: {rule}")


def _finite(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class KrpoConfig:
    """`algorithm.krpo.*`, the advantage estimator (arXiv 2505.07527).

    Attributes:
        process_var: Q >= 0, variance of the drift between two members of a group, in squared reward units
        measurement_var: R > 0, variance of a reward around the state, or `batch`: estimated from the batch
        init_mean: prior mean of the state in reward units, or `batch`
        init_var: prior variance of the state >= 0, or `batch`
        epsilon: >= 0, added to the standard deviation that divides
        order: in which order the members of a group are filtered
        baseline: which estimate of the state is subtracted from the reward
        scale: what the difference is divided by
    """

    process_var: float = 1e-5
    measurement_var: Number = 1e-2
    init_mean: Number = 0.0
    init_var: Number = 1.0
    epsilon: float = 1e-8
    order: Order = Order.shuffled
    baseline: Baseline = Baseline.causal
    scale: Scale = Scale.filter_std

    def __post_init__(self) -> None:
        at = KRPO_AT + "."
        non_negative = "a finite number >= 0"
        _require(
            _finite(self.process_var) and self.process_var >= 0, at + "process_var", self.process_var, non_negative
        )
        if self.measurement_var != BATCH:
            holds = _finite(self.measurement_var) and self.measurement_var > 0
            _require(holds, at + "measurement_var", self.measurement_var, "a finite number > 0 or the word batch")
        if self.init_mean != BATCH:
            _require(_finite(self.init_mean), at + "init_mean", self.init_mean, "a finite number or the word batch")
        if self.init_var != BATCH:
            holds = _finite(self.init_var) and self.init_var >= 0
            _require(holds, at + "init_var", self.init_var, f"{non_negative} or the word batch")
        _require(_finite(self.epsilon) and self.epsilon >= 0, at + "epsilon", self.epsilon, non_negative)


@dataclass
class KpoConfig:
    """`actor_rollout_ref.actor.policy_loss.kpo.*`, the policy loss (arXiv 2602.10609).

    Attributes:
        process_var: Q >= 0, variance of the log-ratio's drift from token to token; with measurement_var=batch the
            smallest Q/R
        measurement_var: R > 0, variance of a token's log-ratio around the state, or `batch`: estimated from the batch
        init_var: P0 >= 0, prior variance of the state before the first token
        clip: clip the filtered ratio to [1 - clip_ratio_low, 1 + clip_ratio_high] as PPO does
        gain: `scheduled`: the exact gains K_1, K_2, ...; `steady`: their limit at every token
        innovation_clip: kappa > 0: saturate innovations at kappa predicted standard deviations; null: do not
        ratio_log_max: > 0, upper bound of the log-ratio before it is exponentiated
    """

    process_var: float = 1e-6
    measurement_var: Number = 1.0
    init_var: float = 0.0
    clip: bool = True
    gain: Gain = Gain.scheduled
    innovation_clip: float | None = None
    ratio_log_max: float = 10.0

    def __post_init__(self) -> None:
        at = KPO_AT + "."
        non_negative, positive = "a finite number >= 0", "a finite number > 0"
        _require(
            _finite(self.process_var) and self.process_var >= 0, at + "process_var", self.process_var, non_negative
        )
        if self.measurement_var != BATCH:
            holds = _finite(self.measurement_var) and self.measurement_var > 0
            _require(holds, at + "measurement_var", self.measurement_var, f"{positive} or the word batch")
        _require(_finite(self.init_var) and self.init_var >= 0, at + "init_var", self.init_var, non_negative)
        if self.innovation_clip is not None:
            holds = _finite(self.innovation_clip) and self.innovation_clip > 0
            _require(holds, at + "innovation_clip", self.innovation_clip, f"{positive} or null")
        holds = _finite(self.ratio_log_max) and self.ratio_log_max > 0
        _require(holds, at + "ratio_log_max", self.ratio_log_max, positive)


Config = TypeVar("Config", KrpoConfig, KpoConfig)


def read(cls: type[Config], node: Mapping | None, at: str) -> Config:
    """The typed form of a config node, `None` giving the defaults.

    ValueError on an unknown key, a wrong type, an unknown word or a value out of range; it names the key below `at`.
    """
    try:
        return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), node or {}))
    except OmegaConfBaseException as error:
        key = f"{at}.{error.full_key}" if error.full_key else at
        known = ", ".join(cls.__dataclass_fields__)
        raise ValueError(f"{key}: {str(error).splitlines()[0]} (keys of {at}: {known})") from error
