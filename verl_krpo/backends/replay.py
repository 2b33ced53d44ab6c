"""verl's replay buffers, polling often, and giving up where verl's would wait for ever."""

import time

import ray
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

POLL_SECONDS = 0.02  # verl polls every 2 s, which is longer than a step of a small model
WATCH_SECONDS = 5.0
FAILURES_IN_A_ROW = 256


class _Watched:
    """RuntimeError for a lost process: verl's buffer waits for the prompts that a lost worker never reports."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"poll_interval": POLL_SECONDS, **kwargs})
        self._alive: set[str] = set()
        self._next_watch = 0.0

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        if any(self.failure_keys.values()) or time.monotonic() >= self._next_watch:
            self._look_for_lost_actors()
            self._next_watch = time.monotonic() + WATCH_SECONDS

    def _look_for_lost_actors(self) -> None:
        """Servers, workers and queues are named actors: one that was alive and is gone was lost."""
        alive = set(ray.util.list_named_actors())
        if lost := self._alive - alive:
            raise RuntimeError(
                f"lost while waiting for rollouts: {', '.join(sorted(lost))}. The first error above says why; a "
                "process that was killed most often ran out of memory"
            )
        self._alive = alive


class WatchedReplayBuffer(_Watched, ReplayBuffer):
    """For trainer.v1.trainer_mode=sync."""


class WatchedReplayBufferAsync(_Watched, ReplayBufferAsync):
    """For the asynchronous trainer modes, where verl replaces failed prompts without end: RuntimeError if all fail."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._failed: set[str] = set()

    def _sync_metadata_from_transfer_queue(self) -> None:
        super()._sync_metadata_from_transfer_queue()
        self._count_failures()

    def _count_failures(self) -> None:
        if any(self.finished_keys.values()):
            self._failed.clear()
        self._failed.update(*self.failure_keys.values())
        if len(self._failed) >= FAILURES_IN_A_ROW:
            raise RuntimeError(f"{len(self._failed)} prompts failed and none succeeded: see the first error above")
