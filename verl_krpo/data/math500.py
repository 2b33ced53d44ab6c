"""MATH-500: the 500 problems of MATH's test split that arXiv 2305.20050 kept for evaluation."""

from verl_krpo.data.source import Dataset, Problem


def problem(record: dict) -> Problem:
    extra = {"level": str(record["level"]), "type": record["subject"]}
    return Problem(record["problem"].strip(), record["answer"], extra)


DATASET = Dataset(
    name="math500",
    repo="HuggingFaceH4/MATH-500",
    splits={"test": "test"},
    columns=("problem", "answer", "level", "subject"),
    problem=problem,
    about="MATH-500: 500 competition problems for evaluation (arXiv 2305.20050; HuggingFaceH4/MATH-500).",
)
