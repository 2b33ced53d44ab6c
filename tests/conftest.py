"""Shared by every room: verl's config as its driver composes it, and ports for clusters of Ray."""

import random
import socket
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("suite", deadline=None)  # a busy machine fails no test
settings.load_profile("suite")

ROOT = Path(__file__).parents[1]
LEFT_OUT = pytest.StashKey[list[str]]()


def pytest_deselected(items):
    config = items[0].config
    left_out = [item.nodeid for item in items if item.get_closest_marker("e2e")]
    config.stash[LEFT_OUT] = config.stash.get(LEFT_OUT, []) + left_out
    if hasattr(config, "workeroutput"):  # in a process of xdist: its parent prints the summary
        config.workeroutput["left_out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", [])


def pytest_terminal_summary(terminalreporter, config):
    left_out = Counter(name.split("::")[0] for name in config.stash.get(LEFT_OUT, []))
    if left_out:
        files = ", ".join(f"{file} {count}" for file, count in sorted(left_out.items()))
        terminalreporter.write_sep("=", f'{left_out.total()} real verl runs left out by -m "{config.option.markexpr}"')
        terminalreporter.write_line(f"{files}. They run by `bash scripts/test.sh all`.")


@pytest.fixture
def compose():
    """compose(*overrides, name="ppo_trainer") -> the DictConfig that verl's driver would get."""
    pytest.importorskip("verl")  # loads the plugin, as every verl job does
    import hydra

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
