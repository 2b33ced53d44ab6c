"""What verl would drop silently is refused on the driver, through the validate_config that verl's mains call."""

import pytest
from hydra import compose, initialize_config_module

AT = "actor_rollout_ref.actor"
KPO = f"{AT}.policy_loss.loss_mode=kpo"
BYPASS = "algorithm.rollout_correction.bypass_mode=true"
DISTILLED = ["distillation.enabled=true", "distillation.n_gpus_per_node=1", "distillation.nnodes=1"]


def validate(*overrides):
    import verl  # noqa: F401 - loads the plugin
    from verl.utils.config import validate_config

    batch = [f"{AT}.ppo_micro_batch_size_per_gpu=4", "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4"]
    with initialize_config_module("verl.trainer.config", version_base=None):
        config = compose("ppo_trainer", overrides=[*batch, *overrides])
    validate_config(config, use_reference_policy=False, use_critic=False)


@pytest.mark.parametrize(
    "overrides, named",
    [
        ([*DISTILLED, "distillation.distillation_loss.policy_loss_mode=kpo"], "policy_loss_mode=kpo.*vanilla"),
        ([KPO, *DISTILLED, "distillation.distillation_loss.use_task_rewards=false"], "use_task_rewards=false"),
        ([KPO, BYPASS, "algorithm.rollout_correction.loss_type=reinforce"], "loss_type=reinforce"),
        ([KPO, BYPASS, "algorithm.rollout_correction.rollout_is=token"], "rollout_is=token"),
        ([KPO, BYPASS, "algorithm.rollout_correction.rollout_rs=token_k1"], "rollout_rs=token_k1"),
    ],
)
def test_refused(overrides, named):
    with pytest.raises(ValueError, match=named):
        validate(*overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        [KPO],
        [KPO, BYPASS],
        [KPO, "algorithm.rollout_correction.rollout_is=sequence"],
        [KPO, "algorithm.rollout_correction.rollout_is=token", "algorithm.rollout_correction.rollout_rs=token_k1"],
        [KPO, *DISTILLED],
        [BYPASS, "algorithm.rollout_correction.loss_type=reinforce"],
        [*DISTILLED, "distillation.distillation_loss.use_task_rewards=false"],
    ],
)
def test_left_alone(overrides):
    validate(*overrides)
