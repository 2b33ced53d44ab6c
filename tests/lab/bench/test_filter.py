"""The filter's benchmark: what it times, and the errors that stand beside it."""

import json
import math

from verl_krpo.lab import bench
from verl_krpo.lab.bench import filter as filter_bench
from verl_krpo.lab.bench import timing


def test_filter_table(monkeypatch, tmp_path):
    monkeypatch.setattr(filter_bench, "SHAPES", ((3, 200),))
    monkeypatch.setattr(timing, "SAMPLE", 1e-5)
    table = bench.run("filter", 2, path=tmp_path / "filter.json").splitlines()
    rows = json.loads((tmp_path / "filter.json").read_text())["rows"]
    ours = {row["mask"]: row for row in rows if row["method"] == "ours"}
    assert ours.keys() == {"none", "all", "right-padded", "holes"}
    assert all(row["max error / max state"] <= 5e-7 for row in ours.values())
    published = {row["mask"]: row["max error / max state"] for row in rows if row["method"] == "published"}
    # Its gains are off at the default, and it takes what is masked for zeros.
    assert published["all"] > 1e-4 and published["holes"] > 0.1
    assert all(math.isfinite(row["microseconds"]) for row in rows)
    assert len(table) == len(rows) + 2 and len({line.count("|") for line in table}) == 1
