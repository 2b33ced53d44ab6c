"""AMC 2023: the 40 problems of the American Mathematics Competitions 12A and 12B that have a numerical answer."""

from verl_krpo.data.source import Dataset, Problem


def problem(record: dict) -> Problem:
    # Some copies hold the answers as floating-point numbers.
    return Problem(record["question"].strip(), str(record["answer"]).removesuffix(".0"))


DATASET = Dataset(
    name="amc23",
    repo="math-ai/amc23",
    splits={"test": "test"},
    columns=("question", "answer"),
    problem=problem,
    about="AMC 2023: 40 problems for evaluation (math-ai/amc23).",
)
