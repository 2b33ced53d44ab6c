"""Every function that is replaced in verl: once, whatever decorators of others are around it, and with its effect."""

import functools
import importlib
import subprocess
import sys
from dataclasses import replace
from operator import attrgetter

import pytest
import torch

from verl_krpo import versions
from verl_krpo.backends import hooks as backend_hooks
from verl_krpo.plugin import hooks as plugin_hooks

HOOKS = (*plugin_hooks.HOOKS, *backend_hooks.HOOKS)
FREE = [hook for hook in HOOKS if not hook.cpu and "vllm" not in hook.module]
no_vllm = pytest.mark.skipif(versions.installed("vllm") is None, reason="vLLM is not installed")


class Foreign:
    """Somebody else's decorator, made with functools.wraps; it counts its calls."""

    def __init__(self):
        self.calls = 0

    def __call__(self, function):
        @functools.wraps(function)
        def wrapper(*args, **kwargs):
            self.calls += 1
            return function(*args, **kwargs)

        return wrapper


def place(hook):
    """The owner of the hook's function, and its name there."""
    import verl  # noqa: F401 (loads the plugin)

    *path, name = hook.name.split(".")
    module = importlib.import_module(hook.module)
    return module, attrgetter(".".join(path))(module) if path else module, name


@pytest.mark.parametrize(
    "hook",
    [pytest.param(hook, marks=no_vllm if "vllm_rollout" in hook.module else (), id=hook.name) for hook in HOOKS],
)
def test_once_and_beside_a_foreign_decorator(hook, monkeypatch):
    module, owner, name = place(hook)
    static = hook.module.startswith("hydra")
    ours = []

    def around(original, *args):
        ours.append(args)
        return original(*args)

    def set_function(function):
        monkeypatch.setattr(owner, name, staticmethod(function) if static else function)

    hook = replace(hook, around=around)
    for order in ("alone", "under", "over", "both"):
        below, above = Foreign(), Foreign()
        set_function(below(lambda *args: args) if order in ("under", "both") else lambda *args: args)
        hook.attach(module)
        if order in ("over", "both"):
            set_function(above(getattr(owner, name)))
        hook.attach(module)
        ours.clear()
        assert getattr(owner, name)(1, 2) == (1, 2)
        assert ours == [(1, 2)], order
        assert (below.calls, above.calls) == (order in ("under", "both"), order in ("over", "both"))
        assert hook.state() == "in force"


@pytest.fixture(params=["under", "over"])
def decorated(request, monkeypatch):
    """decorated(name) -> a foreign decorator put under or over the hook that this process has in force."""

    def decorate(name):
        (hook,) = [hook for hook in HOOKS if hook.name == name]
        module, owner, attribute = place(hook)
        ours, foreign = getattr(owner, attribute), Foreign()
        monkeypatch.setattr(owner, attribute, foreign(ours.__wrapped__ if request.param == "under" else ours))
        hook.attach(module)
        return foreign

    return decorate


def test_a_wrong_setting_is_still_refused(decorated, compose):
    foreign = decorated("validate_config")
    from verl.utils.config import validate_config

    with pytest.raises(ValueError, match="algorithm.krpo.typo"):
        validate_config(compose("algorithm.adv_estimator=krpo", "+algorithm.krpo.typo=1"), False, False)
    assert foreign.calls <= 1  # under ours it is not reached


def test_the_log_still_carries_the_metrics_once(decorated, tmp_path, monkeypatch):
    foreign = decorated("Tracking.log")
    from verl.utils.tracking import Tracking

    from verl_krpo.plugin.estimator import compute_advantage

    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(tmp_path))
    compute_advantage("krpo", torch.tensor([[1.0], [0.0]]), torch.ones(2, 1), None, ["a", "a"])
    log = Tracking("project", "run", ["file"])
    log.log(data={"actor/loss": 1.0}, step=1)
    log.finish()
    (path,) = tmp_path.rglob("*.jsonl")
    assert path.read_text().count("krpo/baseline_mean") == 1 and foreign.calls == 1


def test_hydra_still_names_the_group(decorated, compose):
    foreign = decorated("ConfigLoaderImpl._apply_overrides_to_config")
    with pytest.raises(Exception, match=r"\+algorithm=krpo"):
        compose("algorithm.krpo.process_var=0")
    assert foreign.calls <= 1


def test_a_needed_function_that_is_gone_is_an_error(monkeypatch):
    needed, other = (next(hook for hook in FREE if hook.needed is needed) for needed in (True, False))
    for hook in (needed, other):
        module, owner, name = place(hook)
        monkeypatch.delattr(owner, name)
    with pytest.raises(RuntimeError, match="no verl.utils.config.validate_config, which verl-krpo needs"):
        needed.attach(place(needed)[0])
    other.attach(place(other)[0])
    assert needed.state() == other.state() == "missing"


def test_they_wait_for_their_modules():
    code = """
import importlib
import verl
from verl_krpo.backends import hooks as backend_hooks
from verl_krpo.plugin import hooks as plugin_hooks
free = [hook for hook in (*plugin_hooks.HOOKS, *backend_hooks.HOOKS) if not hook.cpu and "vllm" not in hook.module]
print({hook.state() for hook in free if hook.module == "verl.utils.config"}, {hook.state() for hook in free[1:]})
for hook in free:
    importlib.import_module(hook.module)
print({hook.state() for hook in free})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.stdout.split("\n")[:2] == ["{'in force'} {'waiting'}", "{'in force'}"], done.stderr
