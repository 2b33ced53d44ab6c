"""GSM8K (arXiv 2110.14168): word problems of grade school; the answer stands after ####."""

from verl_krpo.data.source import Dataset, Problem


def problem(record: dict) -> Problem:
    _, _, answer = record["answer"].rpartition("####")
    return Problem(record["question"].strip(), answer.strip().replace(",", ""))


DATASET = Dataset(
    name="gsm8k",
    repo="openai/gsm8k",
    configs=("main",),
    splits={"train": "train", "test": "test"},
    columns=("question", "answer"),
    problem=problem,
    about="GSM8K: 7,473 word problems for training and 1,319 for test (arXiv 2110.14168; openai/gsm8k, MIT license).",
)
