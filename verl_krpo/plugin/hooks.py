"""Everything that krpo and kpo change in verl at run time: what, why, and from which verl on it can go.

Registries and config groups, verl's own doors, are in `plugin/__init__.py`. Here is what has no door.
`verl-krpo doctor` prints this list, and that of backends/hooks.py.
"""

import sys
from collections.abc import Callable
from typing import Any

from verl_krpo.backends import hooks as backend_hooks
from verl_krpo.backends import on_cpu
from verl_krpo.hook import Hook


def check_job(validate_config: Callable, config: Any, *args: Any, **kwargs: Any) -> Any:
    """What verl's mains call on the driver, before Ray starts: prepare a CPU job, refuse a wrong one."""
    from omegaconf import OmegaConf

    from verl_krpo import versions
    from verl_krpo.advantage import ESTIMATORS
    from verl_krpo.backends import weight_sync
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
    loss = OmegaConf.select(config, "actor_rollout_ref.actor.policy_loss.loss_mode")
    if on_cpu() or config.algorithm.adv_estimator in ESTIMATORS or loss == "kpo":
        weight_sync.watch(config)
    return validate_config(config, *args, **kwargs)


def log_metrics(log: Callable, tracking: Any, data: dict, *args: Any, **kwargs: Any) -> Any:
    """The trainer's log of a step, with the krpo/* scalars of that step."""
    from verl_krpo.plugin import metrics

    return log(tracking, {**data, **metrics.drain()}, *args, **kwargs)


def count_sessions_once(compute: Callable, *args: Any, **kwargs: Any) -> Any:
    """A session of an agent loop counts once in its group, for `krpo` as for verl's `grpo`."""
    from verl_krpo.plugin import sessions

    return sessions.compute_advantage(compute, *args, **kwargs)


def begin(load_checkpoint: Callable, trainer: Any) -> Any:
    """A trainer that resumes remembers its prompts; how its loss adds tokens up is known."""
    from verl_krpo.plugin import next_batch, prompt_memory, scores

    loaded = load_checkpoint(trainer)
    scores.begin(trainer.config)
    prompt_memory.begin(trainer)
    next_batch.begin(trainer)
    return loaded


def save_memory(save_checkpoint: Callable, trainer: Any) -> Any:
    """A checkpoint holds the memory of the prompts."""
    from verl_krpo.plugin import prompt_memory

    prompt_memory.save(trainer)
    return save_checkpoint(trainer)


def name_queued_prompts(compute_advantage: Callable, trainer: Any, batch: Any, *args: Any, **kwargs: Any) -> Any:
    """The V1 trainer's rows, in its queue, know their prompts."""
    from verl_krpo.plugin import next_batch, prompt_memory

    next_batch.check_responses(trainer, batch.keys)
    prompt_memory.read_queue(trainer, batch)
    return compute_advantage(trainer, batch, *args, **kwargs)


def choose_prompts(fetch: Callable, trainer: Any, num_prompts: int | None = None) -> Any:
    """The prompts that a memory expects to teach most are rolled out, with more responses."""
    from verl_krpo.plugin import next_batch

    return next_batch.next_batch(fetch, trainer, num_prompts)


def read_batch(compute_advantage: Callable, data: Any, *args: Any, **kwargs: Any) -> Any:
    """The estimator finds the log-probs of the batch, and the legacy trainer's rows know their prompts."""
    from verl_krpo.plugin import prompt_memory, scores

    prompt_memory.read_batch(data)
    with scores.reading(data):
        return compute_advantage(data, *args, **kwargs)


def refuse_keys_without_group(apply: Callable, overrides: list, config: Any) -> Any:
    """What to write, in place of Hydra's "Key 'krpo' is not in struct"."""
    from verl_krpo.plugin import guards

    guards.check_overrides(overrides, config)
    return apply(overrides, config)


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
    Hook(
        "verl.trainer.ppo.ray_trainer",
        "compute_advantage",
        read_batch,
        why="score weights know the log-probs, and the legacy trainer's memory the prompts",
        until="verl passes the batch to estimators",
        needed=False,  # an estimator with weights or a memory notices
    ),
    *(
        Hook(
            module,
            name,
            around,
            why="a memory knows a prompt in another epoch and lasts as long as the checkpoints; weights fit the loss",
            until="verl tells estimators which prompt a row answers, and lets plugins save and load",
            needed=False,  # an estimator with weights or a memory notices
        )
        for module, name, around in (
            ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._load_checkpoint", begin),
            ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._save_checkpoint", save_memory),
            ("verl.trainer.ppo.v1.trainer_base", "PPOTrainer._compute_advantage", name_queued_prompts),
            ("verl.trainer.ppo.ray_trainer", "RayPPOTrainer._load_checkpoint", begin),
            ("verl.trainer.ppo.ray_trainer", "RayPPOTrainer._save_checkpoint", save_memory),
        )
    ),
    Hook(
        "verl.trainer.ppo.v1.trainer_base",
        "PPOTrainer._next_train_batch",
        choose_prompts,
        why="a memory chooses the prompts of a step and their numbers of responses",
        until="verl lets plugins choose the prompts of a step",
        needed=False,  # a job that chooses notices: next_batch.begin
    ),
    Hook(
        "hydra._internal.config_loader_impl",
        "ConfigLoaderImpl._apply_overrides_to_config",
        refuse_keys_without_group,
        why="algorithm.krpo.KEY without its config group says what to write",
        until="verl's config has a place for the settings of an estimator",
        needed=False,  # Hydra's own message is then what a user reads
    ),
)


def install() -> None:
    """Have every hook of ours and of the backends take hold when its module is imported."""
    for hook in (*HOOKS, *backend_hooks.HOOKS):
        if on_cpu() or not hook.cpu:
            hook.install()
