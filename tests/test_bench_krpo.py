"""The benchmark that the README names runs."""

from verl_krpo import bench_krpo


def test_the_table_has_every_form(monkeypatch):
    monkeypatch.setattr(bench_krpo, "SHAPES", ((4, 3),))
    _, _, *lines = bench_krpo.table(2).splitlines()
    assert len(lines) == 2 + len(bench_krpo.forms())
    assert all(line.startswith("| 4 x 3 | ") and line.count("|") == 7 for line in lines)
