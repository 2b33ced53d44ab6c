import json
import math

from verl_krpo import bench


def test_paired_gives_one_time_a_round_and_call():
    calls = {"sum": lambda: sum(range(1000)), "nothing": lambda: None}
    times = bench.paired(calls, rounds=3)
    assert times.keys() == calls.keys() and all(len(t) == 3 and min(t) > 0 for t in times.values())
    assert bench.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_filter_table(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "SHAPES", ((3, 200),))
    monkeypatch.setattr(bench, "SAMPLE", 1e-5)
    bench.main(["filter", "--rounds", "2", "--json", str(tmp_path / "filter.json")])
    rows = json.loads((tmp_path / "filter.json").read_text())["rows"]
    ours = {row["mask"]: row for row in rows if row["method"] == "ours"}
    assert ours.keys() == {"none", "all", "right-padded", "holes"}
    assert all(row["max error / max state"] <= 5e-7 for row in ours.values())
    published = {row["mask"]: row["max error / max state"] for row in rows if row["method"] == "published"}
    # Its gains are off at the default, and it takes what is masked for zeros.
    assert published["all"] > 1e-4 and published["holes"] > 0.1
    assert all(math.isfinite(row["microseconds"]) for row in rows)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == len(rows) + 2 and len({line.count("|") for line in table}) == 1
