"""What filter_groups does to the gradient, against its expectation in closed form."""

import numpy as np
import pytest

from verl_krpo.lab.simulate import selection


def test_with_the_filter_pairs_are_rloo():
    """One right and one wrong in every group that is left: A = +-1/2 over the scale, and no prompt to be told apart."""
    rng = np.random.default_rng(0)
    rewards = (rng.random((6400, 2)) < rng.random((6400, 1))).astype(float)
    found = {name: selection.advantages(rewards, method, True) for name, method in selection.methods().items()}
    scale = found["krpo_adaptive"].max()
    assert scale > 0
    np.testing.assert_allclose(found["krpo_adaptive"], scale * found["RLOO"], atol=1e-12)


@pytest.mark.parametrize("size", [4, 8])
def test_the_weight_of_a_prompt_is_what_the_dropped_groups_would_have_given(size):
    """With b = w mean of the others + (1 - w) m0 the full gradient is n p (1 - p). The groups that are all right have
    n p^n (1 - w) (1 - m0) (1 - p) of it, those that are all wrong n (1 - p)^n (1 - w) m0 p. m0 is 1/2 by symmetry, w by
    the moments of the survivors; with uniform p every number of successes is as likely."""
    k = np.arange(1, size)
    within = (k * (1 - k / size)).mean() / (size - 1)
    between = max(0.0, ((k / size - 0.5) ** 2).mean() - within / size)
    w = between / (between + within / (size - 1))
    p = np.linspace(0.0005, 0.9995, 1000)
    kept = 1 - (1 - w) * 0.5 * (p ** (size - 1) + (1 - p) ** (size - 1))

    def weights():
        spread, place = p * (1 - p), np.digitize(p, selection.EDGES[1:-1])
        sums = np.bincount(place, weights=spread * kept) / np.bincount(place, weights=spread)
        return sums / ((spread * kept).sum() / spread.sum())

    rows = selection.cell("uniform", size, np.random.default_rng(0), steps=150)
    (row,) = [row for row in rows if row["filtered"] and row["method"] == "krpo_adaptive"]
    (rloo,) = [row for row in rows if row["filtered"] and row["method"] == "RLOO"]
    keys = [key for key in row if key.startswith("p ")]
    # RLOO's weights are 1: what its own deviate by on these draws is shared by both.
    found = [row[key] / rloo[key] for key in keys]
    assert found == pytest.approx(weights(), abs=0.03)
    assert row["variance"] > 1 - 1e-3
    (unfiltered,) = [row for row in rows if not row["filtered"] and row["method"] == "krpo_adaptive"]
    assert unfiltered["variance"] < 0.98
