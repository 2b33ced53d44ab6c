"""verl's legacy trainer (`trainer.use_v1=False`) on CPUs: KRPO and KPO together, a checkpoint, a job that goes on."""

import math

import pytest

from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.plugin.prompt_memory import MEMORY_FILE

pytestmark = pytest.mark.e2e

ACTOR = "actor_rollout_ref.actor"
JOB = [
    "trainer.use_v1=False",
    f"{ACTOR}.policy_loss.loss_mode=kpo",
    "data.train_batch_size=8",
    "data.train_max_samples=16",  # two steps an epoch: the second save is at an epoch's end
    "data.seed=1",
    "data.max_prompt_length=32",
    "data.max_response_length=16",
    f"{ACTOR}.ppo_mini_batch_size=4",  # two updates a batch: the ratio moves
    "actor_rollout_ref.rollout.n=4",
    "trainer.logger=[console,file]",
    "trainer.total_epochs=100",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    "trainer.save_freq=2",
]


def check(job, steps):
    assert sorted(job.metrics) == steps
    for metrics in job.steps():
        assert (metrics["krpo/groups"], metrics["krpo/group_size_min"], metrics["krpo/singletons"]) == (8, 4, 0)
        assert math.isfinite(metrics["actor/pg_loss"]) and 0 < metrics["actor/grad_norm"] < 1e4
        assert metrics["krpo/advantage_std"] > 0 and metrics["krpo/nis"] > 0
        assert metrics["krpo/score_weight_cv"] > 0 and metrics["krpo/gradient_var_over_rloo"] > 0
        assert metrics["actor/kpo_ratio_std_raw"] > metrics["actor/kpo_ratio_std_filtered"]
        assert metrics["training/rollout_probs_diff_max"] < 1e-5  # the server has the trainer's weights


@pytest.mark.timeout(1500)
def test_krpo_and_kpo_train_and_go_on_in_the_legacy_trainer(verl_job, tmp_path):
    folder = tmp_path / "checkpoints"
    job = [*JOB, "+algorithm=krpo_memory", "algorithm.krpo_memory.weight=score", f"trainer.default_local_dir={folder}"]
    job.append("actor_rollout_ref.rollout.calculate_log_probs=True")
    first = verl_job(*job, "trainer.total_training_steps=2")
    check(first, [1, 2])
    assert first.metrics[2]["krpo/memory_prompts"] == 16

    second = verl_job(*job, "trainer.total_training_steps=4")
    check(second, [3, 4])
    assert f"krpo remembers 16 prompts from {folder}/global_step_2/{MEMORY_FILE}" in second.output
    assert [second.metrics[step]["krpo/memory_known"] for step in (3, 4)] == [1, 1]
    assert PromptMemory.load(folder / "global_step_4" / MEMORY_FILE).step == 4
