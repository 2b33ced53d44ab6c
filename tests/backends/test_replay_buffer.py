import time
import uuid

import pytest
import ray
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

from verl_krpo.backends import replay_buffer
from verl_krpo.backends.replay_buffer import DISCARDED_IN_A_ROW, WatchedReplayBuffer, WatchedReplayBufferAsync


def buffer(cls, mode, refill_fn=lambda count: None):
    return cls(
        trainer_mode=mode,
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs={},
        refill_fn=refill_fn,
    )


@ray.remote(num_cpus=0)
class Server:
    def ready(self):
        return True


@pytest.fixture(scope="module")
def local_ray():
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def servers(local_ray):
    started = [Server.options(name=f"{uuid.uuid4().hex}_server_{i}").remote() for i in range(2)]
    ray.get([server.ready.remote() for server in started])
    return started


@pytest.mark.parametrize(
    ("cls", "verls", "mode", "waiting"),
    [
        (WatchedReplayBuffer, ReplayBuffer, "sync", "sample"),
        (WatchedReplayBufferAsync, ReplayBufferAsync, "colocate_async", "wait_for_sampleable"),
    ],
)
def test_a_lost_actor_is_named_while_verl_waits(servers, monkeypatch, cls, verls, mode, waiting):
    def wait_for_ever(self, *args):
        ray.kill(servers[1])
        while True:
            time.sleep(0.05)

    monkeypatch.setattr(replay_buffer, "WATCH_SECONDS", 0.05)
    monkeypatch.setattr(verls, waiting, wait_for_ever)
    watched = buffer(cls, mode)
    watched._look_for_lost_actors()
    with pytest.raises(RuntimeError, match="lost while waiting for rollouts: [0-9a-f]+_server_1"):
        watched.sample(1, "train", 8)


def test_what_verl_samples_and_what_it_raises_come_through(servers, monkeypatch):
    watched = buffer(WatchedReplayBuffer, "sync")
    monkeypatch.setattr(ReplayBuffer, "sample", lambda self, *args: args)
    assert watched.sample(1, "train", 8) == (1, "train", 8)

    def fail(self, *args):
        raise ValueError("no prompts")

    monkeypatch.setattr(ReplayBuffer, "sample", fail)
    with pytest.raises(ValueError, match="no prompts"):
        watched.sample(1, "train", 8)


def test_rollouts_that_all_fail_end_an_asynchronous_job():
    submitted = []
    watched = buffer(WatchedReplayBufferAsync, "colocate_async", submitted.append)
    for _ in range(DISCARDED_IN_A_ROW - 1):
        watched.refill_fn(1)
    watched.finished_keys["train"] = {"good"}
    watched.refill_fn(1)  # one group is there to train on: counted anew
    watched.finished_keys["train"] = set()
    for _ in range(DISCARDED_IN_A_ROW - 1):
        watched.refill_fn(1)
    assert sum(submitted) == 2 * DISCARDED_IN_A_ROW - 1
    with pytest.raises(RuntimeError, match="256 prompts in a row failed"):
        watched.refill_fn(1)
