"""Real verl jobs with KRPO and KPO: several updates a batch, so that the ratios leave 1."""

import math
from pathlib import Path

import pytest
from reference import metrics as names

pytestmark = pytest.mark.e2e

ACTOR = "actor_rollout_ref.actor"
KPO = f"+actor@{ACTOR}.policy_loss=kpo"
# Four updates a batch, each with a gradient: an entropy bonus gives one where every group is all right or all wrong.
# On sixteen tokens the published Q would do nothing that shows.
JOB = [
    "data.train_batch_size=8",
    "data.max_prompt_length=32",
    "data.max_response_length=16",
    f"{ACTOR}.ppo_mini_batch_size=2",
    f"{ACTOR}.entropy_coeff=1e-3",
    "actor_rollout_ref.rollout.n=4",
    "trainer.logger=[console,file]",
    "trainer.total_training_steps=3",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
]
FILTERED = [KPO, f"{ACTOR}.policy_loss.kpo.process_var=1e-3"]


def check(job, steps=(1, 2, 3)):
    assert sorted(job.metrics) == list(steps)
    for metrics in job.steps():
        assert set(metrics) >= names.KPO
        assert math.isfinite(metrics["actor/pg_loss"]) and 0 < metrics["actor/grad_norm"] < 1e4
        assert 0 < metrics["actor/kpo_ratio_std_filtered"] < metrics["actor/kpo_ratio_std_raw"]
        assert metrics["actor/kpo_ratio_max_raw"] > 1


@pytest.mark.quick
@pytest.mark.timeout(1800)  # two jobs, one after the other
def test_one_key_each_trains_with_krpo_and_kpo_and_goes_on(verl_job, tmp_path):
    """A plain verl command line and two keys, everything else published; their metrics beside verl's at every step."""
    keys = ["algorithm.adv_estimator=krpo", f"{ACTOR}.policy_loss.loss_mode=kpo"]
    keys += [f"trainer.default_local_dir={tmp_path}/checkpoints", "trainer.save_freq=2"]
    first = verl_job(*JOB, *keys, "trainer.total_training_steps=2")
    check(first, steps=(1, 2))
    second = verl_job(*JOB, *keys)
    check(second, steps=(3,))
    assert "setting global step to 2" in second.output
    for metrics in first.steps() + second.steps():
        assert set(metrics) >= names.KRPO - {"krpo/advantage_abs_first_over_last"}  # absent where no last member counts
        assert (metrics["krpo/groups"], metrics["krpo/group_size_min"], metrics["krpo/singletons"]) == (8, 4, 0)
        prior = metrics["krpo/measurement_var"], metrics["krpo/prior_mean"], metrics["krpo/prior_var"]
        assert prior == (1e-2, 0.0, 1.0)
        # K_1 of the published filter: (P0 + Q) / (P0 + Q + R).
        assert metrics["krpo/gain_first"] == pytest.approx(1.00001 / 1.01001)
        # verl's own view of the same advantages: a mean over tokens of what is constant along a response.
        assert abs(metrics["critic/advantages/max"]) < 100 and metrics["krpo/advantage_std"] > 0


def test_several_turns_with_a_tool(verl_job):
    """verl's own tool agent: what the tool answers is masked, a hole between the turns; every variant on at once."""
    job = verl_job(
        *JOB,
        *FILTERED,
        "algorithm.adv_estimator=grpo",
        f"{ACTOR}.policy_loss.kpo.gain=steady",
        f"{ACTOR}.policy_loss.kpo.measurement_var=batch",
        f"{ACTOR}.policy_loss.kpo.innovation_clip=3",
        "data.max_response_length=64",
        "actor_rollout_ref.rollout.agent.default_agent_loop=tool_agent",
        "actor_rollout_ref.rollout.multi_turn.enable=True",
        "actor_rollout_ref.rollout.multi_turn.format=everything",
        "actor_rollout_ref.rollout.multi_turn.max_assistant_turns=3",
        f"actor_rollout_ref.rollout.multi_turn.function_tool_path={Path(__file__).with_name('calculator.py')}",
    )
    check(job)
    for metrics in job.steps():
        assert metrics["num_turns/mean"] > 2
        assert metrics["actor/kpo_measurement_var"] < 1


CORRECTED = "actor_rollout_ref.rollout.calculate_log_probs=True"
BESIDE = {
    "bypass_mode": [CORRECTED, "algorithm.rollout_correction.bypass_mode=True"],
    "token weights": [CORRECTED, "algorithm.rollout_correction.rollout_is=token"],
    "sequence weights and rejection": [
        CORRECTED,
        "algorithm.rollout_correction.rollout_is=sequence",
        "algorithm.rollout_correction.rollout_rs=token_k1",
        "algorithm.rollout_correction.rollout_rs_threshold='0.5_2.0'",
    ],
    "dynamic batch sizes on two ranks": [
        "trainer.n_gpus_per_node=2",
        f"{ACTOR}.use_dynamic_bsz=True",
        f"{ACTOR}.ppo_max_token_len_per_gpu=64",
        "actor_rollout_ref.rollout.log_prob_use_dynamic_bsz=True",
        "actor_rollout_ref.rollout.log_prob_max_token_len_per_gpu=64",
    ],
    "LoRA": [
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora_alpha=16",
        "actor_rollout_ref.model.lora.merge=True",
    ],
}


@pytest.mark.nightly
@pytest.mark.parametrize("feature", BESIDE)
def test_beside_verls_features(verl_job, feature):
    weighed = ["+algorithm=krpo_adaptive", "algorithm.krpo_adaptive.weight=score"]
    job = verl_job(*JOB, *FILTERED, *weighed, *BESIDE[feature])
    check(job)
    assert all(metrics["krpo/score_weight_cv"] > 0 for metrics in job.steps())
