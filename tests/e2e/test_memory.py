"""A memory in real verl jobs: prompts recur over epochs, the driver is killed, and the next one goes on."""

import json
import math
import os
import re
import signal
import time

import numpy as np
import pytest
import torch

from verl_krpo import krpo
from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.config import MEMORY
from verl_krpo.plugin.identity import FILE, prompt_id

pytestmark = pytest.mark.e2e

JOB = [  # three steps an epoch, one response a prompt, which RLOO and GRPO cannot train with
    "+algorithm=krpo_memory",
    "data.train_batch_size=8",
    "data.train_max_samples=24",
    "data.seed=1",  # without one verl draws another 24 after a restart
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


def rewards_and_prompts(path):
    """A step of verl's rollout dump."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sums = [re.search(r"\d\d\+\d\d=", row["input"])[0] for row in rows]
    prompts = [prompt_id([{"role": "user", "content": text}], "arithmetic_sums", None) for text in sums]
    return torch.tensor([row["score"] for row in rows]), prompts


def test_a_job_remembers_its_prompts_after_a_kill(start_job, tmp_path):
    checkpoints, rollouts = tmp_path / "checkpoints", tmp_path / "rollouts"
    where = [f"trainer.default_local_dir={checkpoints}", f"trainer.rollout_data_dir={rollouts}"]
    killed = start_job(*JOB, *where)
    deadline = time.monotonic() + 900
    while 4 not in killed.metrics():
        assert killed.process.poll() is None and time.monotonic() < deadline, killed.output_file.read_text()[-6000:]
        time.sleep(0.1)
    os.killpg(killed.process.pid, signal.SIGKILL)
    killed.process.wait()
    before = killed.metrics()
    done = start_job(*JOB, *where).wait(900)
    assert done.code == 0, done.output[-6000:]

    assert [before[step]["krpo/memory_known"] for step in (1, 2, 3, 4)] == [0, 0, 0, 1]
    assert sorted(done.metrics)[0] == 5, "the second job went on from step 4"
    assert f"krpo remembers 24 prompts from {checkpoints}/global_step_4/{FILE}" in done.output
    for step, metrics in done.metrics.items():
        assert (metrics["krpo/memory_known"], metrics["krpo/memory_prompts"]) == (1, 24)
        assert 1 <= metrics["krpo/memory_age"] <= 5
        assert metrics["krpo/memory_var"] >= 0 and metrics["krpo/memory_nis"] > 0
        assert math.isfinite(metrics["actor/pg_loss"]) and metrics["actor/grad_norm"] > 0, step

    # Eight prompts were not in the two steps after the kill: their states are those of before, to the bit.
    saved, ended = (PromptMemory.load(checkpoints / f"global_step_{step}" / FILE) for step in (4, 6))
    assert (len(saved), saved.step, len(ended), ended.step) == (24, 4, 24, 6)
    untouched = ended.visited <= 4
    assert untouched.sum() == 8 and np.array_equal(saved.keys, ended.keys)
    for name in ("deviation", "var", "visited"):
        assert np.array_equal(getattr(saved, name)[untouched], getattr(ended, name)[untouched]), name
    # And the whole is what one memory holds that saw the rewards of all six steps. (Their sums are in another order.)
    unbroken = PromptMemory()
    for step in range(1, 7):
        rewards, prompts = rewards_and_prompts(rollouts / f"{step}.jsonl")
        unbroken = krpo(rewards, prompts, MEMORY, memory=unbroken, step=step).memory
    for name, value in vars(ended).items():
        assert np.allclose(value, getattr(unbroken, name), rtol=1e-12, atol=1e-12), name
