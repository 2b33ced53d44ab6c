"""Answers that the mathematics reward grades in a second, beside verl's own wrapper and math-verify alone.

Threads ask as verl's reward workers do. verl's wrapper holds a pool of four processes; math-verify alone runs in this
process, one answer after the other, since its time limits need the main thread. `right` is the share of verdicts that
are as they should be. Wall time, so on an idle machine only.
"""

import logging
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

THREADS = 16
ROWS = 100  # the n-th has an answer of its own, so that no cache answers


def rows(kind: str, count: int) -> list[tuple[str, str, bool]]:
    """(answer, truth, whether they are equal) of `plain` numbers or of `LaTeX`; half of them are equal."""
    if kind == "plain":
        return [(f"{n}.0", str(n + n % 2), n % 2 == 0) for n in range(1, count + 1)]
    return [(f"\\frac{{{n}\\sqrt{{8}}}}{{3}}", f"\\frac{{{2 * n + n % 2}\\sqrt{{2}}}}{{3}}", n % 2 == 0)
            for n in range(1, count + 1)]  # fmt: skip


def ours(answer: str, truth: str) -> bool:
    from verl_krpo.reward.math import compute_score

    return compute_score("bench", f"So \\boxed{{{answer}}}.", truth)["score"] > 0


def verls(answer: str, truth: str) -> bool:
    from verl.utils.reward_score.math_verify import compute_score

    return compute_score(f"So \\boxed{{{answer}}}.", truth) > 0


def math_verify_alone(answer: str, truth: str) -> bool:
    from math_verify import parse, verify

    return verify(parse(f"\\boxed{{{truth}}}"), parse(f"So \\boxed{{{answer}}}."))


GRADERS: dict[str, tuple[Callable[[str, str], bool], int]] = {
    "verl-krpo": (ours, THREADS),
    "verl's math_verify": (verls, THREADS),
    "math-verify alone": (math_verify_alone, 1),
}


def table(rounds: int, device: str) -> list[dict]:
    """One row a kind and grader: the median over the rounds."""
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return [_row(kind, name, rounds) for kind in ("plain", "LaTeX") for name in GRADERS]


def _row(kind: str, name: str, rounds: int) -> dict:
    grade, threads = GRADERS[name]
    asked = rows(kind, ROWS)
    seconds = []
    for _ in range(rounds + 1):
        began = time.perf_counter()
        if threads > 1:
            with ThreadPoolExecutor(threads) as pool:
                verdicts = list(pool.map(lambda row: grade(*row[:2]), asked))
        else:
            verdicts = [grade(*row[:2]) for row in asked]
        seconds.append(time.perf_counter() - began)
    right = sum(verdict == equal for verdict, (_, _, equal) in zip(verdicts, asked, strict=True))
    return {
        "answers": kind,
        "grader": name,
        "threads": str(threads),
        "answers a second": ROWS / statistics.median(seconds[1:]),  # the first round starts the processes
        "right": right / ROWS,
    }
