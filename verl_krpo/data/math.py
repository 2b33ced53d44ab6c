"""MATH (arXiv 2103.03874): competition problems in seven subjects; the answer is the last box of the solution."""

from verl_krpo.data.boxed import last_boxed
from verl_krpo.data.source import Dataset, Problem


def problem(record: dict) -> Problem | None:
    answer = last_boxed(record["solution"])
    extra = {"level": record["level"], "type": record["type"]}
    return None if answer is None else Problem(record["problem"].strip(), answer, extra)


DATASET = Dataset(
    name="math",
    repo="EleutherAI/hendrycks_math",
    configs=(
        "algebra",
        "counting_and_probability",
        "geometry",
        "intermediate_algebra",
        "number_theory",
        "prealgebra",
        "precalculus",
    ),
    splits={"train": "train", "test": "test"},
    columns=("problem", "level", "type", "solution"),
    problem=problem,
    about="MATH: 7,500 competition problems for training and 5,000 for test (arXiv 2103.03874; "
    "EleutherAI/hendrycks_math, MIT license). The MATH-500 benchmark is part of its test split.",
)
