import math

import processes
import pytest

pytestmark = pytest.mark.e2e

# A plain verl command line: no config of ours, the sizes a user chooses, and VERL_PLATFORM=cpu.
PLAIN = [
    "algorithm.adv_estimator=grpo",
    "data.train_batch_size=8",
    "data.max_prompt_length=32",
    "data.max_response_length=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    "trainer.logger=[console,file]",
    "trainer.total_training_steps=3",
    "trainer.test_freq=3",
]


def assert_trained(job, steps):
    assert sorted(job.metrics) == list(range(steps + 1))
    for metrics in job.steps():
        assert math.isfinite(metrics["actor/pg_loss"]) and 0 < metrics["actor/grad_norm"] < 1e3
        assert metrics["response_length/max"] <= 16


def test_a_plain_command_line_trains_and_validates(verl_job):
    job = verl_job(*PLAIN)
    assert_trained(job, 3)
    for metrics in job.steps():  # the server's log-probs are the trainer's, after every weight update
        assert metrics["training/rollout_probs_diff_max"] < 1e-5
        assert metrics["training/off_policy/trajectory_staleness/max"] == 0
    for step in (0, 3):
        assert any(key.startswith("val-core/") for key in job.metrics[step])


def test_asynchronous_training_on_two_ranks_with_a_reference_model(verl_job):
    job = verl_job(
        *PLAIN,
        "trainer.v1.trainer_mode=colocate_async",
        "trainer.n_gpus_per_node=2",
        "actor_rollout_ref.actor.use_kl_loss=True",
    )
    assert_trained(job, 3)
    first, *later = job.steps()
    assert first["actor/kl_loss"] == pytest.approx(0, abs=1e-6)
    assert all(metrics["actor/kl_loss"] > 0 for metrics in later)
    assert max(metrics["training/off_policy/trajectory_staleness/max"] for metrics in later) > 0


def test_servers_of_their_own_get_the_weights(verl_job):
    job = verl_job(
        *PLAIN,
        "trainer.v1.trainer_mode=separate_async",
        "trainer.v1.separate_async.parameter_sync_step=2",
        "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    )
    assert_trained(job, 3)
    first, *later = job.steps()
    # Both updates of the first step are scored by the weights that sampled it, though the model has moved on by then.
    assert first["training/rollout_probs_diff_max"] < 1e-5
    assert all(metrics["training/off_policy/trajectory_staleness/max"] > 0 for metrics in later)


@pytest.mark.parametrize("lost", ["HfServer", pytest.param("AgentLoopWorker", marks=pytest.mark.nightly)])
def test_a_lost_process_ends_the_job(start_job, lost):
    job = start_job(*PLAIN, "trainer.total_training_steps=1000", "trainer.test_freq=-1")
    job.wait_for_step(1, seconds=600)
    processes.below(job.process.pid, f"ray::{lost}")[0].kill()
    done = job.wait(300)
    assert done.code != 0
    assert "lost" in done.output or "ActorDiedError" in done.output
