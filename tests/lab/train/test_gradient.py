"""The signal-to-noise ratio of real gradients: its formula by hand, and a tiny measurement."""

import numpy as np
import pytest
import torch

from verl_krpo import tiny_model
from verl_krpo.lab.train import conditions, gradient, on_policy
from verl_krpo.lab.train.conditions import Condition


def test_signal_to_noise_of_vectors_drawn_from_a_known_law():
    """g = mu + e: |mu|^2 / tr Var e, unbiased signal; and the interval holds it."""
    generator = np.random.default_rng(0)
    mean, batches, dimension = np.full(50, 0.2), 2000, 50
    drawn = mean + generator.normal(size=(batches, dimension))
    found = gradient.snr(drawn @ drawn.T, np.full((1, batches), 1 / batches))
    assert found == pytest.approx([mean @ mean / dimension], rel=0.1)


def test_two_batches_by_hand():
    products = np.array([[2.0, 0.5], [0.5, 4.0]])
    assert gradient.snr(products, np.array([[0.5, 0.5]])) == pytest.approx([0.5 / (3 - 0.5)])


@pytest.mark.filterwarnings("ignore:invalid value")  # a resample of three batches may hold one of them alone
def test_every_method_sees_the_same_batches(tmp_path, monkeypatch):
    tokenizer = tiny_model.tokenizer()
    model = tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, seed=0)
    tiny_model.warm_start(model, tokenizer, steps=60, seed=0, batch_size=16)
    model.save_pretrained(tmp_path / "tiny")
    tokenizer.save_pretrained(tmp_path / "tiny")
    monkeypatch.setitem(conditions.CONDITIONS, "small", Condition("small", prompts=6, size=2, steps=2))
    monkeypatch.setattr(gradient, "CHECKPOINTS", (0, 2))
    text = gradient.run(tmp_path, tmp_path / "tiny", "small", batches=3)
    assert len(text.splitlines()) == 2 + 2 * len(gradient.SHOWN)
    first = on_policy.start(tmp_path / "tiny")
    found = gradient.gradients(first, first.model, on_policy.CONDITIONS["small"], 2, seed=5)
    assert all(g.isfinite().all() and g.shape == found["rloo"].shape for g in found.values())
    assert not torch.equal(found["rloo"], found["krpo"])
    again = gradient.gradients(first, first.model, on_policy.CONDITIONS["small"], 2, seed=5)
    assert torch.equal(found["rloo"], again["rloo"])
