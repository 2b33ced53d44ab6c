"""A pretrained model in the laboratory: a transformers folder and problems as verl's parquet has them.

    python scripts/pretrained_cpu.py FOLDER    FOLDER/model: SmolLM2-135M, no hub needed
                                               FOLDER/long_sums and so on: train.parquet and test.parquet of a task

Its last LAYERS layers learn, the others run without gradient. An answer is right if the reward for mathematics says so.
No response is longer than the longest right one. What is computed, as in loop.py, is the probability of the one text
that a row's extra_info.solution gives, end token included; what is measured, before the first step and after every
condition.every:

    accuracy, pass8, greedy, entropy    of loop.look, on at most HELD_OUT rows of test.parquet
    other      share of sampled responses that are right in another text, which the accuracy leaves out
    variance   tr Var g of the method's gradient, and variance_rloo of RLOO's, by two batches from train.parquet that no
               step sees: half of |g_a - g_b|^2. Of krpo_adaptive that is its gradient without the scale

Of the problems those count whose prompts have the length that most have, as batches are not padded.
"""

import collections
import functools
import itertools
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from verl_krpo.lab.train import gradient, loop, results, study
from verl_krpo.lab.train.conditions import Condition
from verl_krpo.lab.train.methods import METHODS, Batch
from verl_krpo.lab.train.tasks import Problem, Task
from verl_krpo.report import tables
from verl_krpo.reward.math import compute_score

LAYERS = 8
HELD_OUT = 64  # questions

CONDITIONS = {
    name: Condition(name, 8, 4, name, learning_rate=3e-5, steps=24, every=8) for name in ("long_sums", "long_products")
}


def prepare(task: Path) -> None:
    """FileNotFoundError where FOLDER/TASK or FOLDER/model is missing."""
    for path in (task / "train.parquet", task / "test.parquet", task.parent / "model" / "config.json"):
        if not path.exists():
            raise FileNotFoundError(f"{path} is missing: `python scripts/pretrained_cpu.py {task.parent}` makes it")


@functools.cache
def load(task: Path) -> loop.Start:
    """FOLDER/TASK and the model beside it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    prepare(task)
    tokenizer = AutoTokenizer.from_pretrained(task.parent / "model")
    model = AutoModelForCausalLM.from_pretrained(task.parent / "model", dtype=torch.float32).eval()
    model.requires_grad_(False)
    for part in (*model.model.layers[-LAYERS:], model.model.norm):
        part.requires_grad_(True)
    train, test = (problems(task / f"{split}.parquet", tokenizer) for split in ("train", "test"))
    ((length, _),) = collections.Counter(train.values()).most_common(1)
    splits = [[problem for problem, tokens in split.items() if tokens == length] for split in (train, test)]
    if not splits[1]:
        raise ValueError(f"{task / 'test.parquet'} has no prompt of {length} tokens, which most in train.parquet have")

    def draw(rng: random.Random, count: int, held_out: bool = False) -> list[Problem]:
        return rng.sample(splits[held_out], count)

    def response(answer: str) -> str:
        return answer + tokenizer.eos_token

    longest = max(
        len(tokenizer(response(problem.answer), add_special_tokens=False)["input_ids"])
        for split in splits
        for problem in split
    )
    made = Task(draw, response, _reward, prepare, task.name, longest)
    first = loop.Start(made, model, tokenizer, ())
    return first._replace(held_out=first.right(draw(random.Random(0), min(HELD_OUT, len(splits[1])), True)))


def problems(path: Path, tokenizer: Any) -> dict[Problem, int]:
    """The rows of a parquet, and how many tokens their prompts have."""
    import pandas as pd

    found = {}
    for number, row in enumerate(pd.read_parquet(path).to_dict("records")):
        if not (answer := row["extra_info"].get("solution")):
            raise ValueError(f"{path}, row {number}: no extra_info.solution, the right answer as it is to be written")
        turns = [dict(turn) for turn in row["prompt"]]
        question = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        tokens = tokenizer(question, add_special_tokens=False)["input_ids"]
        found[Problem(question, answer)] = len(tokens)
    return found


def _reward(text: str, answer: str) -> float:
    return compute_score("", text, answer)["score"]


def asked(first: loop.Start, condition: Condition, number: int) -> list[Problem]:
    return first.task.draw(random.Random(number), condition.prompts, False)


def batch(first: loop.Start, model: torch.nn.Module, condition: Condition, number: int) -> Batch:
    """Of the model as it is; the same number asks the same and has the same random numbers."""
    generator = torch.Generator().manual_seed(number)
    return loop.roll(first, model, condition, asked(first, condition, number), number, generator)


def learning(model: torch.nn.Module) -> list[Tensor]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def subject(task: Path, prompts: int = 8, size: int = 4) -> gradient.Subject:
    """For `gradient.run`."""
    first, condition = load(task), Condition(task.name, prompts, size)
    accuracy = loop.look(first.model, first.held_out)["accuracy"]
    draw = functools.partial(batch, first, first.model, condition)
    return gradient.Subject(f"{task.name}_{prompts}x{size}", accuracy, first.model, learning(first.model), draw)


def run(folder: Path, condition: str, method: str, seed: int) -> dict:
    """Train on FOLDER/TASK under a condition and a method of these names; the run's line of the CSV, see loop.line."""
    settings = CONDITIONS[condition]
    first, looks = load(folder / settings.task), itertools.count()

    def measure(model: torch.nn.Module) -> dict[str, float]:
        number = (gradient.SEED + seed) * 100_003 + 2 * next(looks)
        batches = [batch(first, model, settings, number + k) for k in range(2)]
        elsewhere = {"other": float(np.mean([other(first, settings, part) for part in batches]))}
        return loop.look(model, first.held_out) | elsewhere | noise(model, batches, method)

    return loop.line(first, settings, method, seed, measure)


def other(first: loop.Start, condition: Condition, rolled: Batch) -> float:
    """Share of the responses that are right, but not by the text of their prompt's answer."""
    texts = first.tokenizer.batch_decode(rolled.responses, skip_special_tokens=True)
    answers = [problem.answer for problem in asked(first, condition, rolled.step) for _ in range(condition.size)]
    same = torch.tensor([text == answer for text, answer in zip(texts, answers, strict=True)])
    return float(((rolled.rewards.flatten() == 1) & ~same).double().mean())


def noise(model: torch.nn.Module, batches: list[Batch], method: str) -> dict[str, float]:
    """variance and variance_rloo."""
    unscaled = f"{method}_unscaled"
    names = {"variance": unscaled if unscaled in METHODS else method, "variance_rloo": "rloo"}
    one, two = (gradient.gradients(model, learning(model), part, set(names.values())) for part in batches)
    return {key: float(np.square(one[name] - two[name]).sum() / 2) for key, name in names.items()}


def variances(rows: list[dict]) -> list[dict]:
    """One line a condition and method whose E g is RLOO's: mean variance over all looks and seeds, over RLOO's."""
    lines = []
    for condition, method in dict.fromkeys((row["condition"], row["method"]) for row in rows):
        runs = [row for row in rows if (row["condition"], row["method"]) == (condition, method)]
        own, rloo = (np.array([row[key].split() for row in runs], dtype=float) for key in ("variance", "variance_rloo"))
        if {method, f"{method}_unscaled"} & set(gradient.UNBIASED):
            line = {"condition": condition, "method": method, "seeds": len(runs)}
            lines.append(line | results.over_seeds(_ratio, own, rloo).columns("variance_to_rloo"))
    return lines


def _ratio(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of means over arrays (..., seeds, times)."""
    return own.mean((-2, -1)) / other.mean((-2, -1))


def as_table(lines: list[dict]) -> str:
    """Of `variances`."""

    def cell(line: dict) -> str:
        few = np.isnan(line["variance_to_rloo_low"])  # seeds for an interval
        return f"{line['variance_to_rloo']:.2f}" if few else tables.interval(line, "variance_to_rloo", 2)

    kept = ("condition", "method", "seeds")
    return tables.markdown([{key: line[key] for key in kept} | {"variance over RLOO's": cell(line)} for line in lines])


def show(path: Path) -> str:
    """What a CSV of runs says of accuracy, as study.show does, and of the gradient's variance; writes both."""
    table, text = study.show(path, "krpo_adaptive"), as_table(variances(study.finished(path)))
    (path.parent / "variance.md").write_text(text + "\n")
    return f"{table}\n\n{text}"
