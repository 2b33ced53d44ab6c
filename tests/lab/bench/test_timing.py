"""What times and what counts memory."""

import pytest
import torch

from verl_krpo.lab import bench
from verl_krpo.lab.bench import timing


def test_paired_gives_one_time_a_round_and_call():
    calls = {"sum": lambda: sum(range(1000)), "nothing": lambda: None}
    times = timing.paired(calls, rounds=3)
    assert times.keys() == calls.keys() and all(len(t) == 3 and min(t) > 0 for t in times.values())
    assert timing.median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 4.0]) == 2.0


def test_peak_bytes_counts_what_is_held_at_once():
    def call():
        one = torch.ones(1000)
        two = one + 1
        del one
        return two * 2

    assert 8000 <= timing.peak_bytes(call) < 8200


def test_a_table_is_named_and_has_its_device():
    with pytest.raises(ValueError, match="no table other: there are filter, kpo"):
        bench.run("other")
    with pytest.raises(ValueError, match="krpo runs on a CPU only"):
        bench.run("krpo", device="cuda")
