"""The benchmark of the KPO loss."""

import torch

from verl_krpo.lab.bench import kpo


def test_the_table_has_every_loss(monkeypatch):
    monkeypatch.setattr(kpo, "SHAPES", ((2, 64),))
    rows = kpo.table(2, "cpu")
    assert [row["loss"] for row in rows] == [*kpo.losses(), "vanilla", "published", "kpo"]
    assert {row["mask"] for row in rows[-3:]} == {"holes"}
    assert all(row["/ vanilla"] == 1 for row in rows if row["loss"] == "vanilla")


def test_a_batch_has_padding_and_perhaps_holes():
    for holes in (False, True):
        mask = kpo.batch(4, 200, holes, "cpu")[3]
        length = mask.sum(dim=1)
        ends = torch.where(mask, torch.arange(1, 201), 0).amax(dim=1)
        assert ((ends > length) == holes).all() and (ends >= 95).all()
