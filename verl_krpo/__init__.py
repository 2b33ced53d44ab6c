"""KRPO and KPO: Kalman-filtered advantages and importance ratios, for verl by one config key, or as pure functions.

Importing this costs nothing: what is named here is loaded when it is first used.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.3.0"

if TYPE_CHECKING:
    from verl_krpo import config, kalman
    from verl_krpo.advantage.adaptive import krpo_adaptive
    from verl_krpo.advantage.jspo import jspo
    from verl_krpo.advantage.krpo import krpo
    from verl_krpo.advantage.memory import PromptMemory, krpo_memory
    from verl_krpo.advantage.weights import score_weights
    from verl_krpo.config import AdaptiveConfig, KpoConfig, KrpoConfig, MemoryConfig
    from verl_krpo.kalman import LocalLevel
    from verl_krpo.policy_loss.kpo import kpo

_HOME = {
    "krpo": "verl_krpo.advantage.krpo",
    "krpo_adaptive": "verl_krpo.advantage.adaptive",
    "krpo_memory": "verl_krpo.advantage.memory",
    "jspo": "verl_krpo.advantage.jspo",
    "score_weights": "verl_krpo.advantage.weights",
    "kpo": "verl_krpo.policy_loss.kpo",
    "KrpoConfig": "verl_krpo.config",
    "AdaptiveConfig": "verl_krpo.config",
    "MemoryConfig": "verl_krpo.config",
    "KpoConfig": "verl_krpo.config",
    "LocalLevel": "verl_krpo.kalman",
    "PromptMemory": "verl_krpo.advantage.memory",
}
__all__ = [
    "AdaptiveConfig",
    "KpoConfig",
    "KrpoConfig",
    "LocalLevel",
    "MemoryConfig",
    "PromptMemory",
    "config",
    "jspo",
    "kalman",
    "kpo",
    "krpo",
    "krpo_adaptive",
    "krpo_memory",
    "score_weights",
]


def __getattr__(name: str) -> Any:
    if name in ("config", "kalman"):
        return importlib.import_module(f"verl_krpo.{name}")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'verl_krpo' has no attribute {name!r}")
