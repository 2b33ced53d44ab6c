"""JSPO against the loops of its published formula."""

import numpy as np
import pytest

from verl_krpo import jspo


def test_is_its_published_formula(oracle):
    rng = np.random.default_rng(9)
    for prompts, size in ((3, 2), (7, 4), (16, 8)):
        rewards = rng.integers(0, 2, (prompts, size)) + 0.1 * rng.normal(size=(prompts, size))
        uids = np.repeat([f"uid-{k}" for k in range(prompts)], size)
        exact = (rewards - oracle.jspo_baseline(rewards)).ravel()
        np.testing.assert_allclose(jspo(rewards.ravel(), uids).advantages().numpy(), exact, rtol=1e-10, atol=1e-12)


def test_where_there_is_little_to_compare_with():
    assert jspo([1.0, 0.0, 0.5], list("aab")).advantages().tolist() == [1.0, -1.0, 0.0]  # two prompts: RLOO
    assert jspo([1.0] * 6, list("aabbcc")).advantages().tolist() == [0.0] * 6
    found = jspo([1.0, 0.0, 0.5, 1.0, 1.0], list("aabcc")).advantages()
    assert found[2] == pytest.approx(0.5 - (0.5 + 1.0) / 2)  # alone: the mean of the other prompts' means


def test_verl_reaches_it_by_its_name(oracle):
    rewards, uids = [1.0, 0.0, 0.5, 1.0, 0.2, 0.0], list("aabbcc")
    np.testing.assert_allclose(oracle.advantage_of(rewards, uids, name="jspo"), jspo(rewards, uids).advantages())
