"""What the tiny model is asked, what is right, and the model that training begins with: one Task a name.

    sharpen     sums of two numbers, tiny_model.py's imperfect demonstrations: greedy decoding is right on nearly all
                from the first look on, and training has to make the model prefer what it knows
    learn       the same sums, right demonstrations, stopped early: most are yet to be learned
    count_bits  and the others of GYM: exercises of Reasoning Gym, right demonstrations, stopped a quarter of the way
                from the most frequent answer to all of them
    mixed       sums that are nearly solved, differences to be learned and products that are nearly hopeless
    digits_32   32 digits, each of them plus one, modulo ten, and digits_128: long answers, of which three in ten are
                right; the demonstrations have digits that are drawn anew
    digits_256  and digits_512, digits_1024: longer ones, of a smaller model (rounds.py). Three in ten are right at
                every length, so that a digit is wrong the less often the longer the answer

Those of GYM need the package reasoning-gym (pip install verl-krpo[bench]).
"""

import collections
import functools
import operator
import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import trange

from verl_krpo import tiny_model
from verl_krpo.data.arithmetic import draw_sum, is_test
from verl_krpo.lab.train import rounds
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


class Operation(NamedTuple):
    """right: of how many of its demonstrations; shown: of ten."""

    result: Callable[[int, int], int]
    right: float
    shown: int


OPERATIONS = {  # of `mixed`, where each is asked one time in three
    "+": Operation(operator.add, 0.93, 5),
    "-": Operation(operator.sub, 0.33, 4),
    "*": Operation(lambda a, b: a * b % 100, 0.25, 1),
}


def mixed(rng: random.Random, count: int, held_out: bool = False, operations: str = "+-*") -> list[Problem]:
    chosen = []
    while len(chosen) < count:
        a, b, sign = rng.randrange(100), rng.randrange(100), rng.choice(operations)
        if is_test(f"{a:02}{sign}{b:02}") == held_out:
            chosen.append(Problem(f"{a:02}{sign}{b:02}=", str(OPERATIONS[sign].result(a, b))))
    return chosen


def _careless_operations(rng: random.Random, count: int) -> list[tuple[str, str]]:
    """A wrong one has a question mark too many, or another number."""
    often = "".join(sign * operation.shown for sign, operation in OPERATIONS.items())

    def shown(problem: Problem) -> str:
        if rng.random() < OPERATIONS[problem.question[2]].right:
            return problem.answer
        return rng.choice((problem.answer + "?", str(int(problem.answer) + rng.choice((-10, -2, -1, 1, 2, 10)))))

    return [(problem.question, shown(problem)) for problem in mixed(rng, count, operations=often)]


def _digits(length: int, rng: random.Random, count: int, held_out: bool = False) -> list[Problem]:
    shown = [rng.choices("0123456789", k=length) for _ in range(count)]
    return [Problem("".join(digits) + "=", "".join(str((int(d) + 1) % 10) for d in digits)) for digits in shown]


def _rounds(length: int, rng: random.Random, count: int, held_out: bool = False) -> list[Problem]:
    return [Problem(*pair) for pair in rounds.draw(length, rng, count)]


def _equal(text: str, answer: str) -> float:
    return float(text == answer)


def _right_sums(rng: random.Random, count: int) -> list[tuple[str, str]]:
    return [(problem.question, _tagged(problem.answer)) for problem in _sums(rng, count)]


def _drawn_anew(length: int) -> float:
    """The share of digits that leaves RIGHT_DIGITS of the answers of this length right; one in ten is by chance."""
    return (1 - RIGHT_DIGITS ** (1 / length)) / 0.9


def _careless_digits(length: int, rng: random.Random, count: int) -> list[tuple[str, str]]:
    drawn_anew = _drawn_anew(length)

    def careless(answer: str) -> str:
        return "".join(rng.choice("0123456789") if rng.random() < drawn_anew else digit for digit in answer)

    return [(problem.question, careless(problem.answer)) for problem in _digits(length, rng, count)]


def _sorting(facts: dict) -> str:
    return facts["direction"][0] + ":" + ",".join(number.removesuffix(".0") for number in facts["original_numbers"])


def _filtering(facts: dict) -> str:
    kept, side = facts["operation"].split("_")
    return f"{kept[0]}{side[0]}{facts['filter_value']}:{','.join(facts['original_numbers'])}"


def _numbers(answer: str) -> str:
    return re.sub(r"[\[\]' ]|\.0", "", answer)


class Exercise(NamedTuple):
    """A dataset of Reasoning Gym: its settings, and question and answer in short, of an item's metadata and answer."""

    settings: dict
    question: Callable[[dict], str]
    answer: Callable[[str], str] = str


GYM = {
    "number_sorting": Exercise(
        {"max_numbers": 3, "max_decimals": 0, "min_value": -99, "max_value": 99},
        _sorting,
        _numbers,
    ),
    "count_bits": Exercise({"max_n": 65_535}, lambda facts: str(facts["number"])),
    "number_filtering": Exercise(
        {"min_numbers": 2, "max_numbers": 3, "max_decimals": 0, "min_value": -99, "max_value": 99}, _filtering, _numbers
    ),
    "chain_sum": Exercise(
        {"min_terms": 3, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        lambda facts: facts["expression"].replace(" ", ""),
    ),
    "spell_backward": Exercise({"max_word_len": 7}, lambda facts: facts["word"]),
}
GYM_ITEMS = 8000  # drawn of each, some of them alike
LEARNED = 0.25  # where their warm start ends, from the most frequent answer (0) to all of them (1)


@functools.cache
def gym_problems(name: str) -> tuple[list[Problem], list[Problem]]:
    """For training, and held out; questions are filled up with spaces on the left.

    Of ASCII alone: the tiny model's tokens are bytes, and questions are to have as many.
    """
    import reasoning_gym

    settings, question, answer = GYM[name]
    items = reasoning_gym.create_dataset(name, size=GYM_ITEMS, seed=0, **settings)
    problems = {question(item["metadata"]): answer(item["answer"]) for item in items}
    problems = {asked: right for asked, right in problems.items() if asked.isascii() and right.isascii()}
    width = max(map(len, problems))
    splits: tuple[list[Problem], list[Problem]] = [], []
    for asked, right in problems.items():
        splits[is_test(asked)].append(Problem(asked.rjust(width) + "=", right))
    return splits


def _gym(name: str, rng: random.Random, count: int, held_out: bool = False) -> list[Problem]:
    return rng.sample(gym_problems(name)[held_out], count)


def _blank(seed: int):
    tokenizer = tiny_model.tokenizer()
    return tokenizer, tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed)


def warm_start(
    path: Path,
    demonstrations: Callable[[random.Random, int], list[tuple[str, str]]],
    steps: int,
    batch_size: int = 128,
    held_out: Callable[[], list[tuple[str, str]]] | None = None,
    blank: Callable = _blank,
    end: str = END,
    seed: int = 0,
) -> None:
    """Train a tiny model on demonstrations (question, response), the loss on the response's tokens; save it to `path`.

    held_out: gives demonstrations; the training ends before `steps` when the share of them that greedy decoding gives
    is LEARNED of the way from that of the most frequent response to 1. A folder that is there is left as it is.
    blank: of a seed, the tokenizer and the model with random weights. end: what ends a response.
    """
    if path.exists():
        return
    tokenizer, model = blank(seed)

    def read(shown: list[tuple[str, str]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the responses' tokens, and the tokens, -100 beyond the end."""
        questions, responses = zip(*shown, strict=True)
        prompts = tokenizer(list(questions), return_tensors="pt")["input_ids"]
        answers = tokenizer([text + end for text in responses], return_tensors="pt", padding=True, padding_side="right")
        logits = model(torch.cat([prompts, answers["input_ids"]], 1)).logits[:, prompts.shape[1] - 1 : -1]
        return logits, answers["input_ids"].masked_fill(answers["attention_mask"] == 0, -100)

    def greedy(shown: list[tuple[str, str]]) -> float:
        with torch.no_grad():
            logits, labels = read(shown)
        return ((logits.argmax(-1) == labels) | (labels == -100)).all(1).double().mean().item()

    rng, shown = random.Random(seed), held_out() if held_out else []
    frequent = max(collections.Counter(response for _, response in shown).values(), default=0) / max(1, len(shown))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps, pct_start=0.1)
    for step in (line := trange(steps, desc=f"warm start of {path.name}", disable=None)):
        logits, labels = read(demonstrations(rng, batch_size))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        line.set_postfix(loss=f"{loss.item():.3f}")
        if shown and step % 10 == 9 and greedy(shown) >= frequent + LEARNED * (1 - frequent):
            break
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)


TASKS = {
    "sharpen": Task(_sums, _tagged, _answer_tag, tiny_model.build, "tiny"),
    "learn": Task(
        _sums, _tagged, _answer_tag, functools.partial(warm_start, demonstrations=_right_sums, steps=240), "learn"
    ),
    "mixed": Task(
        mixed,
        lambda answer: answer + END,
        _equal,
        functools.partial(warm_start, demonstrations=_careless_operations, steps=700),
        "mixed",
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
TASKS |= {
    f"digits_{length}": Task(
        functools.partial(_rounds, length),
        str,
        _equal,
        functools.partial(
            warm_start,
            demonstrations=functools.partial(rounds.careless, _drawn_anew(length)),
            steps=400,
            blank=rounds.blank,
            end="",
        ),
        f"digits_{length}",
        max_tokens=length,
    )
    for length in (256, 512, 1024)
}
TASKS |= {
    name: Task(
        functools.partial(_gym, name),
        lambda answer: answer + END,
        _equal,
        functools.partial(
            warm_start,
            demonstrations=functools.partial(_gym, name),
            steps=1500,
            held_out=functools.partial(_gym, name, random.Random(0), 128, True),
        ),
        name,
        max_tokens=36,
    )
    for name in GYM
}
