"""Minerva Math (arXiv 2206.14858): 272 problems of undergraduate science courses."""

from verl_krpo.data.source import Dataset, Problem


def problem(record: dict) -> Problem:
    return Problem(record["question"].strip(), record["answer"].strip())


DATASET = Dataset(
    name="minerva",
    repo="math-ai/minervamath",
    splits={"test": "test"},
    columns=("question", "answer"),
    problem=problem,
    about="Minerva Math: 272 problems of undergraduate courses for evaluation (arXiv 2206.14858; math-ai/minervamath).",
)
