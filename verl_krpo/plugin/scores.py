"""What the responses of the batch at hand weigh, from log-probs that trainers have and do not hand to estimators.

verl's `compute_advantage`, which all of its trainers call, holds `old_log_probs` (in bypass mode those of the rollout);
hooks.py lays its batch here while it runs. How the loss adds tokens up is in the job's config.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from verl_krpo.advantage.weights import length_weights, score_weights
from verl_krpo.config import Weight

KEY = "krpo_{}_weights"  # in a batch whose rows stand for whole sessions
_batch: Any = None
_loss_agg_mode: str | None = None

Weights = dict[Weight, torch.Tensor]  # word -> (rows,)


def begin(config: Any) -> None:
    """A trainer starts, whose job has this config."""
    global _loss_agg_mode
    _loss_agg_mode = config.actor_rollout_ref.actor.loss_agg_mode


@contextmanager
def reading(data: Any) -> Iterator[None]:
    """While advantages are computed from `data` (verl's DataProto)."""
    global _batch
    before, _batch = _batch, data
    try:
        yield
    finally:
        _batch = before


def at_hand() -> Weights:
    """Of the batch that is being read; empty where there is none."""
    return {} if _batch is None else of(_batch)


def of(data: Any) -> Weights:
    """Of the rows of `data`, or of their sessions; without a trainer none, without log-probs the lengths alone."""
    if stored := {word: data.batch[KEY.format(word.value)] for word in Weight if KEY.format(word.value) in data.batch}:
        return stored
    if _loss_agg_mode is None:
        return {}
    mask = data.batch["response_mask"]
    found = {Weight.length: length_weights(mask, _loss_agg_mode)}
    if "old_log_probs" in data.batch:
        found[Weight.score] = score_weights(data.batch["old_log_probs"], mask, _loss_agg_mode)
    return found


def add_up(data: Any, final: Any, session_of_row: list[int]) -> None:
    """Let every row of `final`, the last of a session of `data`, weigh as much as all outputs of the session.

    All of them get the session's advantage, so its score is their sum, and they are as good as independent.
    """
    for word, weights in of(data).items():
        session = torch.tensor(session_of_row, device=weights.device)
        final.batch[KEY.format(word.value)] = weights.new_zeros(len(final)).index_add(0, session, weights)


def chosen(name: str, word: Weight, found: Weights) -> torch.Tensor | None:
    """The weights that `algorithm.<name>.weight` asks for. RuntimeError where they are not at hand."""
    if word == Weight.none:
        return None
    if word not in found:
        missing = "its loss_agg_mode" if _loss_agg_mode is None else "old_log_probs beside the rewards"
        raise RuntimeError(
            f"algorithm.{name}.weight={word.value} needs {missing} from verl's trainer, which has none here. Use verl "
            f"0.9.1's V1 trainer or its legacy one, or algorithm.{name}.weight=none"
        )
    return found[word]
