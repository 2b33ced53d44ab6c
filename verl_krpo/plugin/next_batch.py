"""What the V1 trainer rolls out next: verl_krpo/choice.py in a run of verl's.

The trainer takes the prompts of a step from its dataloader in `_next_train_batch`. hooks.py lets `next_batch` ask there
for `select_from` times as many, and hand on those that are chosen. The others come again in a later epoch. How many
responses a prompt gets is told to verl's agent loops as `__rollout_n__`, for which they look (agent_loop_tq.py). What a
prompt's advantages are multiplied by travels in its rows, which the asynchronous trainers save in their checkpoints:

    weight    objective=same: count / (pool pi);  allocate=signal: n / n_i;  both: their product;  else 1

All draws follow from data.seed, the step, and how many batches were fetched in it before.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from verl_krpo import choice
from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.config import Choice, MemoryConfig, Objective
from verl_krpo.hook import marked
from verl_krpo.plugin import metrics, prompt_memory

RESPONSES = "__rollout_n__"


class Chosen(NamedTuple):
    """The prompts taken, (count,): places among the candidates, weights, numbers of responses; and what is logged."""

    rows: np.ndarray
    weights: np.ndarray
    responses: np.ndarray
    metrics: dict[str, float]


def next_batch(fetch: Callable, trainer: Any, num_prompts: int | None = None) -> Any:
    """The trainer's next `num_prompts` prompts, chosen as its job says, with their weights and numbers of responses."""
    settings = prompt_memory.settings(trainer.config)
    if settings is None or not settings.chooses:
        return fetch(trainer, num_prompts)
    from verl.utils import tensordict_utils as tu

    run, config = prompt_memory.run(), trainer.config
    count = config.data.train_batch_size if num_prompts is None else num_prompts
    batch = fetch(trainer, count * (settings.select_from if settings.select == Choice.signal else 1))
    names = prompt_memory.names(batch)
    if settings.select == Choice.signal:
        # An epoch that ends among the candidates may bring a prompt twice.
        batch = tu.index_select_tensor_dict(batch, np.sort(np.unique(names, return_index=True)[1]).tolist())
        names = list(dict.fromkeys(names))
    rng = np.random.default_rng([config.data.get("seed") or 0, run.step, run.count_fetch()])
    chosen = choose(run.memory, names, run.step, settings, count, config.actor_rollout_ref.rollout.n, rng)
    metrics.note(chosen.metrics)
    batch = tu.index_select_tensor_dict(batch, chosen.rows.tolist())
    tu.assign_non_tensor_stack(batch, prompt_memory.WEIGHT, chosen.weights.tolist())
    if settings.allocate == Choice.signal:
        tu.assign_non_tensor_stack(batch, RESPONSES, chosen.responses.tolist())
        run.responses = dict(zip(batch["uid"], chosen.responses.tolist(), strict=True))
    return batch


def choose(
    memory: PromptMemory,
    names: Sequence[str],
    step: int,
    settings: MemoryConfig,
    count: int,
    responses: int,
    rng: np.random.Generator,
) -> Chosen:
    """`count` of the candidates `names`, with `responses` each on average, as `settings` say."""
    forecast = memory.forecast(names, step, settings.memory_var)
    signals = choice.expected(*forecast)
    noted = {"krpo/candidates_new": 1 - memory.recall(names, step).known.double().mean().item()}
    rows, weights, given = np.arange(len(names)), np.ones(count), np.full(count, responses)
    selects, same = settings.select == Choice.signal, settings.objective == Objective.same
    if selects and same:
        rows, weights = choice.include(signals, count, rng)
        noted["krpo/effective_prompts"] = choice.effective_size(weights)
    elif selects:
        rows = choice.choose(choice.draw(*forecast, rng), count, rng)
    if settings.allocate == Choice.signal:
        given = choice.allocate(signals[rows], responses * count)
    if (taken := signals[rows]).any():
        var = (weights**2 * taken).sum()  # of the gradient, with `responses` a prompt
        needed = (weights**2 * taken * responses / given).sum() / var
        if selects:
            needed *= var / count / signals.mean() if same else signals.mean() / taken.mean()
        noted["krpo/rollouts_saved"] = float(1 - needed)
    return Chosen(rows, weights * responses / given, given, noted)


def begin(trainer: Any) -> None:
    """After a trainer has loaded its checkpoint. ValueError or RuntimeError where it could not choose."""
    settings = prompt_memory.settings(trainer.config)
    if settings is None or not settings.chooses:
        return
    if not marked(getattr(type(trainer), "_next_train_batch", None)):
        raise RuntimeError(
            f"algorithm.krpo_memory.{settings.chooses}=signal: {type(trainer).__name__} has a way of its own to fetch "
            f"prompts. Use verl 0.9.1's V1 trainer, or {settings.chooses}=none"
        )
    batch_size = trainer.config.data.train_batch_size
    if wrong := unfit(settings, len(trainer.train_dataset), batch_size, trainer.total_training_steps):
        raise ValueError(wrong)


def check_responses(trainer: Any, keys: Sequence[str]) -> None:
    """RuntimeError where verl made more responses of a prompt than it was told to. keys: `{uid}_{session}_{output}`."""
    if not prompt_memory.remembers(trainer.config):
        return
    made: dict[str, set[str]] = {}
    for key in keys:
        uid, session, _ = key.rsplit("_", 2)
        made.setdefault(uid, set()).add(session)
    for uid, count in prompt_memory.run().responses.items():
        if (sessions := len(made.get(uid, ()))) > count:
            raise RuntimeError(
                f"algorithm.krpo_memory.allocate=signal gave a prompt {count} responses, and verl made {sessions}: its "
                f"agent loops do not look for {RESPONSES} as those of verl 0.9.1 do. Use that, or allocate=none"
            )


def unfit(settings: MemoryConfig, prompts: int, batch_size: int, steps: int) -> str | None:
    """Why a job of so many steps over so many prompts has nothing to choose, None where it has."""
    asked = f"algorithm.krpo_memory.{settings.chooses}=signal"
    candidates = batch_size * (settings.select_from if settings.select == Choice.signal else 1)
    if candidates > prompts:
        return (
            f"{asked} takes a step's {batch_size} prompts from {candidates} candidates, more than the data's {prompts} "
            "prompts: lower select_from or data.train_batch_size, or give more data"
        )
    if candidates * steps <= prompts:
        return (
            f"{asked} chooses by what earlier visits earned, and none of the data's {prompts} prompts comes twice in "
            f"{steps} steps of {candidates} candidates: train longer, raise select_from, or {settings.chooses}=none"
        )
    return None
