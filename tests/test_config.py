"""The public keys: defaults, ranges, words, and the errors a user meets."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from verl_krpo.config import KPO_AT, AdaptiveConfig, JspoConfig, KpoConfig, KrpoConfig, MemoryConfig, read

KRPO_AT = "algorithm.krpo"


def test_defaults_are_the_published_settings_members_shuffled():
    assert dataclasses.asdict(KrpoConfig()) == {
        "process_var": 1e-5,
        "measurement_var": 1e-2,
        "init_mean": 0.0,
        "init_var": 1.0,
        "epsilon": 1e-8,
        "order": "shuffled",
        "baseline": "causal",
        "scale": "filter_std",
        "weight": "none",
    }
    assert dataclasses.asdict(AdaptiveConfig()) == {"weight": "none", "scale": "model"}
    assert dataclasses.asdict(MemoryConfig()) == {
        "weight": "none",
        "scale": "model",
        "memory_var": "auto",
        "select": "none",
        "select_from": 4,
        "objective": "signal",
        "allocate": "none",
    }
    assert dataclasses.asdict(JspoConfig()) == {}
    assert dataclasses.asdict(KpoConfig()) == {
        "process_var": 1e-6,
        "measurement_var": 1.0,
        "init_var": 0.0,
        "clip": True,
        "gain": "scheduled",
        "innovation_clip": None,
        "ratio_log_max": 10.0,
    }


def test_no_node_gives_the_defaults():
    assert read(KrpoConfig, None, KRPO_AT) == KrpoConfig()
    assert read(KpoConfig, OmegaConf.create({}), KPO_AT) == KpoConfig()


def test_yaml_numbers_and_words_are_typed():
    config = read(KrpoConfig, OmegaConf.create("{process_var: 0, init_mean: 1, order: arrival}"), KRPO_AT)
    assert (config.process_var, config.init_mean, config.order) == (0.0, 1.0, "arrival")
    config = read(KpoConfig, OmegaConf.create("{measurement_var: batch, clip: false}"), KPO_AT)
    assert (config.measurement_var, config.clip) == ("batch", False)
    assert read(MemoryConfig, {"memory_var": 0.1}, "at").memory_var == 0.1


@pytest.mark.parametrize(
    ("cls", "at", "key", "value"),
    [
        (KrpoConfig, KRPO_AT, "process_var", -1.0),
        (KrpoConfig, KRPO_AT, "process_var", float("nan")),
        (KrpoConfig, KRPO_AT, "process_var", "batch"),
        (KrpoConfig, KRPO_AT, "measurement_var", 0.0),
        (KrpoConfig, KRPO_AT, "measurement_var", "batch"),
        (KrpoConfig, KRPO_AT, "weight", "scores"),
        (AdaptiveConfig, "algorithm.krpo_adaptive", "weight", "energy"),
        (AdaptiveConfig, "algorithm.krpo_adaptive", "scale", "filter_std"),
        (AdaptiveConfig, "algorithm.krpo_adaptive", "memory_var", 1.0),
        (MemoryConfig, "algorithm.krpo_memory", "memory_var", -1.0),
        (MemoryConfig, "algorithm.krpo_memory", "select", "uniform"),
        (MemoryConfig, "algorithm.krpo_memory", "select_from", 1),
        (MemoryConfig, "algorithm.krpo_memory", "select_from", 2.5),
        (MemoryConfig, "algorithm.krpo_memory", "allocate", 2),
        (MemoryConfig, "algorithm.krpo_memory", "objective", "same"),  # of select=signal alone
        (MemoryConfig, "algorithm.krpo_memory", "weight", 2),
        (JspoConfig, "algorithm.jspo", "scale", "none"),
        (KrpoConfig, KRPO_AT, "init_mean", float("inf")),
        (KrpoConfig, KRPO_AT, "init_var", -1e-9),
        (KrpoConfig, KRPO_AT, "epsilon", -1.0),
        (KrpoConfig, KRPO_AT, "order", "sorted"),
        (KrpoConfig, KRPO_AT, "baseline", "median"),
        (KrpoConfig, KRPO_AT, "scale", "std"),
        (KrpoConfig, KRPO_AT, "proces_var", 1.0),
        (KpoConfig, KPO_AT, "process_var", -1.0),
        (KpoConfig, KPO_AT, "measurement_var", 0),
        (KpoConfig, KPO_AT, "measurement_var", "rows"),
        (KpoConfig, KPO_AT, "init_var", float("nan")),
        (KpoConfig, KPO_AT, "clip", "maybe"),
        (KpoConfig, KPO_AT, "gain", "constant"),
        (KpoConfig, KPO_AT, "innovation_clip", 0.0),
        (KpoConfig, KPO_AT, "ratio_log_max", -1.0),
        (KpoConfig, KPO_AT, "clip_low", 0.1),
    ],
)
def test_a_wrong_key_or_value_is_named(cls, at, key, value):
    with pytest.raises(ValueError, match=rf"{at}\.{key}") as error:
        read(cls, {key: value}, at)
    assert key in str(error.value) and ("Key" in str(error.value) or str(value) in str(error.value))


def test_an_unknown_word_lists_the_words():
    with pytest.raises(ValueError, match="shuffled, arrival"):
        read(KrpoConfig, {"order": "sorted"}, KRPO_AT)
