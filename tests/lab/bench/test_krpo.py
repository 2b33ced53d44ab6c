"""The benchmark of the KRPO estimator."""

from verl_krpo.lab.bench import krpo


def test_the_table_has_every_form(monkeypatch):
    monkeypatch.setattr(krpo, "SHAPES", ((4, 3),))
    rows = krpo.table(2)
    assert [row["estimator"] for row in rows] == ["grpo", "grpo_vectorized", *krpo.forms(), krpo.WEIGHTED]
    assert all(row["prompts x group"] == "4 x 3" and row["ms"] > 0 for row in rows)
