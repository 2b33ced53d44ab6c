"""Everything that verl-krpo changes in verl at run time: what, why, and from which verl on it can go.

Registries and config groups, verl's own doors, are in `plugin/__init__.py`. Here is what has no door: functions that
are replaced by one of ours, which calls the original. Each is replaced when its module is imported, so that importing
verl costs next to nothing more. `verl-krpo doctor` prints this list.
"""

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter
from types import ModuleType
from typing import Any

import wrapt

from verl_krpo.backends import on_cpu, vllm_cpu, weight_sync

MARK = "__verl_krpo__"


def check_job(validate_config: Callable, config: Any, *args: Any, **kwargs: Any) -> Any:
    """What verl's mains call on the driver, before Ray starts: prepare a CPU job, refuse a wrong one."""
    from omegaconf import OmegaConf

    from verl_krpo import versions
    from verl_krpo.plugin import guards

    if line := versions.untested():
        print(line, file=sys.stderr)
    if on_cpu():
        from verl_krpo.backends import cpu_platform

        cpu_platform.prepare(config)
    if OmegaConf.select(config, "actor_rollout_ref.rollout.name") == "hf":
        from verl_krpo.backends import hf_rollout

        hf_rollout.check(config.actor_rollout_ref.rollout)
    guards.check(config)
    return validate_config(config, *args, **kwargs)


def log_metrics(log: Callable, tracking: Any, data: dict, *args: Any, **kwargs: Any) -> Any:
    """The trainer's log of a step, with the krpo/* scalars of that step."""
    from verl_krpo.plugin import metrics

    return log(tracking, {**data, **metrics.drain()}, *args, **kwargs)


def count_sessions_once(compute: Callable, *args: Any, **kwargs: Any) -> Any:
    """A session of an agent loop counts once in its group, for `krpo` as for verl's `grpo`."""
    from verl_krpo.plugin import sessions

    return sessions.compute_advantage(compute, *args, **kwargs)


def begin_memory(load_checkpoint: Callable, trainer: Any) -> Any:
    """A trainer that resumes remembers its prompts."""
    from verl_krpo.plugin import prompt_memory

    loaded = load_checkpoint(trainer)
    prompt_memory.begin(trainer)
    return loaded


def save_memory(save_checkpoint: Callable, trainer: Any) -> Any:
    """A checkpoint holds the memory of the prompts."""
    from verl_krpo.plugin import prompt_memory

    prompt_memory.save(trainer)
    return save_checkpoint(trainer)


def name_queued_prompts(compute_advantage: Callable, trainer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """The V1 trainer's rows, in its queue, know their prompts."""
    from verl_krpo.plugin import prompt_memory

    prompt_memory.read_queue(trainer, batch)
    return compute_advantage(trainer, batch, *args, **kwargs)


def name_prompts(compute_advantage: Callable, data: Any, *args: Any, **kwargs: Any) -> Any:
    """The legacy trainer's rows know their prompts."""
    from verl_krpo.plugin import prompt_memory

    prompt_memory.read_batch(data)
    return compute_advantage(data, *args, **kwargs)


def name_the_group(apply: Callable, overrides: list, config: Any) -> Any:
    """What to write, in place of Hydra's "Key 'krpo' is not in struct"."""
    from verl_krpo.plugin import guards

    guards.check_overrides(overrides, config)
    return apply(overrides, config)


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


@dataclass(frozen=True)
class Hook:
    """`module`.`name`(*args) becomes `around`(original, *args) once `module` is imported.

    why: what would be missing without it. until: from when on it can go. needed: a verl without such a function is an
    error, as nothing else would notice. cpu: only with VERL_PLATFORM=cpu.
    """

    module: str
    name: str
    around: Callable
    why: str
    until: str
    needed: bool = True
    cpu: bool = False

    def attach(self, module: ModuleType) -> None:
        """Replace the function in the module, once. RuntimeError where a needed one is not there."""
        try:
            *path, name = self.name.split(".")
            owner = attrgetter(".".join(path))(module) if path else module
            wrap(owner, name, self.around)
        except AttributeError as error:
            if self.needed:
                raise RuntimeError(
                    f"there is no {self.module}.{self.name}, which verl-krpo needs ({self.why}): use a verl that it is "
                    "tested with (verl-krpo doctor names them), a newer verl-krpo, or uninstall it"
                ) from error

    def state(self) -> str:
        """In this process: `in force`, `waiting` for its module, or `missing`."""
        if self.module not in sys.modules:
            return "waiting"
        try:
            return "in force" if marked(attrgetter(self.name)(sys.modules[self.module])) else "missing"
        except AttributeError:
            return "missing"


HOOKS = (
    Hook(
        "verl.utils.config",
        "validate_config",
        check_job,
        why="wrong krpo and kpo settings stop a job before Ray starts",
        until="verl asks plugins to check a job's config",
    ),
    Hook(
        "verl.utils.tracking",
        "Tracking.log",
        log_metrics,
        why="krpo/* metrics reach the trainer's log",
        until="an advantage estimator of verl's can return metrics",
    ),
    Hook(
        "verl.trainer.ppo.v1.trainer_base",
        "compute_advantage_for_multi_trajectories",
        count_sessions_once,
        why="a session with several outputs counts once in its group",
        until="verl does so for every group estimator, not for grpo alone",
        needed=False,  # the estimator itself notices: sessions.check_trainer
    ),
    *(
        Hook(
            module,
            name,
            around,
            why="krpo's memory knows a prompt in another epoch and lasts as long as the checkpoints",
            until="verl tells estimators which prompt a row answers, and lets plugins save and load",
            needed=False,  # only a job with a memory needs it: prompt_memory.py notices
        )
        for module, name, around in (
            ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._load_checkpoint", begin_memory),
            ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._save_checkpoint", save_memory),
            ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", name_queued_prompts),
            ("verl.trainer.ppo.ray_trainer", "RayPPOTrainer._load_checkpoint", begin_memory),
            ("verl.trainer.ppo.ray_trainer", "RayPPOTrainer._save_checkpoint", save_memory),
            ("verl.trainer.ppo.ray_trainer", "compute_advantage", name_prompts),
        )
    ),
    Hook(
        "hydra._internal.config_loader_impl",
        "ConfigLoaderImpl._apply_overrides_to_config",
        name_the_group,
        why="algorithm.krpo.KEY without its config group says what to write",
        until="verl's config has a place for the settings of an estimator",
        needed=False,  # Hydra's own message is then what a user reads
    ),
    Hook(
        "verl.workers.rollout.base",
        "get_rollout_class",
        get_hf_rollout,
        why="actor_rollout_ref.rollout.name=hf",
        until="verl's registry of rollout classes has a register function",
        needed=False,  # verl itself says that there is no rollout hf
    ),
    Hook(
        "verl.workers.rollout.vllm_rollout.vllm_rollout",
        "ServerAdapter._execute_method",
        weight_sync.remember_the_answer,
        why="a weight update that vLLM fails to load is noticed",
        until="verl's weight transfer has a timeout",
        needed=False,  # it fails no job
    ),
    Hook(
        "verl.workers.rollout.vllm_rollout.bucketed_weight_transfer",
        "BucketedWeightSender._init_socket",
        weight_sync.watch_the_answer,
        why="a weight update that vLLM fails to load ends the job, which would stand still",
        until="verl's weight transfer has a timeout",
        needed=False,  # it fails no job
    ),
    Hook(
        "importlib.metadata",
        "version",
        vllm_cpu.answer_for_vllm,
        why="verl asks for the version of vllm where vllm-cpu is installed",
        until="verl accepts vllm-cpu",
        cpu=True,
    ),
    Hook(
        "torch.distributed",
        "init_process_group",
        accept_a_backend_twice,
        why="verl asks for the backend cpu:gloo,cpu:gloo, which torch refuses",
        until="verl names a backend once where the device is the CPU",
        cpu=True,
    ),
    Hook(
        "torch.distributed.fsdp",
        "CPUOffloadPolicy.__init__",
        never_pin_memory,
        why="verl asks for pinned memory, which only a GPU has",
        until="verl asks its platform whether memory can be pinned",
        cpu=True,
    ),
    Hook(
        "verl.utils.fsdp_utils",
        "fsdp2_sharded_save_to_cpu",
        save_copies,
        why="weights saved by .cpu() are the live ones on a CPU",
        until="verl copies what it saves",
        cpu=True,
    ),
)


def install() -> None:
    """Have every hook take hold when its module is imported, or now if it is."""
    for hook in HOOKS:
        if on_cpu() or not hook.cpu:
            wrapt.register_post_import_hook(hook.attach, hook.module)


def wrap(owner: Any, name: str, around: Callable) -> None:
    """Make owner.name(*args) call around(original, *args), once.

    Our own mark tells whether it is done. functools.wraps copies it: with a decorator of somebody else's over ours the
    function is still marked, and one below ours has no mark, so neither switches ours off nor doubles it.
    """
    original = getattr(owner, name)
    if marked(original):
        return

    @functools.wraps(original)
    def wrapped(*args, **kwargs):
        return around(original, *args, **kwargs)

    setattr(wrapped, MARK, True)
    static = isinstance(inspect.getattr_static(owner, name), staticmethod)
    setattr(owner, name, staticmethod(wrapped) if static else wrapped)


def marked(function: Any) -> bool:
    """Whether a function is, or decorates, one that `wrap` made."""
    return hasattr(function, MARK)
