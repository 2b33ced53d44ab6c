"""Agent loops with several outputs a session: a session counts once in its group, by its final output.

verl's V1 trainer keys every output `{uid}_{session}_{output}`, copies a session's reward to all of its outputs, and
lets the final one stand for the session, for `grpo` alone: other estimators get every output as a group member. The
function of the trainer's module that decides it is extended to `krpo` (hooks.py).
"""

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from verl_krpo.advantage import ESTIMATORS
from verl_krpo.hook import marked
from verl_krpo.plugin import scores

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


def compute_advantage(compute: Callable, *args: Any, **kwargs: Any) -> Any:
    """verl's `compute_advantage_for_multi_trajectories` with its rule for `grpo` applied to our estimators.

    A session whose final output has an empty mask has advantage 0.
    """
    signature = inspect.signature(compute)
    given = signature.bind(*args, **kwargs).arguments
    if given.get("adv_estimator") not in ESTIMATORS:
        return compute(*args, **kwargs)
    changed = set(signature.parameters) ^ KNOWN_PARAMETERS
    if changed:
        raise RuntimeError(
            f"{TRAINER}.{FUNCTION} is not the one that krpo knows how to extend (verl 0.9.1): its parameters differ in "
            f"{sorted(changed)}. Use verl 0.9.1, or a newer verl-krpo"
        )
    data, keys = given["data"], given["batch_keys"]
    rows, session_of_row = final_outputs(keys)
    if len(rows) == len(keys):
        return compute(*args, **kwargs)
    # With one output a session verl's own path does the rest: the estimator on all rows it is given.
    final = data.select_idxs(rows)
    scores.add_up(data, final, session_of_row)
    final = compute(**given | dict(data=final, batch_keys=[keys[row] for row in rows]))
    first_token = (final.batch["response_mask"] != 0).int().argmax(dim=1)
    session_advantage = final.batch["advantages"][torch.arange(len(rows)), first_token]
    advantages = session_advantage[session_of_row].unsqueeze(-1) * data.batch["response_mask"]
    data.batch["advantages"] = data.batch["returns"] = advantages
    return data


def check_trainer() -> None:
    """RuntimeError where verl's V1 trainer is there and would count a session more than once for `krpo`."""
    if PACKAGE not in sys.modules:  # an older verl, or its v0 trainer
        return
    trainer = sys.modules.get(TRAINER)
    user = getattr(getattr(trainer, "PPOTrainer", None), "_compute_advantage", None)
    called = FUNCTION in getattr(inspect.unwrap(user).__code__, "co_names", ()) if user else False
    if not (called and marked(getattr(trainer, FUNCTION, None))):
        raise RuntimeError(
            f"{TRAINER}.PPOTrainer._compute_advantage does not call {FUNCTION}, which krpo extends so that a session "
            "counts once (verl 0.9.1 does). Use verl 0.9.1, or a newer verl-krpo"
        )
