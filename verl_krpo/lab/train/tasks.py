"""What the tiny model is asked, what is right, and the model that training begins with: one Task a name.

sharpen     sums of two numbers, tiny_model.py's imperfect demonstrations: greedy decoding is right on nearly all
            from the first look on, and training has to make the model prefer what it knows
learn       the same sums, right demonstrations, stopped early: most are yet to be learned
digits_32   32 digits, each of them plus one, modulo ten, and digits_128: long answers, of which three in ten are
            right; the demonstrations have digits that are drawn anew
"""

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import trange

from verl_krpo import tiny_model
from verl_krpo.data.arithmetic import draw_sum, is_test
from verl_krpo.reward import answer_tag

END = tiny_model.END
RIGHT_DIGITS = 0.3  # of the demonstrations


class Problem(NamedTuple):
    """As the model sees it, and the answer that its reward is told."""

    question: str
    answer: str


@dataclass(frozen=True)
class Task:
    """draw: (rng, count, held out) -> problems, all questions of one length. response: of an answer, the right text.

    reward: (text of a response, answer) -> number. build: writes model and tokenizer to a folder. folder: its name.
    """

    draw: Callable[[random.Random, int, bool], list[Problem]]
    response: Callable[[str], str]
    reward: Callable[[str, str], float]
    build: Callable[[Path], object]
    folder: str
    max_tokens: int = 24


def _sums(rng: random.Random, count: int, held_out: bool = False) -> list[Problem]:
    chosen = []
    while len(chosen) < count:
        problem = draw_sum(rng)
        if is_test(problem.expression) == held_out:
            chosen.append(Problem(problem.question + "\n", problem.answer))
    return chosen


def _tagged(answer: str) -> str:
    return f"<answer>{answer}</answer>"


def _answer_tag(text: str, answer: str) -> float:
    return answer_tag.compute_score("", text, answer)["score"]


def _digits(length: int, rng: random.Random, count: int, held_out: bool = False) -> list[Problem]:
    shown = [rng.choices("0123456789", k=length) for _ in range(count)]
    return [Problem("".join(digits) + "=", "".join(str((int(d) + 1) % 10) for d in digits)) for digits in shown]


def _equal(text: str, answer: str) -> float:
    return float(text == answer)


def _right_sums(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return [(problem.question, _tagged(problem.answer)) for problem in _sums(rng, count)]


def _careless_digits(length: int, rng: random.Random, count: int) -> list[tuple[str, str]]:
    drawn_anew = (1 - RIGHT_DIGITS ** (1 / length)) / 0.9  # one in ten is right by chance

    def careless(answer: str) -> str:
        return "".join(rng.choice("0123456789") if rng.random() < drawn_anew else digit for digit in answer)

    return [(problem.question, careless(problem.answer)) for problem in _digits(length, rng, count)]


def warm_start(
    path: Path,
    demonstrations: Callable[[random.Random, int], list[tuple[str, str]]],
    steps: int,
    batch_size: int = 128,
    seed: int = 0,
) -> None:
    """Train a tiny model on demonstrations (question, response), the loss on the response's tokens; save it to `path`.

    A folder that is there is left as it is.
    """
    if path.exists():
        return
    tokenizer = tiny_model.tokenizer()
    model = tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed)
    rng = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for _ in (line := trange(steps, desc=f"warm start of {path.name}", disable=None)):
        questions, responses = zip(*demonstrations(rng, batch_size), strict=True)
        prompts = tokenizer(list(questions), return_tensors="pt")["input_ids"]
        answers = tokenizer([text + END for text in responses], return_tensors="pt", padding=True, padding_side="right")
        logits = model(torch.cat([prompts, answers["input_ids"]], 1)).logits[:, prompts.shape[1] - 1 : -1]
        labels = answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        line.set_postfix(loss=f"{loss.item():.3f}")
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


TASKS = {
    "sharpen": Task(_sums, _tagged, _answer_tag, tiny_model.build, "tiny"),
    "learn": Task(
        _sums, _tagged, _answer_tag, functools.partial(warm_start, demonstrations=_right_sums, steps=240), "learn"
    ),
} | {
    f"digits_{length}": Task(
        functools.partial(_digits, length),
        lambda answer: answer + END,
        _equal,
        functools.partial(
            warm_start, demonstrations=functools.partial(_careless_digits, length), steps=900, batch_size=64
        ),
        f"digits_{length}",
        max_tokens=length + 2,
    )
    for length in (32, 128)
}
