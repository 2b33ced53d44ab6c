"""What is refused before Ray starts: wrong settings, and jobs in which verl would silently leave one of them out."""

from typing import Any

from omegaconf import OmegaConf

from verl_krpo.advantage import ESTIMATORS, settings_of
from verl_krpo.config import KPO_AT, Choice, KpoConfig, moved, read
from verl_krpo.plugin import prompt_memory

ESTIMATOR = "algorithm.adv_estimator"
KPO_GROUP = "+actor@actor_rollout_ref.actor.policy_loss=kpo"
LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"
ROLLOUT_N = "actor_rollout_ref.rollout.n"
CORRECTION = "algorithm.rollout_correction"
DISTILLATION = "distillation.distillation_loss"


def check(config: Any) -> None:
    """ValueError for krpo and kpo settings of a whole verl config that are wrong or would have no effect."""
    _check_estimator(config.algorithm)
    _check_choice(config)
    _check_kpo(config.actor_rollout_ref.actor.policy_loss)
    _check_what_verl_drops(config)


def check_overrides(overrides: list, config: Any) -> None:
    """ConfigCompositionException for overrides that need another config group than `config` has: it names the group."""
    from hydra.errors import ConfigCompositionException

    algorithm = config.get("algorithm") or {}
    chosen = [override.value() for override in overrides if override.key_or_group == ESTIMATOR]
    estimator = chosen[-1] if chosen else algorithm.get("adv_estimator")
    if estimator in ESTIMATORS and (wrong := _keys_of_another(estimator, algorithm)):
        raise ConfigCompositionException(wrong)
    groups = {f"algorithm.{name}": f"+algorithm={name}" for name in ESTIMATORS} | {KPO_AT: KPO_GROUP}
    for override in overrides:
        key = override.key_or_group
        if override.is_add() or override.is_force_add() or override.is_delete():
            continue
        if hint := moved(key, override.value()):
            raise ConfigCompositionException(f"{override.input_line}{hint}")
        for at, group in groups.items():
            if (key == at or key.startswith(at + ".")) and OmegaConf.select(config, at) is None:
                if at != KPO_AT and estimator in ESTIMATORS and at != f"algorithm.{estimator}":
                    raise ConfigCompositionException(
                        f"{override.input_line} is no key of {ESTIMATOR}={estimator}: its own are "
                        f"algorithm.{estimator}.*, which +algorithm={estimator} opens"
                    )
                raise ConfigCompositionException(
                    f"{override.input_line} needs {group} beside it, which selects the method and opens {at}.*"
                )


def _check_estimator(algorithm: Any) -> None:
    estimator = str(algorithm.adv_estimator)
    if estimator == "kpo":
        raise ValueError(f"{ESTIMATOR}=kpo: kpo is a policy loss; write {LOSS_MODE}=kpo")
    if estimator.startswith("krpo") and estimator not in ESTIMATORS:
        raise ValueError(f"{ESTIMATOR}={estimator} is not one of {', '.join(ESTIMATORS)}")
    if wrong := _keys_of_another(estimator, algorithm):
        raise ValueError(wrong)
    if estimator in ESTIMATORS:
        settings_of(estimator, algorithm)


def _check_choice(config: Any) -> None:
    """ValueError for a job that chooses prompts or numbers of responses where verl would not let it."""
    keys = prompt_memory.settings(config)
    if keys is None or not keys.chooses:
        return
    asked, back = f"algorithm.krpo_memory.{keys.chooses}=signal", f"{keys.chooses}=none"
    if not OmegaConf.select(config, "trainer.use_v1"):
        raise ValueError(
            f"{asked} needs verl's V1 trainer, as the legacy one fetches its prompts in the midst of its loop: set "
            f"trainer.use_v1=true, or {back}"
        )
    if OmegaConf.select(config, "algorithm.filter_groups.enable"):
        raise ValueError(
            f"{asked} with algorithm.filter_groups.enable=true: verl drops groups for the rewards it has just seen, "
            f"and what is left no longer is what was foretold; set enable=false, or {back}"
        )
    if keys.allocate == Choice.none:
        return
    asked, back = "algorithm.krpo_memory.allocate=signal", "allocate=none"
    for key, wrong, instead in (
        ("trainer.v1.trainer_mode", lambda mode: mode != "sync", "sync"),
        ("trainer.v1.sampler.sync_refill_failed_groups", bool, "false"),
    ):
        if wrong(value := OmegaConf.select(config, key)):
            raise ValueError(
                f"{asked} with {key}={value}: verl mixes prompts of several fetches into a batch, which then has no "
                f"whole number of mini-batches; set {key.rpartition('.')[2]}={instead}, or {back}"
            )
    if config.actor_rollout_ref.rollout.n == 1:
        raise ValueError(f"{asked} with {ROLLOUT_N}=1 has nothing to share out: raise {ROLLOUT_N}, or {back}")


def _keys_of_another(estimator: Any, algorithm: Any) -> str | None:
    """What to write where `algorithm` holds the keys of an estimator of ours that is not the job's."""
    others = [name for name in ESTIMATORS if name != estimator and algorithm.get(name) is not None]
    if not others:
        return None
    instead = f", or write +algorithm={estimator} in place of both" if estimator in ESTIMATORS else ""
    return (
        f"algorithm.{others[0]} is set but {ESTIMATOR}={estimator}: add {ESTIMATOR}={others[0]} after it{instead}, or "
        f"remove algorithm.{others[0]}"
    )


def _check_kpo(loss: Any) -> None:
    if loss.loss_mode in ESTIMATORS:
        name = loss.loss_mode
        raise ValueError(f"{LOSS_MODE}={name}: {name} is an advantage estimator; write {ESTIMATOR}={name}")
    if loss.get("kpo") is None:
        return
    read(KpoConfig, loss.kpo, KPO_AT)
    if loss.loss_mode != "kpo":
        raise ValueError(f"{KPO_AT} is set but loss_mode={loss.loss_mode}: set loss_mode=kpo, or remove {KPO_AT}")
    if not str(loss.get("_target_", "")).startswith("verl_krpo."):
        raise ValueError(f"{KPO_AT} needs its typed config: add {KPO_GROUP}")


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
