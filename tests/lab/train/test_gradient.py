"""Signal and variance of real gradients: their formulas by hand, sketches, and tiny measurements."""

import numpy as np
import pytest
import torch

from verl_krpo.lab.train import conditions, gradient, loop, methods, study
from verl_krpo.lab.train.conditions import Condition


@pytest.fixture
def subjects(models, monkeypatch):
    monkeypatch.setitem(conditions.CONDITIONS, "small", Condition("small", prompts=6, size=2, steps=2))
    return gradient.of_training(models, "small")


def test_signal_and_variance_of_vectors_drawn_from_a_known_law():
    """g = mu + e: |mu|^2 and tr Var e."""
    generator = np.random.default_rng(0)
    mean, batches, dimension = np.full(50, 0.2), 2000, 50
    drawn = mean + generator.normal(size=(batches, dimension))
    signal, variance = gradient.signal_and_variance(drawn @ drawn.T, np.full((1, batches), 1 / batches))
    assert signal == pytest.approx([mean @ mean], rel=0.1) and variance == pytest.approx([dimension], rel=0.02)


def test_two_batches_by_hand():
    products = np.array([[2.0, 0.5], [0.5, 4.0]])
    signal, variance = gradient.signal_and_variance(products, np.array([[0.5, 0.5]]))
    assert signal == pytest.approx([0.5]) and variance == pytest.approx([3 - 0.5])


def test_a_sketch_keeps_inner_products():
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(2, 3 * gradient.SKETCH + 5, generator=generator)
    two = two + one / 2
    parts = [one[:7].view(1, 7), one[7:]]
    products = gradient.sketch(parts) @ gradient.sketch([two])
    error = 5 * one.norm() * two.norm() / gradient.SKETCH**0.5
    assert abs(products - one @ two) < error < one @ two / 2
    assert gradient.sketch(parts) @ gradient.sketch(parts) == pytest.approx(float(one @ one), rel=0.03)


def test_exact_weights_are_the_square_of_the_score(subjects):
    """By autograd, with respect to the logits of every token."""
    batch = next(subjects).batch(0)
    owner = torch.from_numpy(batch.owners)
    log_softmax = loop.log_softmax(batch.first, batch.prompts, batch.responses, owner).detach()
    logits = log_softmax.double().requires_grad_()
    log_prob = logits.log_softmax(-1).gather(-1, batch.responses[..., None])[..., 0]
    (score,) = torch.autograd.grad((log_prob * batch.mask).sum(), logits)
    expected = score.square().sum((1, 2))
    torch.testing.assert_close(methods.exact_weights(batch), expected, rtol=1e-4, atol=1e-6)


def test_a_gradient_that_is_there_is_not_computed_again(subjects, tmp_path):
    subject = next(subjects)
    found = gradient.collect(subject, 2, ("rloo", "none"), tmp_path)
    assert not np.array_equal(found["rloo"], found["none"]) and found["reward"].shape == (2,)
    again = gradient.collect(subject._replace(batch=None), 2, ("none",), tmp_path)  # which cannot be called
    np.testing.assert_array_equal(again["none"], found["none"])
    more = gradient.collect(subject, 2, ("none", "otb"), tmp_path)
    assert np.array_equal(more["none"], found["none"]) and more["otb"].shape == found["none"].shape


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")  # a resample may hold one batch alone
def test_a_study_has_a_table_a_checkpoint(subjects, tmp_path):
    shown = ("rloo", "otb", "krpo_adaptive_score")
    text = gradient.run(tmp_path / "out", subjects, 3, shown, tmp_path / "parts")
    names = [f"small_{steps}" for steps in (0, 1, 2)]
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert files == sorted(f"{name}.{kind}" for name in names for kind in ("csv", "md"))
    assert text.count("krpo_adaptive_score") == 3 and text.count("small_1") == len(shown)
    rows = study.finished(tmp_path / "out" / "small_2.csv")
    assert gradient.as_table(rows) + "\n" == (tmp_path / "out" / "small_2.md").read_text()
    rloo = next(row for row in rows if row["method"] == "rloo")
    assert float(rloo["snr_to_rloo"]) == float(rloo["variance_to_rloo"]) == 1
