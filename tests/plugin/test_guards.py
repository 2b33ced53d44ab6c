"""What verl would drop silently is refused on the driver, through the validate_config that verl's mains call."""

import pytest
from hydra import compose, initialize_config_module

AT = "actor_rollout_ref.actor"
KPO = f"{AT}.policy_loss.loss_mode=kpo"
BYPASS = "algorithm.rollout_correction.bypass_mode=true"
SELECT = ["+algorithm=krpo_memory", "algorithm.krpo_memory.select=signal"]
ALLOCATE = ["+algorithm=krpo_memory", "algorithm.krpo_memory.allocate=signal"]
FILTER = "algorithm.filter_groups.enable=true"
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
        ([*SELECT, "trainer.use_v1=false"], "select=signal needs verl's V1 trainer.*use_v1=true"),
        ([*SELECT, FILTER, "algorithm.filter_groups.metric=reward"], "select=signal with .*filter_groups.enable=true"),
        ([*ALLOCATE, FILTER, "algorithm.filter_groups.metric=reward"], "allocate=signal with .*filter_groups.enable"),
        ([*ALLOCATE, "trainer.v1.trainer_mode=colocate_async"], "trainer_mode=colocate_async.*trainer_mode=sync"),
        ([*SELECT, *ALLOCATE[1:], "trainer.v1.trainer_mode=colocate_async"], "allocate=none"),
        ([*ALLOCATE, "trainer.v1.sampler.sync_refill_failed_groups=true"], "sync_refill_failed_groups=false"),
        ([*ALLOCATE, "actor_rollout_ref.rollout.n=1"], "rollout.n=1 has nothing to share out"),
        ([SELECT[0], "algorithm.krpo_memory.objective=same"], "objective=same .*select=none"),
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
        [*SELECT, *ALLOCATE[1:], "algorithm.krpo_memory.objective=same", "actor_rollout_ref.rollout.n=4"],
        [*SELECT, "trainer.v1.trainer_mode=colocate_async"],
        ["+algorithm=krpo_memory", FILTER, "algorithm.filter_groups.metric=reward"],
    ],
)
def test_left_alone(overrides):
    validate(*overrides)
