"""The reward for mathematics: 1 when the final answer is equivalent to the ground truth, else 0.

verl loads this file by path (`reward.custom_reward_function.path=.../math.py`).

The final answer is the first of these that the response holds, thinking aside (whatever stands before the last </think>
or after a <think> that is not closed):

    the last <answer>...</answer>
    the last \\boxed{...} (\\fbox and a bare `\\boxed 5` too); none where one was begun after it and not closed
    the rest of the line after the last ####
    the rest of the last line that begins with "Answer:" or "Final answer:"

A truth may come in one of these too. "The answer is" and end tokens around an answer are dropped.

equal.py compares text and plain numbers, pool.py has the rest compared by algebra.py in processes of its own. What
cannot be graded, because it takes more than 5 s of CPU time or 2 GiB, scores 0 with `ungraded` 1 and is logged. Answers
of more than 1,000 characters are wrong unless they are the truth to the letter.
"""

import logging
import os
import re
from importlib.util import find_spec

from verl_krpo.data.boxed import last_boxed
from verl_krpo.reward.equal import read, same
from verl_krpo.reward.pool import Failed, Pool

if find_spec("math_verify") is None:
    raise ImportError("the math reward needs math-verify: pip install math-verify")

MAX_CHARACTERS = 1000

_TAG = re.compile("<(/?)answer>", re.IGNORECASE)
_LINE = re.compile(r"^[ *#]*(?:final )?answer[ *]*:(.+)$", re.IGNORECASE | re.MULTILINE)
_LEAD = re.compile(r"^[ *]*(?:(?:so|thus|hence),? )?(?:the )?(?:final )?answer(?: is)?\b[ *:=]*", re.IGNORECASE)
_END = re.compile(r"</s>|<\|[a-z_]+\|>|<eos>|<end_of_turn>")

_log = logging.getLogger(__name__)
# verl imports this file when a job's reward workers start, long before the first answer.
_pool = Pool("verl_krpo.reward.algebra:equal", processes=min(4, os.cpu_count() or 1))


def extract(text: str) -> str | None:
    """The final answer of a response as the module's table defines it, None without one."""
    answer = _marked(text.rpartition("</think>")[2].partition("<think>")[0])
    return None if answer is None else _bare(answer)


def _bare(answer: str) -> str:
    return _LEAD.sub("", _END.split(answer, maxsplit=1)[0]).strip()


def _marked(text: str) -> str | None:
    before, closed, _ = _TAG.sub(r"<\1answer>", text).rpartition("</answer>")
    _, opened, tagged = before.rpartition("<answer>")
    if opened and closed:
        text = tagged
    boxed = last_boxed(text)
    if last_boxed(text + "}" * text.count("{")) != boxed:
        return None  # closed by force, another box appears: it was cut off
    if boxed is not None or opened and closed:
        return tagged if boxed is None else boxed
    _, marked, rest = text.rpartition("####")
    if marked:
        return rest.strip().partition("\n")[0]
    lines = _LINE.findall(text)
    return lines[-1] if lines else None


def equivalent(answer: str, truth: str) -> bool:
    """Whether two answers are the same. pool.Failed where that cannot be found out."""
    if answer == truth:
        return True
    if len(answer) > MAX_CHARACTERS or not answer:
        return False
    ours, theirs = read(answer), read(truth)
    verdict = same(ours, theirs)
    return _pool.call(ours.latex, theirs.latex) if verdict is None else verdict


def compute_score(
    data_source: str, solution_str: str, ground_truth: str, extra_info: dict | None = None, **kwargs
) -> dict[str, float | str]:
    """Score one response. The keys are the same whatever the response:

        score, acc   1 if the answer is right, else 0
        format       1 if there is a final answer
        ungraded     1 if it could not be graded
        pred         the final answer, for verl's majority vote
        source       the data source, which verl's validation dump lacks

    ValueError when the ground truth is empty.
    """
    truth = str(ground_truth).strip()
    if not truth:
        raise ValueError(f"{data_source}: the ground truth is empty; drop the row or fill reward_model.ground_truth")
    truth, answer = _bare(_marked(truth) or truth), extract(solution_str)
    right, ungraded = False, False
    try:
        right = answer is not None and equivalent(answer, truth)
    except Failed as failure:
        ungraded = True
        _log.warning("%s: not graded, score 0: %.200r against %.200r: %s", data_source, answer, truth, failure)
    return {
        "score": float(right),
        "acc": float(right),
        "format": float(answer is not None),
        "ungraded": float(ungraded),
        "pred": "" if answer is None else answer.replace("\\$", "").replace("$", "").strip()[:MAX_CHARACTERS],
        "source": data_source,
    }
