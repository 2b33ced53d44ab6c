"""What is refused before Ray starts: wrong settings, and jobs in which verl would silently leave one of them out."""

from typing import Any

from omegaconf import OmegaConf

from verl_krpo.config import KPO_AT, KRPO_AT, KpoConfig, KrpoConfig, read

GROUPS = {KRPO_AT: "+algorithm=krpo", KPO_AT: "+actor@actor_rollout_ref.actor.policy_loss=kpo"}
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
CORRECTION = "algorithm.rollout_correction"
DISTILLATION = "distillation.distillation_loss"


def check(config: Any) -> None:
    """ValueError for krpo and kpo settings of a whole verl config that are wrong or would have no effect."""
    _check_krpo(config.algorithm)
    _check_kpo(config.actor_rollout_ref.actor.policy_loss)
    _check_what_verl_drops(config)


def check_overrides(overrides: list, config: Any) -> None:
    """ConfigCompositionException for keys of krpo and kpo that no config group has opened: it names the group."""
    from hydra.errors import ConfigCompositionException

    for at, group in GROUPS.items():
        for override in overrides:
            sets = not (override.is_add() or override.is_force_add() or override.is_delete())
            named = override.key_or_group == at or override.key_or_group.startswith(at + ".")
            if sets and named and OmegaConf.select(config, at) is None:
                raise ConfigCompositionException(
                    f"{override.input_line}: there is no {at} before its config group is selected. Add {group}"
                )


def _check_krpo(algorithm: Any) -> None:
    if algorithm.get("krpo") is None:
        return
    read(KrpoConfig, algorithm.krpo, KRPO_AT)
    if algorithm.adv_estimator != "krpo":
        raise ValueError(
            f"{KRPO_AT} is set but algorithm.adv_estimator={algorithm.adv_estimator}: add "
            f"algorithm.adv_estimator=krpo, or remove {KRPO_AT}"
        )


def _check_kpo(loss: Any) -> None:
    if loss.get("kpo") is None:
        return
    read(KpoConfig, loss.kpo, KPO_AT)
    if loss.loss_mode != "kpo":
        raise ValueError(f"{KPO_AT} is set but loss_mode={loss.loss_mode}: set loss_mode=kpo, or remove {KPO_AT}")
    if not str(loss.get("_target_", "")).startswith("verl_krpo."):
        raise ValueError(f"{KPO_AT} needs its typed config: add +actor@actor_rollout_ref.actor.policy_loss=kpo")


def _check_what_verl_drops(config: Any) -> None:
    """ValueError if `config` asks for KPO where verl would not train with it.

    Distillation: its own policy gradient knows `vanilla` only, and without task rewards the policy loss is dropped.
    Bypass mode: with any registered loss but `bypass_mode` verl reads neither loss_type nor the corrections.
    """
    wanted = config.actor_rollout_ref.actor.policy_loss.loss_mode == "kpo"
    distillation = config.get("distillation") or {}
    distilled = distillation.get("distillation_loss") or {}
    if distillation.get("enabled"):
        if distilled.get("policy_loss_mode") == "kpo":
            raise ValueError(
                f"{DISTILLATION}.policy_loss_mode=kpo: verl's distillation loss knows vanilla only; leave it "
                f"there and set {LOSS_MODE}=kpo, which applies to the task rewards"
            )
        if wanted and not distilled.get("use_task_rewards", True):
            raise ValueError(
                f"{DISTILLATION}.use_task_rewards=false with {LOSS_MODE}=kpo: verl drops the policy loss there "
                f"and would train without kpo; set use_task_rewards=true, or {LOSS_MODE}=vanilla"
            )

    correction = config.algorithm.get("rollout_correction") or {}
    if wanted and correction.get("bypass_mode"):
        ignored = {key: correction.get(key) for key in ("rollout_is", "rollout_rs")}
        ignored = {key: value for key, value in ignored.items() if value is not None}
        if correction.get("loss_type", "ppo_clip") != "ppo_clip":
            ignored["loss_type"] = correction.get("loss_type")
        if ignored:
            key, value = next(iter(ignored.items()))
            raise ValueError(
                f"{CORRECTION}.{key}={value} with bypass_mode=true and {LOSS_MODE}=kpo: verl would ignore it; remove "
                f"it (kpo then filters the ratio to the rollout's log-probs), set bypass_mode=false, or {LOSS_MODE}="
                f"bypass_mode, which is not kpo"
            )
