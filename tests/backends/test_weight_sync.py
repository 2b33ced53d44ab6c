"""verl's own sender of weights, with a receiver that fails or answers: no vLLM is needed."""

import json
import os
import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from verl_krpo.backends.weight_sync import WATCHED, watch_the_answer

# The sender comes from its file: the package around it wants a vLLM. The receiver does what vLLM's worker would.
UPDATE = """
import asyncio, importlib.util, json, pathlib, sys, traceback
import ray, torch, verl, zmq
from verl_krpo.backends import weight_sync
from verl_krpo.hook import wrap

folder, *cases = sys.argv[1:]
path = pathlib.Path(verl.__file__).parent / "workers/rollout/vllm_rollout/bucketed_weight_transfer.py"
spec = importlib.util.spec_from_file_location("bucketed_weight_transfer", path)
spec.loader.exec_module(module := importlib.util.module_from_spec(spec))


@ray.remote
def receive(handle, case):
    if case == "before the first bucket":
        raise ValueError("Attempted to load weight")
    socket = zmq.Context().socket(zmq.REP)
    socket.connect(handle)
    socket.recv_pyobj()  # the buffer
    socket.send(b"")
    names = list(socket.recv_pyobj()["bucket_meta"])
    if case == "in a bucket":
        raise ValueError("Attempted to load weight")
    socket.send(b"")
    return names


class Adapter:
    async def execute(self, method, non_block=False, **call):
        return receive.remote(**call)


async def update(handle, case):
    answer = await Adapter().execute("receive", non_block=True, handle=handle, case=case)
    sender = module.BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
    await sender.async_send_weights(iter([("weight", torch.ones(3))]))
    return await answer


wrap(Adapter, "execute", weight_sync.remember_the_answer)
wrap(module.BucketedWeightSender, "_init_socket", weight_sync.watch_the_answer)
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
outcomes = {}
for number, case in enumerate(cases):
    try:
        outcomes[case] = asyncio.run(update(f"ipc://{folder}/socket{number}", case))
    except RuntimeError:
        outcomes[case] = traceback.format_exc()
print(json.dumps(outcomes))
"""


def test_an_update_that_fails_says_why_and_one_that_succeeds_is_left_alone(tmp_path):
    cases = ["before the first bucket", "in a bucket", "taken"]
    done = subprocess.run(
        [sys.executable, "-c", UPDATE, str(tmp_path), *cases],
        env=os.environ | {"VERL_PLATFORM": "cpu", WATCHED: "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcomes = json.loads(done.stdout)
    assert outcomes.pop("taken") == ["weight"]
    for case, raised in outcomes.items():
        assert "RuntimeError: vLLM failed to load the trainer's weights" in raised, case
        assert "ValueError: Attempted to load weight" in raised, case
    assert not list(tmp_path.glob("socket*"))


@pytest.mark.parametrize(
    ("overrides", "watched"),
    [
        (["algorithm.adv_estimator=grpo"], False),
        (["algorithm.adv_estimator=krpo"], True),
        (["+actor@actor_rollout_ref.actor.policy_loss=kpo"], True),
    ],
)
def test_only_a_job_of_ours_asks_its_workers_to_watch(compose, monkeypatch, overrides, watched):
    from verl.utils.config import validate_config

    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    at = "actor_rollout_ref"
    given = "ray_kwargs.ray_init.runtime_env.env_vars"
    config = compose(
        f"{at}.actor.ppo_micro_batch_size_per_gpu=4",
        f"{at}.rollout.log_prob_micro_batch_size_per_gpu=4",
        f"+{given}.GIVEN=too",
        *overrides,
    )
    validate_config(config, use_reference_policy=False, use_critic=False)
    assert OmegaConf.select(config, given) == {"GIVEN": "too"} | ({WATCHED: "1"} if watched else {})


def test_a_job_that_did_not_ask_keeps_its_socket(monkeypatch):
    monkeypatch.delenv(WATCHED, raising=False)
    sender = type("Sender", (), {"socket": object()})()
    before = sender.socket
    watch_the_answer(lambda sender: None, sender)
    assert sender.socket is before
