"""filter_groups (DAPO) before an estimator: groups whose rewards are all equal never reach it.

RLOO and GRPO give such groups nothing anyway. An estimator that shrinks gives them an advantage, and needs it: once the
own reward has a part in whether its group is seen, no baseline made of the others is independent of it, and the prior
is fitted to the survivors. Rewards are 0 or 1 with a chance p a prompt; measured over all prompts *drawn*, a dropped
one with A = 0:

    weight     E[A (r - p)] / (p (1 - p)), over its mean: how much a prompt counts in the gradient. 1 at every p is the
               gradient of the mean reward
    variance   E[A^2] / E[A (r - p)]^2, RLOO's = 1: the variance of the gradient at equal expected length and as many
               rollouts drawn, for a score that is independent of the reward's deviation. (RLOO's is the same with and
               without the filter.)
"""

import numpy as np

from verl_krpo.lab.simulate import simulate

LAWS = ("uniform", "Beta(.5,.5)", "Beta(1,8)")
SIZES = (2, 4, 8, 16)
EDGES = (0.0, 0.1, 0.3, 0.7, 0.9, 1.0)  # of p, where weights are shown
BATCH = 64  # prompts that reach the estimator in a step
STEPS = 400  # drawn a cell, in steps of a batch without the filter
PARTS = 20  # of them, for the intervals


def methods() -> dict[str, simulate.Estimator]:
    return {
        "RLOO": simulate.with_verl("rloo_vectorized"),
        "GRPO": simulate.with_verl("grpo_vectorized"),
        "krpo (published)": simulate.ours("krpo"),
        "krpo_adaptive": simulate.ours("krpo_adaptive"),
    }


def advantages(rewards: np.ndarray, method: simulate.Estimator, filtered: bool, batch: int = BATCH) -> np.ndarray:
    """A (prompts, size) of rewards (prompts, size) in batches; 0 where a group is dropped, or left over in the end."""
    kept = np.flatnonzero(rewards.std(axis=1) > 0) if filtered else np.arange(len(rewards))
    result = np.zeros_like(rewards)
    for begin in range(0, len(kept) - batch + 1, batch):
        rows = kept[begin : begin + batch]
        result[rows] = method(rewards[rows])[1]
    return result


def cell(law: str, size: int, rng: np.random.Generator, steps: int = STEPS) -> list[dict]:
    """A row for each method without and with the filter."""
    p = simulate.CHANCES[law](rng, steps * BATCH)
    rewards = (rng.random((len(p), size)) < p[:, None]).astype(float)
    part, place, rows, parts = np.arange(len(p)) % PARTS, np.digitize(p, EDGES[1:-1]), [], {}
    for filtered in (False, True):
        for name, method in methods().items():
            a = advantages(rewards, method, filtered)
            signal, square = (a * (rewards - p[:, None])).mean(axis=1), (a**2).mean(axis=1)
            sums = np.array([np.bincount(part, weights=x, minlength=PARTS) for x in (square, signal)])
            parts[name] = np.concatenate([sums.sum(axis=1)[:, None], sums.sum(axis=1)[:, None] - sums], axis=1)
            (square, total), (of_rloo, signal_of_rloo) = parts[name], parts["RLOO"]
            variance, *jackknife = square / total**2 / (of_rloo / signal_of_rloo**2)
            found, expected = (np.bincount(place, weights=x, minlength=5) for x in (signal, p * (1 - p)))
            weights = np.full(len(expected), np.nan)  # where no prompt is
            np.divide(found * expected.sum() / found.sum(), expected, out=weights, where=expected > 0)
            row = {"law": law, "size": size, "filtered": filtered, "method": name, "variance": variance}
            row["error"] = 1.96 * np.sqrt((PARTS - 1) * np.var(jackknife))
            rows.append(row | {_between(i): weight for i, weight in enumerate(weights)})
    return rows


def _between(i: int) -> str:
    return f"p {EDGES[i]:g} to {EDGES[i + 1]:g}"


def measure(seed: int = 0, laws=LAWS, sizes: tuple = SIZES, steps: int = STEPS) -> list[dict]:
    """One row a law, group size, selection and method."""
    rng = np.random.default_rng(seed)
    return [row for law in laws for size in sizes for row in cell(law, size, rng, steps)]


def figures(rows: list[dict]) -> dict:
    return {}


def table(rows: list[dict]) -> list[dict]:
    return [
        {"prompt means": row["law"], "n": str(row["size"]), "filtered": "yes" if row["filtered"] else "no"}
        | {"method": row["method"], "variance / RLOO": f"{row['variance']:.3f} ± {row['error']:.3f}"}
        | {key: "-" if np.isnan(row[key]) else f"{row[key]:.2f}" for key in map(_between, range(len(EDGES) - 1))}
        for row in rows
    ]
