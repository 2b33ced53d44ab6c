"""The benchmark of grading."""

from verl_krpo.lab.bench import reward


def test_every_verdict_of_the_table_is_right(monkeypatch):
    monkeypatch.setattr(reward, "ROWS", 8)
    monkeypatch.delitem(reward.GRADERS, "verl's math_verify")  # four processes that import all of verl
    rows = reward.table(1, "cpu")
    assert [(row["answers"], row["grader"]) for row in rows] == [
        (kind, grader) for kind in ("plain", "LaTeX") for grader in ("verl-krpo", "math-verify alone")
    ]
    assert all(row["right"] == 1 and row["answers a second"] > 0 for row in rows)
