"""The tasks that scripts/pretrained_cpu.py writes beside a pretrained model."""

import importlib.util
from pathlib import Path

import pytest

from verl_krpo.reward import math as reward

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrained_cpu.py"
SPEC = importlib.util.spec_from_file_location("pretrained_cpu", SCRIPT)
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)
COUNTS = {"sums": 98, "long_sums": 898, "long_products": 718}


@pytest.mark.parametrize("name", script.TASKS)
def test_the_worked_examples_are_right_and_nowhere_asked(name):
    splits = script.rows(name)
    questions = {split: [row["prompt"][-1]["content"] for row in rows] for split, rows in splits.items()}
    asked = {split: {frozenset(map(int, numbers(text))) for text in texts} for split, texts in questions.items()}
    assert len({*questions["train"], *questions["test"]}) == sum(map(len, questions.values())) == COUNTS[name]
    assert not asked["train"] & asked["test"] and 0.1 < len(questions["test"]) / COUNTS[name] < 0.3
    for split, rows in splits.items():
        for question, row in zip(questions[split], rows, strict=True):
            assert row["reward_model"]["ground_truth"] == str(eval(question))
            _, one, its_answer, other, other_answer, _ = (message["content"] for message in row["prompt"])
            shown = ((one, its_answer), (other, other_answer), (question, row["extra_info"]["solution"]))
            assert question not in (one, other)
            for text, solution in shown:
                assert solution.startswith(text) and reward.compute_score("", solution, str(eval(text)))["score"] == 1


def numbers(question):
    return question.replace("*", "+").split("+")
