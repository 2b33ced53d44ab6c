"""OpenMathInstruct-2 (arXiv 2410.01560) by topic: KRPO's second experiment (arXiv 2505.07527).

The dataset names no topics, and KRPO does not say how it chose its own. Here the first of these whose words occur in
the problem is its topic, and `algebra` takes the rest:

    probability, counting, geometry, number_theory, calculus, algebra

Problems repeat, once a solution; each stands once here. One in fifty is held out for test.
"""

import re

from verl_krpo.data.source import Dataset, Problem

WORDS = {
    "probability": r"probabilit|\bdice?\b|\brandom(ly)?\b|\bexpected (value|number)|\bcoin (is|flip|toss)",
    "counting": r"how many (different |distinct )?(ways|arrangements|permutations|combinations|subsets)|"
    r"\bin how many\b|\bpermutation|\bbinom|\barrange",
    "geometry": r"\btriangle|\bcircle|\bradius|\bangle|\bsquare (with|of side)|\brectang|\bpolygon|\bperimeter|"
    r"\barea\b|\bsphere|\bcylinder|\bcone\b|\bhexagon|\btrapezoid|\bparallelogram|\\sin|\\cos|\\tan",
    "number_theory": r"\bdivisib|\bdivisor|\bprime|\bremainder|\bmodulo|\\pmod|\bgcd|\blcm|greatest common|"
    r"least common|\bintegers?\b.*\bdigit|\bbase[- ](\d|ten|two)",
    "calculus": r"\bderivative|\bintegral|\\int(?![a-z])|\\lim(?![a-z])|\blimit (as|of)|\bdifferentia",
}
TOPICS = (*WORDS, "algebra")
_RULES = {topic: re.compile(words, re.IGNORECASE) for topic, words in WORDS.items()}


def topic_of(question: str) -> str:
    """The topic by the words of the problem."""
    return next((topic for topic, words in _RULES.items() if words.search(question)), "algebra")


def problem(record: dict) -> Problem:
    question = record["problem"].strip()
    extra = {"topic": topic_of(question), "origin": record["problem_source"]}
    return Problem(question, record["expected_answer"].strip(), extra)


DATASET = Dataset(
    name="openmath_instruct",
    repo="nvidia/OpenMathInstruct-2",
    splits={"train": "train_1M"},
    columns=("problem", "expected_answer", "problem_source"),
    problem=problem,
    boxed=False,
    held_out=50,
    about="OpenMathInstruct-2, its subset of a million solutions (arXiv 2410.01560; nvidia/OpenMathInstruct-2, "
    "CC BY 4.0 license): each problem once with its expected answer, topics by keywords. "
    "Reward: `verl_krpo/reward/answer_tag.py` as KRPO published it, or `verl_krpo/reward/math.py`.",
)
