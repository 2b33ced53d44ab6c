"""verl's weight updates of vLLM, on GPUs and CPUs, with an end where they fail.

verl's trainer hands the weights over by a socket that has no timeout. Where vLLM cannot load them nobody answers, and
the job would stand still for ever. Here the trainer looks every second whether vLLM's side of the update has failed,
and fails with it. Other jobs of the environment are left as they are: the driver of a job with krpo, kpo or without a
GPU asks for it (`watch`), by an environment variable that Ray hands on to the workers.
"""

import os
from collections.abc import Callable
from typing import Any

from omegaconf import DictConfig, OmegaConf

LOOK_MILLISECONDS = 1000
WATCHED = "VERL_KRPO_WATCHES_WEIGHTS"

_answer = None  # of vLLM's workers to the update that is sent next, a Ray reference


def watch(config: DictConfig) -> None:
    """Have the workers of the job with this verl config look; for a Ray that is started after this."""
    OmegaConf.update(config, f"ray_kwargs.ray_init.runtime_env.env_vars.{WATCHED}", "1", force_add=True)


async def remember_the_answer(
    execute: Callable, adapter: Any, method: str, non_block: bool = False, **call: Any
) -> Any:
    """verl's call of vLLM's workers; it returns before they have answered, and the sender of the weights is next."""
    global _answer
    answer = await execute(adapter, method, non_block=non_block, **call)
    if non_block:
        _answer = answer
    return answer


def watch_the_answer(init_socket: Callable, sender: Any) -> None:
    """verl's socket, whose send and recv wait, in a watched job, only as long as the answer has not failed."""
    init_socket(sender)
    if WATCHED not in os.environ:
        return
    import ray
    import zmq

    socket, answer = sender.socket, _answer

    def waiting(call: Callable, event: int) -> Callable:
        def wait(*args: Any, **kwargs: Any) -> Any:
            while not socket.poll(LOOK_MILLISECONDS, event):
                if answer is not None and ray.wait([answer], timeout=0)[0]:
                    _raise_failure(answer)
            return call(*args, **kwargs)

        return wait

    socket.send, socket.recv = waiting(socket.send, zmq.POLLOUT), waiting(socket.recv, zmq.POLLIN)


def _raise_failure(answer: Any) -> None:
    import ray

    try:
        ray.get(answer)
    except Exception as error:
        raise RuntimeError(
            "vLLM failed to load the trainer's weights: the first traceback of a vLLM worker in the log is the reason, "
            "what follows it comes from there"
        ) from error
