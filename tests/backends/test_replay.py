import time

import pytest
import ray

from verl_krpo.backends.replay import FAILURES_IN_A_ROW, WatchedReplayBuffer, WatchedReplayBufferAsync


def buffer(cls, mode):
    return cls(
        trainer_mode=mode,
        trainer_config={},
        max_off_policy_threshold=8,
        max_off_policy_strategy="drop",
        sampler_kwargs={},
        refill_fn=lambda count: None,
    )


@ray.remote(num_cpus=0)
class Server:
    def ready(self):
        return True


def test_a_lost_actor_is_named():
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        servers = [Server.options(name=f"server_{i}").remote() for i in range(2)]
        ray.get([server.ready.remote() for server in servers])
        watched = buffer(WatchedReplayBuffer, "sync")
        watched._look_for_lost_actors()
        watched._look_for_lost_actors()
        ray.kill(servers[1])
        deadline = time.monotonic() + 30
        while "server_1" in ray.util.list_named_actors() and time.monotonic() < deadline:
            time.sleep(0.05)
        with pytest.raises(RuntimeError, match="lost while waiting for rollouts: server_1"):
            watched._look_for_lost_actors()
    finally:
        ray.shutdown()


def test_rollouts_that_all_fail_end_an_asynchronous_job():
    watched = buffer(WatchedReplayBufferAsync, "colocate_async")

    def fail(count, first):
        for uid in range(first, first + count):
            watched.failure_keys["train"] = {str(uid)}  # verl evicts and replaces one after the other
            watched._count_failures()
        watched.failure_keys["train"] = set()

    fail(FAILURES_IN_A_ROW - 1, first=0)
    watched.finished_keys["train"] = {"good"}
    watched._count_failures()  # one success: counted anew
    watched.finished_keys["train"] = set()
    fail(FAILURES_IN_A_ROW - 1, first=1000)
    with pytest.raises(RuntimeError, match="256 prompts failed and none succeeded"):
        fail(1, first=2000)
