"""Killed trainers, ranks and nodes, and what is left: real verl jobs on CPUs through the run directory's wrapper."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import processes
import psutil
import pytest
import torch

from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.plugin.prompt_memory import MEMORY_FILE, prompt_id
from verl_krpo.runs import log

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
CONFIG = ["--config-path", str(ROOT / "recipes/config"), "--config-name", "arithmetic_cpu"]
SMALL = [
    "data.train_batch_size=8",
    "data.max_response_length=16",
    "actor_rollout_ref.actor.ppo_mini_batch_size=8",
    "actor_rollout_ref.rollout.n=4",
    "trainer.logger=[console,file]",
    "trainer.val_before_train=false",
    "trainer.test_freq=-1",
]


@pytest.fixture
def start(job_inputs, tmp_path):
    """start(*overrides, **environment) -> a Popen of the wrapper, as the recipes call it, in tmp_path / "run"."""
    folder, started = tmp_path / "run", []

    def begun(*overrides: str, **environment: str) -> subprocess.Popen:
        ours = {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", "VERL_FILE_LOGGER_PATH": str(folder / "metrics.jsonl")}
        job = [sys.executable, "-m", "verl.trainer.main_ppo", *CONFIG, *job_inputs, *SMALL]
        job += [f"trainer.default_local_dir={folder}", *overrides]
        inherited = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
        wrapper = [sys.executable, "-m", "verl_krpo", "run", str(folder), *job]
        with open(tmp_path / "output.txt", "a") as output:
            started.append(
                subprocess.Popen(
                    wrapper,
                    env=inherited | ours | environment,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    cwd=tmp_path,
                )
            )
        return started[-1]

    yield begun
    for process in started:
        if process.poll() is None:
            below = processes.below(process.pid)
            process.terminate()
            processes.kill(processes.still_running(below, 30))
            process.wait(30)


def wait_for_step(wrapper: subprocess.Popen, folder: Path, step: int, seconds: float = 600) -> None:
    """Until verl has logged this step; a failure of the test when the job ends or takes longer."""
    deadline = time.monotonic() + seconds
    while step not in log.rows(folder):
        assert wrapper.poll() is None and time.monotonic() < deadline, tail(folder)
        time.sleep(0.1)


def tail(folder: Path) -> str:
    log = folder / "log.txt"
    return log.read_text(errors="replace")[-6000:] if log.exists() else "no log"


def assert_ray_says_why(folder: Path) -> None:
    """What Ray raises depends on who notices first: that an actor died or is unavailable, or, where a rank meets its
    lost peer in the midst of a collective, gloo's error in a RayTaskError."""
    log = (folder / "log.txt").read_text(errors="replace")
    assert re.search(r"ray\.exceptions\.(Actor\w+Error: |RayTaskError\(\w+\): )", log), tail(folder)


def child(wrapper: subprocess.Popen, name: str) -> psutil.Process:
    """The one process below the wrapper with this in its command line."""
    (process,) = processes.below(wrapper.pid, name)
    return process


# Three steps an epoch, one response a prompt, which RLOO and GRPO cannot train with.
REMEMBERING = [
    "method=krpo_memory",
    "data.train_max_samples=24",
    "data.seed=1",  # without one verl draws another 24 after a restart
    "actor_rollout_ref.rollout.n=1",
    "trainer.total_training_steps=6",
    "trainer.save_freq=2",
    "trainer.max_actor_ckpt_to_keep=null",
]


def rewards_and_prompts(path: Path) -> tuple[torch.Tensor, list[str]]:
    """A step of verl's rollout dump."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    sums = [re.search(r"\d\d\+\d\d=", row["input"])[0] for row in rows]
    prompts = [prompt_id([{"role": "user", "content": text}], "arithmetic_sums", None) for text in sums]
    return torch.tensor([row["score"] for row in rows]), prompts


def test_a_killed_job_goes_on_at_the_saved_step_and_remembers_its_prompts(start, tmp_path):
    folder, rollouts = tmp_path / "run", tmp_path / "rollouts"
    job = [*REMEMBERING, f"trainer.rollout_data_dir={rollouts}"]
    wrapper = start(*job)
    wait_for_step(wrapper, folder, 4)
    child(wrapper, "verl.trainer.main_ppo").kill()
    assert wrapper.wait(300) == 128 + signal.SIGKILL
    assert log.saved_step(folder) == 4

    wrapper = start(*job)
    assert wrapper.wait(300) == 0, tail(folder)
    attempts = [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]
    assert [line.get("resumes_from") for line in attempts] == [0, None, 4, None]
    assert [line.get("status") for line in attempts] == [None, -9, None, 0]
    said = (folder / "log.txt").read_text()
    assert "setting global step to 4" in said
    assert f"krpo remembers 24 prompts from {folder}/global_step_4/{MEMORY_FILE}" in said
    assert log.saved_step(folder) == 6
    assert (folder / ".hydra/config.yaml").exists() and (folder / "log.1.txt").exists()

    metrics = log.rows(folder)
    assert sorted(metrics) == [1, 2, 3, 4, 5, 6]
    assert [metrics[step]["training/global_step"] for step in sorted(metrics)] == [1, 2, 3, 4, 5, 6]
    assert [metrics[step]["krpo/memory_known"] for step in sorted(metrics)] == [0, 0, 0, 1, 1, 1]
    for step, data in metrics.items():
        assert math.isfinite(data["actor/pg_loss"]) and data["actor/grad_norm"] > 0, step
        if step > 3:
            assert data["krpo/memory_prompts"] == 24 and 1 <= data["krpo/memory_age"] <= 5
            assert data["krpo/memory_var"] >= 0 and data["krpo/memory_nis"] > 0

    # Eight prompts were not in the two steps after the kill: their states are those of before, to the bit.
    saved, ended = (PromptMemory.load(folder / f"global_step_{step}" / MEMORY_FILE) for step in (4, 6))
    assert (len(saved), saved.step, len(ended), ended.step) == (24, 4, 24, 6)
    untouched = ended.visited <= 4
    assert untouched.sum() == 8 and np.array_equal(saved.keys, ended.keys)
    for name in ("deviation", "var", "visited"):
        assert np.array_equal(getattr(saved, name)[untouched], getattr(ended, name)[untouched]), name
    # And the whole is what one memory holds that saw the rewards of all six steps. (Their sums are in another order.)
    unbroken = PromptMemory()
    for step in range(1, 7):
        rewards, prompts = rewards_and_prompts(rollouts / f"{step}.jsonl")
        _, unbroken = krpo_memory(rewards, prompts, unbroken, step=step)
    for name, value in vars(ended).items():
        assert np.allclose(value, getattr(unbroken, name), rtol=1e-12, atol=1e-12), name

    wrapper = start(*job)  # a third time: there is nothing left to do
    assert wrapper.wait(300) == 0
    assert "finished at step 6" in (tmp_path / "output.txt").read_text()


def test_a_lost_trainer_rank_ends_the_job_with_a_reason(start, tmp_path):
    folder = tmp_path / "run"
    wrapper = start("trainer.total_training_steps=1000", "trainer.save_freq=-1")
    wait_for_step(wrapper, folder, 1)
    child(wrapper, "ray::WorkerDict").kill()
    assert wrapper.wait(300) not in (0, None)
    assert_ray_says_why(folder)
    assert json.loads((folder / "attempts.jsonl").read_text().splitlines()[-1])["status"] != 0


@pytest.mark.nightly
def test_a_llama_trains_on_two_ranks(start, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    from verl_krpo import tiny_model

    tokenizer = tiny_model.tokenizer()
    ends = {"bos_token_id": None, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id}
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, dtype="float32", **sizes, **ends)
    )
    model.save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    two = ["trainer.n_gpus_per_node=2", f"actor_rollout_ref.model.path={tmp_path}/llama"]
    wrapper = start("trainer.total_training_steps=2", "trainer.save_freq=2", *two)
    assert wrapper.wait(300) == 0, tail(tmp_path / "run")
    metrics = log.rows(tmp_path / "run")
    assert sorted(metrics) == [1, 2]
    assert all(data["training/rollout_probs_diff_max"] < 1e-5 for data in metrics.values())
    shards = sorted(path.name for path in (tmp_path / "run/global_step_2/actor").glob("model_world_size_2_rank_*.pt"))
    assert shards == ["model_world_size_2_rank_0.pt", "model_world_size_2_rank_1.pt"]


@pytest.fixture
def cluster(tmp_path_factory, free_ports):
    """Two Ray nodes on loopback, by the scripts: (environment of a job there, the head's process, the other's)."""
    folder = tmp_path_factory.mktemp("ray")
    ports = iter(free_ports(12))
    port = next(ports)
    common = ["--num-cpus=8", "--num-gpus=1", "--object-store-memory=300000000"]

    def node(script: str, ip: str, *options: str) -> subprocess.Popen:
        names = ("node-manager-port", "object-manager-port", "dashboard-agent-listen-port", "metrics-export-port")
        options = [*options, *common, *(f"--{name}={next(ports)}" for name in names)]
        environment = os.environ | {"PYTHON": sys.executable, "NODE_IP": ip, "PORT": str(port), "VERL_PLATFORM": "cpu"}
        environment |= {"OMP_NUM_THREADS": "1"}
        with open(folder / f"{script}.txt", "w") as output:
            command = ["bash", ROOT / "scripts" / script, *options]
            return subprocess.Popen(command, env=environment, stdout=output, stderr=output, start_new_session=True)

    head = node("ray_head.sh", "127.0.0.2", "--include-dashboard=false", f"--ray-client-server-port={next(ports)}")
    worker = node("ray_worker.sh", "127.0.0.3", f"127.0.0.2:{port}")
    # Ray makes a path for sockets below its temp dir, which must stay short: so the default, /tmp/ray.
    yield {"RAY_ADDRESS": f"127.0.0.2:{port}", "RAY_AUTH_MODE": "token"}, head, worker
    for process in (worker, head):
        below = processes.below(process.pid)
        process.terminate()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        processes.kill(below)


def test_two_ray_nodes_train_and_a_lost_node_ends_the_job(start, cluster, job_inputs, tmp_path):
    environment, _, worker = cluster
    two = ["trainer.nnodes=2", "trainer.n_gpus_per_node=1", "trainer.total_training_steps=1000", "trainer.save_freq=-1"]
    # A running cluster does not inherit this process's environment.
    logged = tmp_path / "run/metrics.jsonl"
    two += [f"+ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH={logged}"]

    deadline = time.monotonic() + 120
    while True:  # the preflight itself waits for nodes, but needs a head that answers
        done = subprocess.run(
            [sys.executable, "-m", "verl_krpo", "preflight", *CONFIG, *job_inputs, *SMALL, *two],
            env=os.environ | environment | {"VERL_PLATFORM": "cpu"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if done.returncode == 0:
            break
        assert time.monotonic() < deadline, done.stderr

    wrapper = start(*two, **environment)
    wait_for_step(wrapper, tmp_path / "run", 2)
    processes.kill([*processes.below(worker.pid), psutil.Process(worker.pid)])  # the node: raylet, agents, ranks
    assert wrapper.wait(300) not in (0, None)
    assert_ray_says_why(tmp_path / "run")
    assert "after step" in (tmp_path / "output.txt").read_text().splitlines()[-1]
