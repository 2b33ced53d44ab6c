"""verl's replay buffers, polling often, and giving up where verl's would wait for ever."""

import threading
from collections.abc import Callable
from concurrent.futures import Future

import ray
from verl.trainer.ppo.v1.replay_buffer import ReplayBuffer, ReplayBufferAsync

POLL_SECONDS = 0.02  # verl polls every 2 s, which is longer than a step of a small model
WATCH_SECONDS = 5.0
DISCARDED_IN_A_ROW = 256


class _Watched:
    """RuntimeError for a lost process: verl's buffer waits for the prompts that a lost worker never reports."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **{"poll_interval": POLL_SECONDS, **kwargs})
        self._alive: set[str] = set()

    def _watching(self, wait: Callable, *args, **kwargs):
        """wait(*args, **kwargs) in a thread of its own, as this one looks whether every process is still there."""
        outcome = Future()

        def run() -> None:
            try:
                outcome.set_result(wait(*args, **kwargs))
            except BaseException as error:  # raised again below
                outcome.set_exception(error)

        thread = threading.Thread(target=run, daemon=True, name="verl-replay-buffer")  # ends with the process
        thread.start()
        while not outcome.done():
            thread.join(WATCH_SECONDS)
            self._look_for_lost_actors()
        return outcome.result()

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

    def sample(self, *args, **kwargs):
        return self._watching(super().sample, *args, **kwargs)


class WatchedReplayBufferAsync(_Watched, ReplayBufferAsync):
    """For the asynchronous trainer modes. RuntimeError if nothing happens but prompts that fail and are replaced."""

    def __init__(self, *args, refill_fn: Callable[[int], None], **kwargs):
        super().__init__(*args, refill_fn=self._refill, **kwargs)
        self._submit = refill_fn
        self._discarded = 0

    def wait_for_sampleable(self, *args, **kwargs):  # sample() waits here
        return self._watching(super().wait_for_sampleable, *args, **kwargs)

    def _refill(self, count: int) -> None:
        """Replaces the groups that were just discarded, as they failed or went stale."""
        self._discarded = 0 if self.finished_keys["train"] else self._discarded + count
        if self._discarded >= DISCARDED_IN_A_ROW:
            raise RuntimeError(
                f"{self._discarded} prompts in a row failed or went stale, and none is left to train on: see the first "
                "error above"
            )
        self._submit(count)
