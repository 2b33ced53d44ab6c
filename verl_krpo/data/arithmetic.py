"""Arithmetic, generated: the task of KRPO's main experiment (arXiv 2505.07527, section 4).

    level    terms   digits   operators   prompt
    easy     2-3     1-3      + - *       system prompt and a question
    normal   2-5     1-5      + - *       system prompt and a question
    hard     2-6     1-6      + - *       system prompt and a question
    sums     2       2        +           "07+34=", for the tiny model

A term is a whole number of at most the given digits, negative half of the time; `digits` is drawn once a problem.
Terms stand alone or in brackets, which may be negated. The published data holds 100,000 problems of 2-6 terms and
1-6 digits in 80,000 for training and 20,000 for test; the published code trains on those with at most 5 terms,
5 digits and 127 characters, which is `normal` here. `easy` and `hard` are ours: the same with 3, and everything.

A problem belongs to the test split when a hash of its expression says so, whatever the seed. So no seed's test set
meets another seed's training set. For `sums`, 12+34 and 34+12 are one problem.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

from verl_krpo.data import parquet

MAX_CHARACTERS = 127
TEST_ONE_IN = 5


@dataclass(frozen=True)
class Level:
    max_terms: int
    max_digits: int
    operators: str = "+-*"
    train_rows: int = 80_000
    test_rows: int = 20_000


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str
    expression: str
    terms: int
    digits: int


LEVELS = {
    "easy": Level(3, 3),
    "normal": Level(5, 5),
    "hard": Level(6, 6),
    "sums": Level(2, 2, "+", train_rows=6_400, test_rows=512),
}
PHRASINGS = ("What is {}?", "Solve {}", "Calculate {}", "{} = ?", "{} =", "{}")


def _level(name: str) -> Level:
    if name not in LEVELS:
        raise ValueError(f"level={name!r} is not one of {', '.join(LEVELS)}")
    return LEVELS[name]


def is_test(key: str) -> bool:
    """Whether the problem with this key (its expression without spaces) is held out."""
    return crc32(key.encode()) % TEST_ONE_IN == 0


def draw(level: Level, rng: random.Random) -> Problem:
    """One problem of 2 to max_terms terms and 1 to max_digits digits."""
    terms, digits = rng.randint(2, level.max_terms), rng.randint(1, level.max_digits)
    expression, value = _expression(terms, digits, level.operators, rng)
    question = rng.choice(PHRASINGS).format(expression)
    return Problem(question, str(value), expression.replace(" ", ""), terms, digits)


def draw_sum(rng: random.Random) -> Problem:
    """One sum a+b= with a, b uniform in 0..99, both written with two digits."""
    a, b = rng.randrange(100), rng.randrange(100)
    return Problem(f"{a:02}+{b:02}=", str(a + b), f"{min(a, b)}+{max(a, b)}", 2, 2)


def _expression(terms: int, digits: int, operators: str, rng: random.Random) -> tuple[str, int]:
    """Text and value of an expression. The value adds up products as they are closed by + or -."""
    text, total, product, sign = "", 0, 1, 1
    left = terms
    while left:
        bracketed = rng.randint(2, left) if left >= 2 and rng.random() < 0.2 else 1
        if bracketed == terms and rng.random() < 0.7:
            bracketed = 1
        if bracketed == 1:
            value = rng.randrange(10**digits) * rng.choice((1, -1))
            part = str(value)
        else:
            inner, value = _expression(bracketed, digits, operators, rng)
            part = f"( {inner} )"
            if rng.random() < 0.3:
                part, value = f"-{part}", -value
        left -= bracketed
        product *= value
        text += part
        if left:
            operator = rng.choice(operators)
            text += f" {operator} "
            if operator != "*":
                total += sign * product
                product, sign = 1, 1 if operator == "+" else -1
    return text, total + sign * product


def problems(level: str, train_rows: int, test_rows: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    """Problems for training and test, each expression once (for `sums`, each ordered pair once).

    ValueError when the level holds fewer problems than asked for.
    """
    bounds = _level(level)
    for name, rows in (("train_rows", train_rows), ("test_rows", test_rows)):
        if rows < 1:
            raise ValueError(f"{name}={rows} must be at least 1")
    rng = random.Random(f"{level}/{seed}")
    train, test, seen = [], [], set()
    misses = 0
    while len(train) < train_rows or len(test) < test_rows:
        problem = draw_sum(rng) if level == "sums" else draw(bounds, rng)
        held_out = is_test(problem.expression)
        split, wanted = (test, test_rows) if held_out else (train, train_rows)
        unseen = problem.question if level == "sums" else problem.expression
        if len(split) < wanted and unseen not in seen and len(problem.question) <= MAX_CHARACTERS:
            seen.add(unseen)
            split.append(problem)
            misses = 0
        else:
            misses += 1
            if misses > 100_000:
                raise ValueError(
                    f"level {level} yields no new problem after {len(train):,} for training and {len(test):,} for "
                    f"test: ask for fewer than {train_rows:,} and {test_rows:,}"
                )
    return train, test


def rows(level: str, train_rows: int, test_rows: int, seed: int) -> parquet.Splits:
    """The two splits as verl rows."""
    system = None if level == "sums" else parquet.THINK_AND_ANSWER

    def row(problem: Problem, split: str, index: int) -> dict:
        extra = {"terms": problem.terms, "digits": problem.digits}
        return parquet.row(f"arithmetic_{level}", problem.question, problem.answer, split, index, system, **extra)

    made = zip(("train", "test"), problems(level, train_rows, test_rows, seed), strict=True)
    return {split: [row(problem, split, index) for index, problem in enumerate(chosen)] for split, chosen in made}


def prepare(
    out: str | os.PathLike,
    level: str = "normal",
    train_rows: int | None = None,
    test_rows: int | None = None,
    seed: int = 0,
) -> dict[str, Path]:
    """Write OUT/train.parquet, OUT/test.parquet and the card; None takes the level's own number of rows."""
    bounds = _level(level)
    wanted = {
        "level": level,
        "train_rows": bounds.train_rows if train_rows is None else train_rows,
        "test_rows": bounds.test_rows if test_rows is None else test_rows,
        "seed": seed,
    }
    about = (
        f"Generated arithmetic, level {level}: 2 to {bounds.max_terms} terms of at most {bounds.max_digits} digits "
        f"with the operators {' '.join(bounds.operators)}. No test problem occurs in any training set. "
        "Reward: `verl_krpo/reward/answer_tag.py`."
    )
    settings = {"name": "arithmetic", **wanted, "source": parquet.checksum(Path(__file__))}
    return parquet.write(out, settings, lambda: rows(**wanted), about)
