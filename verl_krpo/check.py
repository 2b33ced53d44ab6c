"""Compose and validate a verl job, start nothing: `verl-krpo check` takes main_ppo's own arguments.

The settings of KRPO and KPO in force are printed; a wrong key or value fails here as it would on the driver.
"""

from omegaconf import DictConfig
from verl.trainer.ppo.utils import need_critic, need_reference_policy
from verl.utils.config import validate_config

from verl_krpo.config import KPO_AT, KRPO_AT, KpoConfig, KrpoConfig, read
from verl_krpo.doctor import compose


def settings(config: DictConfig) -> list[tuple[str, object]]:
    """The keys that decide the method, with their values in force: (key, value) rows."""
    actor = config.actor_rollout_ref.actor
    rows = [("algorithm.adv_estimator", config.algorithm.adv_estimator)]
    if config.algorithm.adv_estimator == "krpo":
        rows += _rows(KRPO_AT, read(KrpoConfig, config.algorithm.get("krpo"), KRPO_AT))
    rows.append(("actor_rollout_ref.actor.policy_loss.loss_mode", actor.policy_loss.loss_mode))
    if actor.policy_loss.loss_mode == "kpo":
        rows += _rows(KPO_AT, read(KpoConfig, actor.policy_loss.get("kpo"), KPO_AT))
    for key in ("loss_agg_mode", "clip_ratio", "clip_ratio_low", "clip_ratio_high", "ppo_mini_batch_size"):
        rows.append((f"actor_rollout_ref.actor.{key}", actor[key]))
    rows.append(("actor_rollout_ref.actor.optim.lr", actor.optim.lr))
    rows.append(("actor_rollout_ref.rollout.name", config.actor_rollout_ref.rollout.name))
    rows.append(("actor_rollout_ref.rollout.n", config.actor_rollout_ref.rollout.n))
    rows.append(("data.train_batch_size", config.data.train_batch_size))
    return rows


def _rows(at: str, values: KrpoConfig | KpoConfig) -> list[tuple[str, object]]:
    return [(f"{at}.{key}", getattr(value, "value", value)) for key, value in vars(values).items()]


def main(arguments: list[str]) -> None:
    config = compose(arguments)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
    for key, value in settings(config):
        print(f"{key} = {value}")
