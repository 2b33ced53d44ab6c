"""`verl-krpo bench memory`: the table of a small one."""

from verl_krpo.lab.bench import memory


def test_the_table(monkeypatch):
    monkeypatch.setattr(memory, "PROMPTS", (300, 600))
    rows = memory.table(2)
    assert [row["prompts"] for row in rows] == ["300", "600"]
    assert rows[0]["MB"] < rows[1]["MB"] < 600 * 32e-6 + 1e-3  # 32 bytes a prompt
    assert all(row["ms a step"] > 0 and row["ms to choose"] > 0 for row in rows)
