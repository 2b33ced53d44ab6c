"""Reading recorded rollouts, a step at a time: what verl writes with `trainer.rollout_data_dir`, and neutral lines.

verl writes STEP.jsonl, a line a response: `input`, `output`, `gts`, `score`, `step`, and with the V1 trainer `uid`,
which is `{prompt}_{session}_{output}`. A session with several outputs counts once, by its final one. Without `uid`
(older trainers) responses are grouped by their prompt's text. `score` is the reward before any KL penalty.

A uid is new in every step. What lasts is `input`, the prompt's text: that of a session's first output.

A neutral line, of any trainer, is a prompt's visit: {"prompt_id": "a", "step": 3, "rewards": [0, 1]}. Its id lasts.

What a response weighs, the square of its score, may stand beside either: `score_weights` in a neutral line, one a
reward; `score_weight` in a response's line; or `log_probs` (or `rollout_log_probs`) there, those of its own tokens,
which have the length too. All outputs of a session get its advantage, so their weights add up. The first response says
whether a run has weights; if so, a later one without is damaged.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import orjson
import torch

from verl_krpo.advantage.weights import length_weights, score_weights
from verl_krpo.config import Weight
from verl_krpo.plugin.sessions import final_outputs

EXAMPLES_KEPT = 5  # damaged lines that are named; all are counted
LOG_PROBS = ("log_probs", "rollout_log_probs")
NO_WEIGHTS: dict[Weight, float] = {}


@dataclass
class Step:
    """One step's rewards (rows,) float64, prompt ids and names (rows,) object, in the order of the file.

    names: the same in every step in which a prompt comes; None where a row has no `input`.
    weights: (rows,) float64 by kind, for all steps of a run or for none.
    """

    number: int
    rewards: np.ndarray
    prompts: np.ndarray
    names: np.ndarray | None = None
    weights: dict[Weight, np.ndarray] = field(default_factory=dict)


class Response(NamedTuple):
    """A reward: `key` is verl's uid or None, `name` what lasts of its prompt or None."""

    step: int
    reward: float
    key: str | None
    name: str | None
    weights: dict[Weight, float] = NO_WEIGHTS


@dataclass
class Reading:
    """What was met on the way: filled while `steps` is consumed."""

    lines: int = 0
    damaged: int = 0
    examples: list[str] = field(default_factory=list)
    by_text: bool = False  # at least one of verl's rows had no uid
    kinds: tuple[Weight, ...] | None = None  # of the weights that every response has

    def skip(self, path: Path, line: int, why: str) -> None:
        self.damaged += 1
        if len(self.examples) < EXAMPLES_KEPT:
            self.examples.append(f"{path}:{line}: {why}")


def files(where: str | Path) -> list[Path]:
    """The JSONL files of a folder by step, or the file itself. FileNotFoundError where there is none."""
    where = Path(where)
    if where.is_file():
        return [where]
    dumps = sorted(where.glob("*.jsonl"), key=lambda path: (not path.stem.isdigit(), path.stem.zfill(20)))
    if not dumps:
        raise FileNotFoundError(
            f"no rollouts at {where}: give the folder that trainer.rollout_data_dir named, or one of its .jsonl files"
        )
    return dumps


def steps(where: str | Path, reading: Reading, advance: Callable[[int], object] = lambda count: None) -> Iterator[Step]:
    """Steps in the order of the files; a step ends where `step` changes or the file does. `advance` gets the bytes.

    A line that is none of the above, or has a number that is not finite, is counted and named in `reading`, and left
    out.
    """
    for path in files(where):
        responses: list[Response] = []
        with open(path, "rb") as lines:
            for at, line in enumerate(lines, 1):
                advance(len(line))
                if not line.strip():
                    continue
                reading.lines += 1
                try:
                    found = _responses(line, path, reading)
                except Damaged as why:
                    reading.skip(path, at, str(why))
                    continue
                if found and responses and found[0].step != responses[0].step:
                    yield _step(responses, reading)
                    responses = []
                responses += found
        if responses:
            yield _step(responses, reading)


class Damaged(ValueError):
    """A line that holds no rollouts, and why."""


def _responses(line: bytes, path: Path, reading: Reading) -> list[Response]:
    """Those of a line; none where it only fills up a batch."""
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise Damaged(f"no JSON ({error})") from error
    if not isinstance(row, dict):
        raise Damaged(f"{type(row).__name__}, not an object")
    step = row.get("step")
    if step is None and path.stem.isdigit():
        step = int(path.stem)
    if not isinstance(step, int):
        raise Damaged(f"step is {step!r}, not a whole number")
    found = _neutral(row, step) if "rewards" in row else _verls(row, step, reading)
    if found:
        kinds = found[0].weights
        reading.kinds = tuple(kinds) if reading.kinds is None else reading.kinds
        if not set(reading.kinds) <= set(kinds):
            raise Damaged("no log-probs or score weights here, which the lines before have")
    return found


def _neutral(row: dict, step: int) -> list[Response]:
    """A prompt's visit."""
    prompt, rewards, weights = row.get("prompt_id"), row["rewards"], row.get("score_weights")
    if not isinstance(prompt, str | int) or isinstance(prompt, bool):
        raise Damaged(f"prompt_id is {prompt!r}, neither text nor a whole number")
    for name, values in ("rewards", rewards), ("score_weights", weights):
        if values is not None and not (isinstance(values, list) and values and all(map(_finite, values))):
            raise Damaged(f"{name} is {values!r}, not a list of finite numbers")
    if weights and (len(weights) != len(rewards) or min(weights) < 0):
        raise Damaged(f"score_weights is {weights!r}: {len(rewards)} numbers >= 0, one a reward")
    found = [{Weight.score: float(weight)} for weight in weights] if weights else [NO_WEIGHTS] * len(rewards)
    return [Response(step, float(reward), None, str(prompt), own) for reward, own in zip(rewards, found, strict=True)]


def _verls(row: dict, step: int, reading: Reading) -> list[Response]:
    score, key, text = row.get("score"), row.get("uid"), row.get("input")
    if not _finite(score):
        raise Damaged(f"score is {score!r}, not a finite number")
    weights = _weights(row)
    name = hashlib.blake2b(text.encode(), digest_size=12).hexdigest() if isinstance(text, str) else None
    if isinstance(key, str) and key:
        # verl fills batches up with rows that answer nothing: pad{hex}_{i}_0, where a prompt has {hex}_{i}_{output}.
        return [] if key.startswith("pad") else [Response(step, float(score), key, name, weights)]
    if name is None:
        raise Damaged("neither uid nor input says which prompt this answers")
    reading.by_text = True
    return [Response(step, float(score), None, name, weights)]


def _weights(row: dict) -> dict[Weight, float]:
    """The weights of a response by kind."""
    if (weight := row.get("score_weight")) is not None:
        if not _finite(weight) or weight < 0:
            raise Damaged(f"score_weight is {weight!r}, not a finite number >= 0")
        return {Weight.score: float(weight)}
    name = next((name for name in LOG_PROBS if row.get(name) is not None), None)
    if name is None:
        return NO_WEIGHTS
    if not isinstance(row[name], list) or not all(map(_finite, row[name])):
        raise Damaged(f"{name} is not a list of finite numbers")
    log_prob = torch.tensor([row[name]], dtype=torch.float64)
    mask = torch.ones_like(log_prob, dtype=torch.bool)
    return {Weight.score: score_weights(log_prob, mask).item(), Weight.length: length_weights(mask).item()}


def _finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _step(responses: list[Response], reading: Reading) -> Step:
    _, rewards, keys, names, found = map(list, zip(*responses, strict=True))
    weights = {kind: np.array([weights[kind] for weights in found]) for kind in reading.kinds or ()}
    if all(key is not None and key.count("_") >= 2 for key in keys):
        rows, sessions = final_outputs(keys)
        begun = {key.rpartition("_")[0]: name for key, name in zip(keys, names, strict=True) if key.endswith("_0")}
        names = [begun.get(keys[row].rpartition("_")[0], names[row]) for row in rows]
        rewards, keys = [rewards[row] for row in rows], [keys[row].rsplit("_", 2)[0] for row in rows]
        weights = {kind: np.bincount(sessions, weights=values) for kind, values in weights.items()}
    labels = [key if key is not None else name for key, name in zip(keys, names, strict=True)]
    lasting = None if None in names else np.array(names, dtype=object)
    return Step(responses[0].step, np.array(rewards), np.array(labels, dtype=object), lasting, weights)


def record(path: str | Path, step: int, prompts: Sequence, rewards: Sequence[float]) -> None:
    """Append the visits of a step to a file of neutral lines. prompts, rewards: (rows,), in any order."""
    visits: dict[str, list[float]] = {}
    for prompt, reward in zip(prompts, rewards, strict=True):
        visits.setdefault(str(prompt), []).append(float(reward))
    with open(path, "ab") as file:
        for prompt, own in visits.items():
            file.write(orjson.dumps({"prompt_id": prompt, "step": step, "rewards": own}) + b"\n")
