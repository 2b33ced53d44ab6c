"""DAPO-Math-17k (arXiv 2503.14476): competition problems with whole-number answers, KPO's training set.

The published file repeats each problem about a hundred times and wraps it in instructions to end on a line
`Answer: ...`. Here each problem stands once, and the instructions are ours, as the `math` reward reads them.
"""

from verl_krpo.data.source import Dataset, Problem


def problem(record: dict) -> Problem:
    text = record["prompt"][-1]["content"]
    instructions, gap, rest = text.partition("\n\n")
    if gap and "Answer:" in instructions:
        text = rest
    before, gap, after = text.rpartition("\n\n")
    if gap and "Answer:" in after:
        text = before
    return Problem(text.strip(), record["reward_model"]["ground_truth"].strip())


DATASET = Dataset(
    name="dapo_math",
    repo="BytedTsinghua-SIA/DAPO-Math-17k",
    splits={"train": "train"},
    columns=("prompt", "reward_model"),
    problem=problem,
    about="DAPO-Math-17k: about 17,000 competition problems with whole-number answers (arXiv 2503.14476; "
    "BytedTsinghua-SIA/DAPO-Math-17k, Apache-2.0 license), each once, without the published instructions.",
)
