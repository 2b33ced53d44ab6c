"""How much of an advantage is the order in which a group's rewards happen to stand?

The multiset of rewards is fixed and permuted; an estimator that sees a set gives every reward the same advantage each
time. Reported for each form, with 95 % intervals over the permutations (bootstrap):

    spread of A           standard deviation of a member's advantage over the permutations, pooled over the members,
                          over the standard deviation of A: the share of A that is order and not reward
    spread of |gradient|  coefficient of variation of |sum_i A_i s_i| for fixed scores s_i ~ N(0, I), mean over draws
                          of the scores
"""

import numpy as np

from verl_krpo.config import Baseline
from verl_krpo.lab.simulate import simulate
from verl_krpo.report import figure, intervals, tables

MULTISETS = {
    "4 of 8 right": [1.0] * 4 + [0.0] * 4,
    "3 of 12 right": [1.0] * 3 + [0.0] * 9,
    "graded, 12": [1.0] * 3 + [0.5] * 2 + [0.01] * 5 + [0.0] * 2,
    "32 of 64 right": [1.0] * 32 + [0.0] * 32,
}
FORMS = {
    "sequential, Q = 1e-5 (published)": simulate.krpo(),
    "sequential, Q = 0": simulate.krpo(process_var=0.0),
    "posterior, Q = 0": simulate.krpo(process_var=0.0, baseline=Baseline.posterior),
    "leave_one_out, Q = 0": simulate.krpo(process_var=0.0, baseline=Baseline.leave_one_out),
    "leave_one_out, Q = 1e-5": simulate.krpo(baseline=Baseline.leave_one_out),
}
COLORS = ("krpo", "krpo_predicted", "krpo_posterior", "krpo_leave_one_out", "krpo_adaptive")
DIMENSION = 64
DRAWS = 100


def advantages(rewards: np.ndarray, orders: np.ndarray, form: simulate.Estimator) -> np.ndarray:
    """(permutations, members): the advantage of each member, under every order (permutations, members)."""
    _, placed = form(rewards[orders])
    back = np.empty_like(placed)
    np.put_along_axis(back, orders, placed, axis=1)
    return back


def spread(weights: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Variance over the permutations of each column of values (permutations, columns), one row a resample."""
    deviation = values - values.mean(axis=0)
    # A sample's variance is too small by (n - 1) / n, a resample's twice over.
    n = len(values)
    unbiased = (n / (n - 1)) ** np.where(np.arange(len(weights)) == 0, 1, 2)[:, None]
    return unbiased * (weights @ deviation**2 - (weights @ deviation) ** 2)


def measure(seed: int = 0, permutations: int = 50) -> list[dict]:
    """One row a multiset and form."""
    rng = np.random.default_rng(seed)
    rows = []
    for multiset, rewards in MULTISETS.items():
        orders = np.stack([rng.permutation(len(rewards)) for _ in range(permutations)])
        scores = rng.normal(size=(DRAWS, len(rewards), DIMENSION))
        weights = intervals.weights(rng, permutations)
        for name, form in FORMS.items():
            advantage = advantages(np.array(rewards), orders, form)
            norm = np.linalg.norm(np.einsum("pm,dmk->pdk", advantage, scores), axis=2)
            between = spread(weights, advantage).mean(axis=1)
            total = spread(weights, advantage.reshape(permutations, -1)).mean(axis=1)
            total += np.var(weights @ advantage, axis=1)
            share = np.sqrt(np.clip(between, 0, None) / total)
            variation = (np.sqrt(np.clip(spread(weights, norm), 0, None)) / (weights @ norm)).mean(axis=1)
            row = {"multiset": multiset, "form": name, "permutations": permutations}
            row |= intervals.of_weighted(share).columns("spread_of_A")
            row |= intervals.of_weighted(variation).columns("spread_of_gradient_norm")
            rows.append(row | {"std_of_A": float(np.sqrt(total[0])), "gradient_norm": float(norm.mean())})
    return rows


def figures(rows: list[dict]) -> dict:
    drawn, axes = figure.axes(1, 2, 11, 3.6, sharey=True)
    titles = {
        "spread_of_A": "share of A that is order (std over permutations / std of A)",
        "spread_of_gradient_norm": "gradient norm: coefficient of variation over permutations",
    }
    for axis, (key, title) in zip(axes[0], titles.items(), strict=True):
        for k, (form, color) in enumerate(zip(FORMS, COLORS, strict=True)):
            own = [row for row in rows if row["form"] == form]
            value, low, high = (np.array([row[f"{key}{end}"] for row in own]) for end in ("", "_low", "_high"))
            at, error = np.arange(len(own)) + (k - 2) * 0.15, np.abs([value - low, high - value])
            axis.errorbar(value, at, xerr=error, fmt="o", ms=4, lw=1.2, color=figure.color(color), label=form)
        axis.set_yticks(range(len(MULTISETS)), MULTISETS)
        axis.set_xlim(left=-0.02)
        axis.set_title(title, fontsize=9)
    axes[0, 0].invert_yaxis()
    figure.legend(drawn, ncols=6, loc="outside lower center", fontsize=8)
    return {"permutation": drawn}


def table(rows: list[dict]) -> list[dict]:
    return [
        {
            "rewards": row["multiset"],
            "form": row["form"],
            "order's share of A": tables.interval(row, "spread_of_A"),
            "variation of the gradient norm": tables.interval(row, "spread_of_gradient_norm"),
        }
        for row in rows
    ]
