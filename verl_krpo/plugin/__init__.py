"""What verl loads: the one place that touches verl's registries and Hydra's ConfigStore.

verl 0.9 imports this module through the entry point group `verl.plugins` in every process that imports verl; older
versions through `VERL_USE_EXTERNAL_MODULES=verl_krpo.plugin`. verl logs a failing plugin at DEBUG only, so a failure
is printed here before it is raised again.
"""

import functools
import os
import sys
import traceback


def register() -> None:
    """Put `krpo` and `kpo` into verl's registries and config groups. Calling it again changes nothing."""
    _register_backends()  # first: what is imported below asks for the platform
    from hydra.core.config_store import ConfigStore
    from verl.trainer.ppo.core_algos import register_adv_est, register_policy_loss

    from verl_krpo.advantage import krpo
    from verl_krpo.config import KpoConfig, KrpoConfig
    from verl_krpo.plugin import estimator, metrics, sessions
    from verl_krpo.policy_loss import kpo

    register_adv_est("krpo")(estimator.compute_advantage)
    register_policy_loss("kpo")(kpo.compute_policy_loss)
    metrics.attach()
    sessions.attach()

    # Existing groups of verl's: a new group would be taken for a plain value where the plugin is missing.
    store = ConfigStore.instance()
    for name, settings in {"krpo": KrpoConfig(), "krpo_adaptive": krpo.ADAPTIVE}.items():
        store.store(group="algorithm", name=name, package="algorithm", node={"adv_estimator": "krpo", "krpo": settings})
    store.store(
        group="actor",
        name="kpo",
        node={
            "_target_": "verl_krpo.plugin.actor_config.KpoPolicyLossConfig",
            "loss_mode": "kpo",
            "kpo": KpoConfig,
        },
    )
    _check_before_ray()


def _register_backends() -> None:
    """verl without a GPU: the platform of VERL_PLATFORM=cpu, and rollout.name=hf, loaded when a job asks for it."""
    if _on_cpu():
        from verl_krpo.backends import cpu_platform

        cpu_platform.install()

    from verl.workers.rollout.base import _ROLLOUT_REGISTRY
    from verl.workers.rollout.replica import RolloutReplicaRegistry

    RolloutReplicaRegistry.register("hf", _load_hf_replica)
    _ROLLOUT_REGISTRY["hf", "async"] = "verl_krpo.backends.hf_rollout.HfServerAdapter"


def _on_cpu() -> bool:
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def _load_hf_replica() -> type:
    from verl_krpo.backends.hf_rollout import HfReplica

    return HfReplica


def _check_before_ray() -> None:
    """Run `guards.check` where verl validates its config: on the driver, before Ray starts."""
    import verl.utils.config as verl_config
    from omegaconf import OmegaConf

    from verl_krpo import versions
    from verl_krpo.plugin import guards

    validate_config = verl_config.validate_config
    if hasattr(validate_config, "__wrapped__"):
        return

    @functools.wraps(validate_config)
    def checked(config, *args, **kwargs):
        if line := versions.untested():
            print(line, file=sys.stderr)
        if _on_cpu():
            from verl_krpo.backends import cpu_platform

            cpu_platform.prepare(config)
        rollout = config.actor_rollout_ref.rollout
        if not OmegaConf.is_missing(rollout, "name") and rollout.name == "hf":
            from verl_krpo.backends import hf_rollout

            hf_rollout.check(rollout)
        guards.check(config)
        return validate_config(config, *args, **kwargs)

    verl_config.validate_config = checked


try:
    register()
except Exception:
    print("verl-krpo could not be loaded: krpo and kpo are missing from verl in this process.", file=sys.stderr)
    traceback.print_exc()
    raise
