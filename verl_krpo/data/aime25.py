"""AIME 2025: the 30 problems of the American Invitational Mathematics Examination I and II; answers 0 to 999."""

from verl_krpo.data.aime24 import problem
from verl_krpo.data.source import Dataset

DATASET = Dataset(
    name="aime25",
    repo="math-ai/aime25",
    splits={"test": "test"},
    columns=("problem", "answer"),
    problem=problem,
    about="AIME 2025, both papers: 30 problems for evaluation (math-ai/aime25).",
)
