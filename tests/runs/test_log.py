import json

import pytest

from verl_krpo.runs import log


def test_whole_lines_of_all_attempts_make_one_run(tmp_path):
    put = lambda name, *rows: (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))  # noqa: E731
    put("metrics.earlier.jsonl", {"step": 1, "data": {"a": 1}}, {"step": 2, "data": {"a": 2}})
    put("metrics.jsonl", {"step": 2, "data": {"val-core/sums/acc/mean@1": 0.5}}, {"step": 3, "data": {"a": 3}})
    (tmp_path / "metrics.jsonl").open("a").write('{"step": 4, "data": {"a"')
    assert log.rows(tmp_path) == {1: {"a": 1}, 2: {"a": 2, "val-core/sums/acc/mean@1": 0.5}, 3: {"a": 3}}
    assert log.series(tmp_path)["a"] == {1: 1.0, 2: 2.0, 3: 3.0}
    assert log.series(tmp_path)[log.ACCURACY] == {2: 0.5}


def test_accuracy_is_the_mean_of_verls_core_means():
    """As verl names them: val-core for the metric of the whole number of samples, val-aux for the rest."""
    data = {"val-core/a/acc/mean@4": 0.2, "val-core/b/acc/mean@4": 0.4, "val-core/a/acc/best@4/mean": 0.9}
    assert log.accuracy(data | {"val-aux/a/score/mean@4": 1.0, "val-aux/a/acc/mean@2": 1.0}) == pytest.approx(0.3)
    assert log.accuracy({"critic/score/mean": 1.0}) is None


@pytest.mark.parametrize("line", ["3", "half a line", '{"loss": 1}', '{"step": "one", "data": {}}'])
def test_a_line_that_is_none_is_named(tmp_path, line):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "data": {{}}}}\n{line}\n')
    with pytest.raises(ValueError, match="metrics.jsonl, line 2 is "):
        log.rows(tmp_path)
