"""The study of the memory in small."""

import csv

import numpy as np
import pytest

from verl_krpo.lab.simulate import memory, simulate
from verl_krpo.lab.simulate.memory import Training


def test_prompts_come_once_an_epoch_or_once_at_all():
    rng = np.random.default_rng(0)
    came = [prompts for prompts, _, _ in Training(pool=12, batch=4, steps=9).draw(2, rng)]
    for epoch in np.array(came).reshape(3, 12):
        assert sorted(epoch) == list(range(12))
    came = [prompts for prompts, _, _ in Training(batch=4, steps=9, once=True).draw(2, rng)]
    assert sorted(np.concatenate(came)) == list(range(36))


def test_chances_drift_as_told():
    steps = list(Training(rise=0.1, wander=0, pool=4, batch=4, steps=20).draw(3, np.random.default_rng(1)))
    logits = np.array([np.log(chance / (1 - chance))[np.argsort(prompts)] for prompts, chance, _ in steps])
    np.testing.assert_allclose(np.diff(logits, axis=0), 0.1, rtol=1e-9)
    assert all(rewards.shape == (4, 3) and set(np.unique(rewards)) <= {0, 1} for _, _, rewards in steps)


def test_the_memory_helps_where_prompts_recur_and_costs_nothing_elsewhere(tmp_path, monkeypatch):
    trainings = {"recur": Training(pool=32, steps=40), "reshuffled": Training(pool=32, steps=40, reshuffled=True)}
    rows = memory.measure(trainings=trainings, sizes=(1, 2), seeds=4)
    cells = {(row["training"], row["size"]): row for row in rows}
    assert cells["recur", 1]["memory_to_rloo"] < 0.9 and cells["recur", 2]["memory_to_rloo"] < 0.6
    assert cells["recur", 2]["memory_to_adaptive_high"] < 0.95
    assert max(cells["reshuffled", size]["memory_to_adaptive"] for size in (1, 2)) < 1.01
    assert all(0.8 < row["nis"] < 1.25 for row in rows)
    monkeypatch.setattr(memory, "measure", lambda seed: rows)
    table = simulate.run(memory, tmp_path)
    assert table.count("recur") == 2 and (tmp_path / "memory.png").exists()
    with open(tmp_path / "memory.csv") as file:
        assert len(list(csv.DictReader(file))) == 4


def test_a_ratio_is_paired_by_seed():
    value, low, high = memory.ratio([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], np.random.default_rng(0))
    assert (value, low, high) == pytest.approx((0.5, 0.5, 0.5))
