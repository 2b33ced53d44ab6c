"""What a user can set: the defaults are the published settings, members shuffled; a wrong value names its key.

All are plain dataclasses. OmegaConf checks keys, types and words, `__post_init__` the ranges. Which estimator has which
keys: advantage/__init__.py.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar, cast

NumberOrWord = int | float | str  # the words are "batch" and "auto"
BATCH = "batch"
AUTO = "auto"
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


class AdaptiveScale(str, Enum):
    model = "model"
    none = "none"


class Weight(str, Enum):
    none = "none"
    length = "length"
    score = "score"


class Choice(str, Enum):
    none = "none"
    signal = "signal"


class Objective(str, Enum):
    signal = "signal"
    same = "same"


class Gain(str, Enum):
    scheduled = "scheduled"
    steady = "steady"


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


Rule = tuple[Callable[[Any], bool], str]  # what holds for a valid value, and in words
FINITE: Rule = (_finite, "a finite number")
NON_NEGATIVE: Rule = (lambda v: _finite(v) and v >= 0, "a finite number >= 0")
NON_NEGATIVE_OR_AUTO: Rule = (lambda v: v == AUTO or (_finite(v) and v >= 0), f"{NON_NEGATIVE[1]} or the word auto")
POSITIVE: Rule = (lambda v: _finite(v) and v > 0, "a finite number > 0")
POSITIVE_OR_BATCH: Rule = (lambda v: v == BATCH or (_finite(v) and v > 0), f"{POSITIVE[1]} or the word batch")
AT_LEAST_TWO: Rule = (lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= 2, "an integer >= 2")
POSITIVE_OR_NULL: Rule = (lambda v: v is None or (_finite(v) and v > 0), f"{POSITIVE[1]} or null")


def _validate(config: Any, at: str, rules: dict[str, Rule], words: dict[str, type[Enum]]) -> None:
    """ValueError names a value that breaks its rule; a plain word becomes its enum."""
    for key, (holds, rule) in rules.items():
        value = getattr(config, key)
        if not holds(value):
            raise ValueError(f"{at}.{key}={value!r} is not valid: {rule}{moved(f'{at}.{key}', value)}")
    for key, enum in words.items():
        value = getattr(config, key)
        if value not in list(enum):
            words_of = ", ".join(enum.__members__)
            raise ValueError(f"{at}.{key}={value!r} is not valid: one of {words_of}{moved(f'{at}.{key}', value)}")
        setattr(config, key, enum(value))


@dataclass
class KrpoConfig:
    """`algorithm.krpo.*`, the advantage estimator (arXiv 2505.07527).

    Attributes:
        process_var: Q >= 0, variance of the drift between two members of a group, in squared reward units
        measurement_var: R > 0, variance of a reward around the state
        init_mean: m0, prior mean of the state in reward units
        init_var: P0 >= 0, prior variance of the state
        epsilon: added to the standard deviation that divides, >= 0
        order: in which order the members of a group are filtered; `arrival` is in verl shortest first, `shuffled` a
            permutation by the prompt's id
        baseline: which estimate of the state is subtracted from the reward
        scale: what the difference is divided by
        weight: w of the noise R / w that a reward has of its own: `score`, the square of its response's score,
            `length`, its length, or `none`, 1
    """

    process_var: float = 1e-5
    measurement_var: float = 1e-2
    init_mean: float = 0.0
    init_var: float = 1.0
    epsilon: float = 1e-8
    order: Order = Order.shuffled
    baseline: Baseline = Baseline.causal
    scale: Scale = Scale.filter_std
    weight: Weight = Weight.none

    def __post_init__(self) -> None:
        rules = {
            "process_var": NON_NEGATIVE,
            "measurement_var": POSITIVE,
            "init_mean": FINITE,
            "init_var": NON_NEGATIVE,
            "epsilon": NON_NEGATIVE,
        }
        at = "algorithm.krpo"
        _validate(self, at, rules, {"order": Order, "baseline": Baseline, "scale": Scale, "weight": Weight})
        if self.scale == Scale.filter_std and self.process_var == 0 and self.init_var == 0:
            raise ValueError(
                f"{at}.scale=filter_std divides by the state's standard deviation, which is zero with process_var=0 "
                "and init_var=0: use scale=innovation_std, or a process_var > 0"
            )


@dataclass
class AdaptiveConfig:
    """`algorithm.krpo_adaptive.*`: noise and prior learned from the other prompts of the batch.

    Attributes:
        weight: by what a reward counts in the baseline: `score`, the square of its response's score (which makes the
            variance of the gradient small), `length`, or `none`, all alike (which makes that of r - b small)
        scale: what r - b is divided by: `model`, its standard deviation under the model, or `none`, 1
    """

    weight: Weight = Weight.none
    scale: AdaptiveScale = AdaptiveScale.model

    at = "algorithm.krpo_adaptive"  # no field: it has no type

    def __post_init__(self) -> None:
        _validate(self, self.at, {}, {"weight": Weight, "scale": AdaptiveScale})


@dataclass
class MemoryConfig(AdaptiveConfig):
    """`algorithm.krpo_memory.*`: krpo_adaptive with a state a prompt that lasts over training time.

    Attributes:
        weight: as in krpo_adaptive
        scale: as in krpo_adaptive
        memory_var: Q >= 0, variance of a state's drift in a step, or `auto`: learned
        select: which prompts verl rolls out: `none`, those that come next, or `signal`, of select_from times as many
            those that the memory expects to teach most
        select_from: candidates for every prompt that is taken, >= 2
        objective: with select=signal: `signal`, training is on the prompts taken, or `same`, they are weighed so that
            it is on all candidates alike
        allocate: how many responses a prompt gets: `none`, rollout.n each, or `signal`, more the more it is expected
            to teach, rollout.n on average; weighed so that prompts count alike
    """

    memory_var: NumberOrWord = AUTO
    select: Choice = Choice.none
    select_from: int = 4
    objective: Objective = Objective.signal
    allocate: Choice = Choice.none

    at = "algorithm.krpo_memory"

    def __post_init__(self) -> None:
        super().__post_init__()
        rules = {"memory_var": NON_NEGATIVE_OR_AUTO, "select_from": AT_LEAST_TWO}
        _validate(self, self.at, rules, {"select": Choice, "objective": Objective, "allocate": Choice})
        if self.objective == Objective.same and self.select == Choice.none:
            raise ValueError(
                f"{self.at}.objective=same says how selected prompts count, but select=none: set select=signal, or "
                "remove objective"
            )

    @property
    def chooses(self) -> str | None:
        """The key by which this job chooses prompts or numbers of responses, None where it does neither."""
        return next((key for key in ("select", "allocate") if getattr(self, key) != Choice.none), None)


@dataclass
class JspoConfig:
    """`algorithm.jspo` has no keys (arXiv 2511.03710)."""


@dataclass
class KpoConfig:
    """`actor_rollout_ref.actor.policy_loss.kpo.*`, the policy loss (arXiv 2602.10609).

    The defaults are published. gain=steady, innovation_clip and measurement_var=batch are rivals to compare with, no
    recommendation: docs/kpo.md has their figures.

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


Config = TypeVar("Config", bound=Any)


def read(cls: type[Config], node: Mapping | Config | None, at: str) -> Config:
    """The typed form of a config node, `None` giving the defaults.

    ValueError on an unknown key, a wrong type, an unknown word or a value out of range; it names the key below `at`.
    """
    if isinstance(node, cls):
        return node
    from omegaconf import OmegaConf  # here: the estimators themselves run without it
    from omegaconf.errors import OmegaConfBaseException

    plain = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    values = dict(cast(Mapping, plain or {}))
    values.pop("_target_", None)
    try:
        return cast(Config, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(cls), values)))
    except OmegaConfBaseException as error:
        key = f"{at}.{error.full_key}" if error.full_key else at
        known = ", ".join(cls.__dataclass_fields__) or "none"
        raise ValueError(
            f"{key}: {str(error).splitlines()[0]}{moved(key, values.get(error.full_key))} (keys of {at}: {known})"
        ) from error


def moved(key: str, value: Any) -> str:
    """Of a key or value of version 0.2: what says the same now, else nothing."""
    if key in ("algorithm.krpo.memory", "algorithm.krpo.memory_var"):
        return "; since 0.3 the memory is an estimator of its own: +algorithm=krpo_memory, with its key memory_var"
    if key == "algorithm.krpo.baseline" and value == "jspo":
        return "; since 0.3 jspo is an estimator of its own: algorithm.adv_estimator=jspo"
    if key.startswith("algorithm.krpo.") and value == BATCH:
        return "; since 0.3 what a batch estimates is an estimator of its own: algorithm.adv_estimator=krpo_adaptive"
    return ""
