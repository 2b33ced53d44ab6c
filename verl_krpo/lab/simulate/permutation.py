"""How much of an advantage is the order in which a group's rewards happen to stand?

The multiset of rewards is fixed and permuted; an estimator that sees a set gives every reward the same advantage each
time. Reported for each form, with 95 % intervals over the permutations (bootstrap):

    spread of A           standard deviation of a member's advantage over the permutations, pooled over the members,
                          over the standard deviation of A: the share of A that is order and not reward
    spread of |gradient|  coefficient of variation of |sum_i A_i s_i| for fixed scores s_i ~ N(0, I), mean over draws
                          of the scores
"""

from pathlib import Path

import numpy as np
import torch

from verl_krpo.advantage.krpo import krpo
from verl_krpo.config import Baseline, KrpoConfig, Order
from verl_krpo.report import figure, intervals, tables

MULTISETS = {
    "4 of 8 right": [1.0] * 4 + [0.0] * 4,
    "3 of 12 right": [1.0] * 3 + [0.0] * 9,
    "graded, 12": [1.0] * 3 + [0.5] * 2 + [0.01] * 5 + [0.0] * 2,
    "32 of 64 right": [1.0] * 32 + [0.0] * 32,
}
FORMS = {
    "sequential, Q = 1e-5 (published)": KrpoConfig(order=Order.arrival),
    "sequential, Q = 0": KrpoConfig(order=Order.arrival, process_var=0.0),
    "posterior, Q = 0": KrpoConfig(order=Order.arrival, process_var=0.0, baseline=Baseline.posterior),
    "leave_one_out, Q = 0": KrpoConfig(order=Order.arrival, process_var=0.0, baseline=Baseline.leave_one_out),
    "leave_one_out, Q = 1e-5": KrpoConfig(order=Order.arrival, baseline=Baseline.leave_one_out),
}
DIMENSION = 64
DRAWS = 100


def advantages(rewards: np.ndarray, orders: np.ndarray, settings: KrpoConfig) -> np.ndarray:
    """(permutations, members): the advantage of each member, under every order (permutations, members)."""
    prompts = np.repeat(np.arange(len(orders)), len(rewards))
    placed = (
        krpo(torch.from_numpy(rewards[orders].ravel()), prompts, settings).advantages().numpy().reshape(orders.shape)
    )
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
        rewards = np.array(rewards)
        orders = np.stack([rng.permutation(len(rewards)) for _ in range(permutations)])
        scores = rng.normal(size=(DRAWS, len(rewards), DIMENSION))
        weights = intervals.weights(rng, permutations)
        for form, settings in FORMS.items():
            advantage = advantages(rewards, orders, settings)
            norm = np.linalg.norm(np.einsum("pm,dmk->pdk", advantage, scores), axis=2)

            between = spread(weights, advantage).mean(axis=1)
            total = spread(weights, advantage.reshape(permutations, -1)).mean(axis=1) + np.var(
                weights @ advantage, axis=1
            )
            share = np.sqrt(np.clip(between, 0, None) / total)
            variation = (np.sqrt(np.clip(spread(weights, norm), 0, None)) / (weights @ norm)).mean(axis=1)
            row = {"multiset": multiset, "form": form, "permutations": permutations}
            for name, values in (("spread_of_A", share), ("spread_of_gradient_norm", variation)):
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), intervals.of_weighted(values), strict=True))
            row |= {"std_of_A": float(np.sqrt(total[0])), "gradient_norm": float(norm.mean())}
            rows.append(row)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    drawn, axes = figure.axes(1, 2, 11, 3.6, sharey=True)
    methods = ("krpo", "krpo_predicted", "krpo_posterior", "krpo_leave_one_out", "krpo_adaptive")
    titles = {
        "spread_of_A": "share of A that is order (std over permutations / std of A)",
        "spread_of_gradient_norm": "gradient norm: coefficient of variation over permutations",
    }
    for axis, (name, title) in zip(axes[0], titles.items(), strict=True):
        for k, (form, method) in enumerate(zip(FORMS, methods, strict=True)):
            of_form = [row for row in rows if row["form"] == form]
            at = np.arange(len(of_form)) + (k - 2) * 0.15
            value = np.array([row[name] for row in of_form])
            error = np.abs(np.array([[row[f"{name}_low"], row[f"{name}_high"]] for row in of_form]).T - value)
            axis.errorbar(value, at, xerr=error, fmt="o", ms=4, lw=1.2, color=figure.color(method), label=form)
        axis.set_yticks(range(len(MULTISETS)), MULTISETS)
        axis.set_xlim(left=-0.02)
        axis.set_title(title, fontsize=9)
    axes[0, 0].invert_yaxis()
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, ncols=6, loc="outside lower center", fontsize=8, frameon=False)
    figure.save(drawn, path)


def run(out: Path, seed: int = 0) -> str:
    """Write permutation.csv and permutation.png to `out`; the table as text."""
    rows = measure(seed)
    tables.write_csv(out / "permutation.csv", rows)
    draw(rows, out / "permutation.png")
    lines = [
        [row["multiset"], row["form"]]
        + [
            f"{row[name]:.3f} ({row[name + '_low']:.3f}-{row[name + '_high']:.3f})"
            for name in ("spread_of_A", "spread_of_gradient_norm")
        ]
        for row in rows
    ]
    return tables.table(["rewards", "form", "order's share of A", "variation of the gradient norm"], lines)
