"""verl's own sender of weights, with a receiver that fails or answers: no vLLM is needed."""

import os
import subprocess
import sys

import pytest

# The sender comes from its file: the package around it wants a vLLM. The receiver does what vLLM's worker would.
UPDATE = """
import asyncio, importlib.util, pathlib, sys
import ray, torch, verl, zmq
from verl_krpo.backends import weight_sync
from verl_krpo.plugin import hooks

handle, case = sys.argv[1:]
path = pathlib.Path(verl.__file__).parent / "workers/rollout/vllm_rollout/bucketed_weight_transfer.py"
spec = importlib.util.spec_from_file_location("bucketed_weight_transfer", path)
spec.loader.exec_module(module := importlib.util.module_from_spec(spec))


@ray.remote
def receive():
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
    async def execute(self, method, non_block=False):
        return receive.remote()


async def update():
    answer = await Adapter().execute("receive", non_block=True)
    sender = module.BucketedWeightSender(handle, bucket_size_mb=1, use_shm=True)
    await sender.async_send_weights(iter([("weight", torch.ones(3))]))
    return await answer


hooks.wrap(Adapter, "execute", weight_sync.remember_the_answer)
hooks.wrap(module.BucketedWeightSender, "_init_socket", weight_sync.watch_the_answer)
ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
print(asyncio.run(update()))
"""


def update(tmp_path, case: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", UPDATE, f"ipc://{tmp_path}/socket", case]
    env = os.environ | {"VERL_PLATFORM": "cpu"}
    return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("case", ["before the first bucket", "in a bucket"])
def test_an_update_that_fails_says_so_with_its_reason(tmp_path, case):
    done = update(tmp_path, case)
    assert done.returncode == 1
    assert "RuntimeError: vLLM failed to load the trainer's weights" in done.stderr, done.stderr[-3000:]
    assert "ValueError: Attempted to load weight" in done.stderr
    assert not (tmp_path / "socket").exists()


def test_an_update_that_succeeds_is_left_alone(tmp_path):
    done = update(tmp_path, "taken")
    assert (done.returncode, done.stdout) == (0, "['weight']\n"), done.stderr[-3000:]
