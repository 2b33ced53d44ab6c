"""Shared by every room: composing verl's config as its driver does."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def compose():
    """compose(*overrides, name="ppo_trainer") -> the DictConfig that verl's driver would get."""
    import hydra
    import verl  # noqa: F401 (loads the plugin, as every verl job does)

    def composed(*overrides, name="ppo_trainer"):
        if name == "ppo_trainer":
            where = hydra.initialize_config_module("verl.trainer.config", version_base=None)
        else:
            where = hydra.initialize_config_dir(str(ROOT / "recipes" / "config"), version_base=None)
        with where:
            return hydra.compose(name, overrides=list(overrides))

    return composed
