"""A memory in real verl jobs: prompts recur over epochs, the driver is killed, and the next one goes on."""

import math
import os
import signal
import time

import pytest

from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.plugin.identity import FILE

pytestmark = pytest.mark.e2e

JOB = [  # two steps an epoch, one response a prompt, which RLOO and GRPO cannot train with
    "+algorithm=krpo_memory",
    "data.train_batch_size=8",
    "data.train_max_samples=16",
    "data.seed=1",  # without one verl draws another 16 after a restart
    "data.max_prompt_length=32",
    "data.max_response_length=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.rollout.n=1",
    "trainer.logger=[console,file]",
    "trainer.total_epochs=100",
    "trainer.total_training_steps=6",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    "trainer.save_freq=2",
]


def test_a_job_remembers_its_prompts_after_a_kill(start_job, tmp_path):
    where = f"trainer.default_local_dir={tmp_path}/checkpoints"
    killed = start_job(*JOB, where)
    deadline = time.monotonic() + 900
    while 4 not in killed.metrics():
        assert killed.process.poll() is None and time.monotonic() < deadline, killed.output_file.read_text()[-6000:]
        time.sleep(0.1)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    before = killed.metrics()
    done = start_job(*JOB, where).wait(900)
    assert done.code == 0, done.output[-6000:]

    assert [before[step]["krpo/memory_known"] for step in (1, 2, 3, 4)] == [0, 0, 1, 1]
    assert sorted(done.metrics)[0] == 5, "the second job went on from step 4"
    assert f"krpo remembers 16 prompts from {tmp_path}/checkpoints/global_step_4/{FILE}" in done.output
    for step, metrics in done.metrics.items():
        assert (metrics["krpo/memory_known"], metrics["krpo/memory_prompts"]) == (1, 16)
        assert 1 <= metrics["krpo/memory_age"] <= 3
        assert metrics["krpo/memory_var"] >= 0 and metrics["krpo/memory_nis"] > 0
        assert math.isfinite(metrics["actor/pg_loss"]) and metrics["actor/grad_norm"] > 0, step
    memory = PromptMemory.load(tmp_path / "checkpoints" / "global_step_6" / FILE)
    assert (len(memory), memory.step, memory.visited.min()) == (16, 6, 5)
