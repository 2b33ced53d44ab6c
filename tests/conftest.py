"""Shared by every room: verl's config as its driver composes it, and ports for clusters of Ray."""

import random
import socket
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # a busy machine fails no test
settings.load_profile("suite")

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


@pytest.fixture(scope="session")
def free_ports():
    """free_ports(count) -> ports that nobody listens at.

    None of those that the system (from 32768 on, say) or Ray's workers (10002 to 19999) give to whoever asks for any
    port: between the choice and its use one of them would be taken now and then.
    """

    def free(count):
        ports = []
        for port in random.Random().sample(range(20_000, 32_000), 500):
            with socket.socket() as one:
                if one.connect_ex(("127.0.0.1", port)):
                    ports.append(port)
            if len(ports) == count:
                return ports
        pytest.fail(f"no {count} free ports")

    return free
