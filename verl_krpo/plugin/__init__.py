"""What verl loads: our estimators and kpo in its registries and config groups. What it has no door for is in hooks.py.

verl 0.9 imports this package through the entry point group `verl.plugins` in every process that imports verl; older
versions through `VERL_USE_EXTERNAL_MODULES=verl_krpo.plugin`. verl logs a failing plugin at DEBUG only, so a failure
is printed here before it is raised again. Everything else happens when the module it concerns is imported, by verl and
not by us: what verl may never need (its registries cost a second) is not loaded for our sake.
"""

import sys
import traceback
from types import ModuleType


def register() -> None:
    """Put our estimators and `kpo` into verl's registries and config groups. Calling it again changes nothing."""
    import wrapt

    from verl_krpo.backends import on_cpu
    from verl_krpo.plugin import hooks

    if on_cpu():  # first: what is imported later asks for the platform
        from verl_krpo.backends import cpu_platform

        cpu_platform.install()
    hooks.install()
    wrapt.register_post_import_hook(_register_methods, "verl.trainer.ppo.core_algos")
    wrapt.register_post_import_hook(_register_groups, "hydra.core.config_store")
    wrapt.register_post_import_hook(_register_hf, "verl.workers.rollout.replica")


def _register_methods(core_algos: ModuleType) -> None:
    from verl_krpo.plugin import estimator, loss

    for name, function in estimator.BY_NAME.items():
        core_algos.register_adv_est(name)(function)
    core_algos.register_policy_loss("kpo")(loss.compute_policy_loss)


def _register_groups(config_store: ModuleType) -> None:
    """Existing groups of verl's: a new group would be taken for a plain value where the plugin is missing."""
    from verl_krpo.advantage import ESTIMATORS
    from verl_krpo.config import KpoConfig

    store = config_store.ConfigStore.instance()
    for name, estimator in ESTIMATORS.items():
        store.store(
            group="algorithm", name=name, package="algorithm", node={"adv_estimator": name, name: estimator.keys}
        )
    store.store(
        group="actor",
        name="kpo",
        node={
            "_target_": "verl_krpo.plugin.actor_config.KpoPolicyLossConfig",
            "loss_mode": "kpo",
            "kpo": KpoConfig,
        },
    )


def _register_hf(replica: ModuleType) -> None:
    def load() -> type:
        from verl_krpo.backends.hf_rollout import HfReplica

        return HfReplica

    replica.RolloutReplicaRegistry.register("hf", load)


try:
    register()
except Exception:
    print("verl-krpo could not be loaded: krpo and kpo are missing from verl in this process.", file=sys.stderr)
    traceback.print_exc()
    raise
