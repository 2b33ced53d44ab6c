"""AIME 2025: the 30 problems of the American Invitational Mathematics Examination I and II; answers 0 to 999."""

from verl_krpo.data.source import Dataset, Problem


def problem(record: dict) -> Problem:
    # The papers print 033; the number is what counts.
    return Problem(record["problem"].strip(), str(int(record["answer"])))


DATASET = Dataset(
    name="aime25",
    repo="math-ai/aime25",
    splits={"test": "test"},
    columns=("problem", "answer"),
    problem=problem,
    about="AIME 2025, both papers: 30 problems for evaluation (math-ai/aime25).",
)
