"""The benchmark measures what it says."""

import torch

from verl_krpo import bench_kpo


def test_the_table_has_every_loss(monkeypatch):
    monkeypatch.setattr(bench_kpo, "SHAPES", ((2, 64),))
    lines = bench_kpo.table(2, "cpu").splitlines()
    assert len(lines) == 2 + len(bench_kpo.losses()) + 3
    assert all(line.count("|") == lines[0].count("|") for line in lines)
    assert "| 2 x 64 | holes | kpo |" in "\n".join(lines)


def test_peak_bytes_counts_what_is_held_at_once():
    def call():
        one = torch.ones(1000)
        two = one + 1
        del one
        return two * 2

    assert 8000 <= bench_kpo.peak_bytes(call, "cpu") < 8200


def test_every_round_calls_each_twice():
    calls = []
    times = bench_kpo.paired_times({name: lambda name=name: calls.append(name) for name in "ab"}, 3, "cpu")
    assert "".join(calls) == "aabb" * 5  # two rounds are thrown away
    assert [len(times[name]) for name in "ab"] == [3, 3]


def test_ratios():
    assert bench_kpo.ratios([2.0, 4.0, 9.0], [1.0, 4.0, 3.0]) == (2.0, 2.0)


def test_a_batch_has_padding_and_perhaps_holes():
    for holes in (False, True):
        mask = bench_kpo.batch(4, 200, holes, "cpu")[3]
        length = mask.sum(dim=1)
        ends = torch.where(mask, torch.arange(1, 201), 0).amax(dim=1)
        assert ((ends > length) == holes).all() and (ends >= 95).all()
