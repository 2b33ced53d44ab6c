"""Reading the rollouts that verl writes with `trainer.rollout_data_dir`, a step at a time.

verl writes STEP.jsonl, a line a response: `input`, `output`, `gts`, `score`, `step`, and with the V1 trainer `uid`,
which is `{prompt}_{session}_{output}`. A session with several outputs counts once, by its final one. Without `uid`
(older trainers) responses are grouped by their prompt's text. `score` is the reward before any KL penalty.

A uid is new in every step. What lasts is `input`, the prompt's text: that of a session's first output.
"""

import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import orjson

from verl_krpo.plugin.sessions import final_outputs

EXAMPLES_KEPT = 5  # damaged lines that are named; all are counted


@dataclass
class Step:
    """One step's rewards (rows,) float64, prompt ids and names (rows,) object, in the order of the file.

    names: the same in every step in which a prompt comes; None where a row has no `input`.
    """

    number: int
    rewards: np.ndarray
    prompts: np.ndarray
    names: np.ndarray | None = None


@dataclass
class Reading:
    """What was met on the way: filled while `steps` is consumed."""

    lines: int = 0
    damaged: int = 0
    examples: list[str] = field(default_factory=list)
    by_text: bool = False  # at least one row had no uid

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


def steps(where: str | Path, reading: Reading, advance: Callable[[int], None] = lambda count: None) -> Iterator[Step]:
    """Steps in the order of the files; a step ends where `step` changes or the file does. `advance` gets the bytes.

    A line that is no JSON object with a finite number as `score` is counted and named in `reading`, and left out.
    """
    for path in files(where):
        number, rewards, keys, texts = None, [], [], []
        with open(path, "rb") as lines:
            for at, line in enumerate(lines, 1):
                advance(len(line))
                if not line.strip():
                    continue
                reading.lines += 1
                row = _row(line, path, at, reading)
                if row is None:
                    continue
                if row[0] != number:
                    if rewards:
                        yield _step(number, rewards, keys, texts)
                    number, rewards, keys, texts = row[0], [], [], []
                rewards.append(row[1])
                keys.append(row[2])
                texts.append(row[3])
        if rewards:
            yield _step(number, rewards, keys, texts)


def _row(line: bytes, path: Path, at: int, reading: Reading) -> tuple | None:
    try:
        row = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        return reading.skip(path, at, f"no JSON ({error})")
    score = row.get("score") if isinstance(row, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        return reading.skip(path, at, f"score is {score!r}, not a finite number")
    step = row.get("step")
    if step is None and path.stem.isdigit():
        step = int(path.stem)
    if not isinstance(step, int):
        return reading.skip(path, at, f"step is {step!r}, not a whole number")
    key, text = row.get("uid"), row.get("input")
    text = hashlib.blake2b(text.encode(), digest_size=12).hexdigest() if isinstance(text, str) else None
    if isinstance(key, str) and key:
        # verl fills batches up with rows that answer nothing: pad{hex}_{i}_0, where a prompt has {hex}_{i}_{output}.
        return None if key.startswith("pad") else (step, float(score), key, text)
    if text is None:
        return reading.skip(path, at, "neither uid nor input says which prompt this answers")
    reading.by_text = True
    return step, float(score), None, text


def _step(number: int, rewards: list, keys: list, texts: list) -> Step:
    if all(key is not None and key.count("_") >= 2 for key in keys):
        rows, _ = final_outputs(keys)
        begun = {key.rpartition("_")[0]: text for key, text in zip(keys, texts, strict=True) if key.endswith("_0")}
        texts = [begun.get(keys[row].rpartition("_")[0], texts[row]) for row in rows]
        rewards, keys = [rewards[row] for row in rows], [keys[row].rsplit("_", 2)[0] for row in rows]
    labels = [key if key is not None else text for key, text in zip(keys, texts, strict=True)]
    names = None if None in texts else np.array(texts, dtype=object)
    return Step(number, np.array(rewards, dtype=np.float64), np.array(labels, dtype=object), names)
