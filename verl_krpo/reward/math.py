"""The reward for mathematics: 1 when the final answer is equivalent to the ground truth, else 0.

verl loads this file by path (`reward.custom_reward_function.path=.../math.py`).

The final answer is the first of these that the response holds:

    the last <answer>...</answer>
    the last complete \\boxed{...} (\\fbox and a bare `\\boxed 5` too)
    the rest of the line after the last ####

Two plain numbers are compared as exact fractions; anything else by math-verify, in verl's pool of processes, where its
time limits (5 s each for parsing and for comparing) work. Answers of more than 1,000 characters are wrong.
"""

import re
from fractions import Fraction
from importlib.util import find_spec

from verl_krpo.data.boxed import last_boxed

if find_spec("math_verify") is None:
    # verl's wrapper would print a line and give 0 for every answer.
    raise ImportError("the math reward needs math-verify: pip install math-verify")

MAX_CHARACTERS = 1000
TIMEOUT_SECONDS = 30.0

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+)?\.?")


def extract(text: str) -> str | None:
    """The final answer of a response as the module's table defines it, None without one."""
    before, closed, _ = text.rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if opened and closed:
        boxed = last_boxed(tagged)
        return tagged.strip() if boxed is None else boxed
    boxed = last_boxed(text)
    if boxed is not None:
        return boxed
    _, marked, rest = text.rpartition("####")
    return rest.strip().partition("\n")[0].strip() if marked else None


def plain(answer: str) -> str:
    """An answer without dollar signs, spaces around it and a unicode minus."""
    return answer.replace("\u2212", "-").replace("\\$", "").replace("$", "").replace("{,}", ",").strip()


def _number(answer: str) -> Fraction | None:
    digits = answer.replace(",", "").rstrip(".")
    return Fraction(digits) if _NUMBER.fullmatch(answer) and any(c.isdigit() for c in digits) else None


def equivalent(answer: str, truth: str) -> bool:
    """Whether two answers are the same."""
    if len(answer) > MAX_CHARACTERS:
        return False
    answer, truth = plain(answer), plain(truth)
    if not answer:
        return False
    if answer == truth:
        return True
    numbers = _number(answer), _number(truth)
    if None not in numbers:
        return numbers[0] == numbers[1]
    from verl.utils.reward_score.math_verify import compute_score as verify

    return verify("\\boxed{" + answer + "}", truth, timeout=TIMEOUT_SECONDS) > 0


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs
) -> dict[str, float | str]:
    """Score one response: score and acc (1 or 0), format (1 if there is a final answer), pred (that answer, for
    verl's majority vote) and source (the data source, which verl's validation dump lacks).

    ValueError when the ground truth is empty.
    """
    truth = str(ground_truth)
    if not truth.strip():
        raise ValueError(f"{data_source}: the ground truth is empty; drop the row or mend reward_model.ground_truth")
    answer = extract(solution_str)
    right = float(answer is not None and equivalent(answer, truth))
    pred = "" if answer is None else plain(answer)[:MAX_CHARACTERS]
    return {"score": right, "acc": right, "format": float(answer is not None), "pred": pred, "source": data_source}
