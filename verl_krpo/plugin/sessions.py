"""Agent loops with several outputs a session: a session counts once in its group, by its final output.

verl's V1 trainer keys every output `{uid}_{session}_{output}`, copies a session's reward to all of its outputs, and
lets the final one stand for the session, for `grpo` alone: other estimators get every output as a group member. The
function that decides it is bound by name in the trainer's module, which takes seconds to import; so it is replaced
when the trainer opens its log, before its first step and in its own process.
"""

import functools
import inspect
import sys

import torch

PACKAGE = "verl.trainer.ppo.v1"
TRAINER = "verl.trainer.ppo.v1.trainer_base"
FUNCTION = "compute_advantage_for_multi_trajectories"
KNOWN_PARAMETERS = {
    "data", "batch_keys", "adv_estimator", "gamma", "lam", "num_repeat", "norm_adv_by_std_in_grpo", "config",
}  # fmt: skip


def final_outputs(keys: list[str]) -> tuple[list[int], list[int]]:
    """Rows of the sessions' final outputs, and for every row its session's position among them.

    keys: `{uid}_{session}_{output}`, one a row. ValueError for a key of another form.
    """
    final: dict[str, tuple[int, int]] = {}
    sessions = []
    for row, key in enumerate(keys):
        session, _, output = key.rpartition("_")
        if "_" not in session or not output.isdigit():
            raise ValueError(f"krpo expects verl's keys uid_session_output, row {row} has {key!r}")
        sessions.append(session)
        final[session] = max(final.get(session, (-1, row)), (int(output), row))
    positions = {session: position for position, session in enumerate(final)}
    return [row for _, row in final.values()], [positions[session] for session in sessions]


def count_sessions_once(compute):
    """verl's `compute_advantage_for_multi_trajectories` with its rule for `grpo` applied to `krpo`.

    A session whose final output has an empty mask has advantage 0.
    """
    changed = set(inspect.signature(compute).parameters) ^ KNOWN_PARAMETERS
    if changed:
        raise RuntimeError(
            f"{TRAINER}.{FUNCTION} is not the one that krpo knows how to extend (verl 0.9.1): its parameters differ in "
            f"{sorted(changed)}. Use verl 0.9.1, or a newer verl-krpo"
        )

    @functools.wraps(compute)
    def compute_with_krpo(data, batch_keys, adv_estimator, **kwargs):
        if adv_estimator != "krpo":
            return compute(data, batch_keys=batch_keys, adv_estimator=adv_estimator, **kwargs)
        rows, session_of_row = final_outputs(batch_keys)
        if len(rows) == len(batch_keys):
            return compute(data, batch_keys=batch_keys, adv_estimator=adv_estimator, **kwargs)
        # With one output a session verl's own path does the rest: the estimator on all rows it is given.
        final = compute(
            data.select_idxs(rows), batch_keys=[batch_keys[row] for row in rows], adv_estimator=adv_estimator, **kwargs
        )
        first_token = (final.batch["response_mask"] != 0).int().argmax(dim=1)
        session_advantage = final.batch["advantages"][torch.arange(len(rows)), first_token]
        advantages = session_advantage[session_of_row].unsqueeze(-1) * data.batch["response_mask"]
        data.batch["advantages"] = data.batch["returns"] = advantages
        return data

    return compute_with_krpo


def attach() -> None:
    """Have verl's V1 trainer count sessions once for `krpo`, from the opening of its log on.

    RuntimeError there, if the job uses krpo and this verl's trainer does it otherwise. Calling it again changes
    nothing.
    """
    from verl.utils.tracking import Tracking

    init = Tracking.__init__
    if hasattr(init, "__wrapped__"):
        return

    @functools.wraps(init)
    def open_log(self, *args, **kwargs):
        config = inspect.signature(init).bind(self, *args, **kwargs).arguments.get("config") or {}
        if config.get("algorithm", {}).get("adv_estimator") == "krpo" and PACKAGE in sys.modules:
            _extend(sys.modules.get(TRAINER))
        return init(self, *args, **kwargs)

    Tracking.__init__ = open_log


def _extend(trainer) -> None:
    compute = getattr(trainer, FUNCTION, None)
    user = getattr(getattr(trainer, "PPOTrainer", None), "_compute_advantage", None)
    if compute is None or FUNCTION not in getattr(getattr(user, "__code__", None), "co_names", ()):
        raise RuntimeError(
            f"{TRAINER}.PPOTrainer._compute_advantage does not call {FUNCTION}, which krpo extends so that a session "
            "counts once (verl 0.9.1 does). Use verl 0.9.1, or a newer verl-krpo"
        )
    if not hasattr(compute, "__wrapped__"):
        setattr(trainer, FUNCTION, count_sessions_once(compute))
