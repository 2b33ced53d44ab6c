"""The data that scripts/pretrained_cpu.py writes beside a pretrained model."""

import importlib.util
from pathlib import Path

from verl_krpo.reward import math as reward

SCRIPT = Path(__file__).parents[1] / "scripts" / "pretrained_cpu.py"


def test_the_worked_examples_are_right_and_nowhere_asked():
    spec = importlib.util.spec_from_file_location("pretrained_cpu", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    splits = script.sums()
    asked = {
        split: [tuple(map(int, row["prompt"][-1]["content"].split("+"))) for row in rows]
        for split, rows in splits.items()
    }
    assert len(asked["train"]) + len(asked["test"]) == 98
    assert not {frozenset(pair) for pair in asked["train"]} & {frozenset(pair) for pair in asked["test"]}
    for split, rows in splits.items():
        for (a, b), row in zip(asked[split], rows, strict=True):
            assert row["reward_model"]["ground_truth"] == str(a + b)
            _, question, answer, other_question, other_answer, _ = (message["content"] for message in row["prompt"])
            for shown, worked in ((question, answer), (other_question, other_answer)):
                assert shown != f"{a}+{b}"
                truth = str(sum(map(int, shown.split("+"))))
                assert reward.compute_score("", worked, truth)["score"] == 1
