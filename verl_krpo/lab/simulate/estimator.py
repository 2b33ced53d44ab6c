"""Baselines and advantages against GRPO, RLOO and Dr.GRPO, on rewards whose true means are known.

For every law of rewards, group size and estimator, with 95 % intervals over simulated batches (bootstrap):

    mse             E(b_i - theta_i)^2, the baseline's error against the true mean of the reward
    residual        E(r_i - b_i)^2, over RLOO's: what is left to be variance of the gradient
    own_share       Cov(b_i, r_i - theta_i) / Var(r_i): the part of a reward that its own baseline takes away, 0 for an
                    unbiased one. The policy gradient shrinks by 1 - own_share, at each place by another factor where
                    it depends on the place
    std             standard deviation of the advantages (GRPO's is 1): what a learning rate has to reckon with
    mean_advantage  E[A_i] / std(A_i): 0 unless the baseline is shifted
    first_over_last mean |A| at a group's first place over its last
    snr_*           signal-to-noise |E g|^2 / tr Var g of the gradient over RLOO's, for two policies (simulate.Moments):
                    `independent`, whose score says nearly nothing about the reward, as a language model's does, and
                    `bandit`, where the reward is the action
"""

import numpy as np

from verl_krpo.config import Baseline, Scale
from verl_krpo.lab.simulate import simulate
from verl_krpo.lab.simulate.simulate import DRIFT_VAR, GAUSSIAN_STD
from verl_krpo.report import figure, intervals, tables

SHOWN = ("uniform", "Beta(5,5)", "two-point", "gaussian", "drifting", "mixture")  # laws in the figures
SIZES = (2, 4, 8, 12, 16, 64)


def cell(law: str, prompts: int, size: int, forms: dict, batches: int, rng: np.random.Generator) -> list[dict]:
    """One row a form, RLOO among them: every measure with its interval."""
    rewards, truth, std = simulate.draw(law, rng, prompts, size, batches)
    noise = rewards - truth
    weights = intervals.weights(rng, batches)
    found = {}
    for name, estimator in forms.items():
        pairs = [estimator(batch) for twice in rewards for batch in twice]
        baseline, advantage = (np.stack(values).reshape(rewards.shape) for values in zip(*pairs, strict=True))
        found[name] = baseline, advantage, simulate.Moments.of(noise, std, advantage)

    def average(values):
        return weights @ values.mean(axis=(1, 2, 3))

    rloo_baseline, _, rloo = found["RLOO"]
    rloo_residual = average((rewards - rloo_baseline) ** 2)
    rows = []
    for name, (baseline, advantage, moments) in found.items():
        spread = np.sqrt(average(advantage**2))
        measures = {
            "mse": average((baseline - truth) ** 2),
            "residual": average((rewards - baseline) ** 2) / rloo_residual,
            "own_share": average((baseline - truth) * noise) / average(noise**2),
            "std": spread,
            "mean_advantage": average(advantage) / spread,
            "first_over_last": average(np.abs(advantage[..., :1])) / average(np.abs(advantage[..., -1:])),
            "snr_independent": moments.snr("independent", weights) / rloo.snr("independent", weights),
            "snr_bandit": moments.snr("bandit", weights) / rloo.snr("bandit", weights),
        }
        row = {"law": law, "prompts": prompts, "size": size, "estimator": name, "batches": batches}
        for key, values in measures.items():
            row |= intervals.of_weighted(values).columns(key)
        rows.append(row)
    return rows


def measure(seed: int = 0, prompts: int = 64, sizes: tuple = SIZES, batches: int = 40) -> list[dict]:
    """One row a law, group size and estimator."""
    rng = np.random.default_rng(seed)
    forms = simulate.estimators()
    # What the model is made for: Q, R and the prior of the law that drew the rewards.
    true = {"init_mean": 0.5, "init_var": GAUSSIAN_STD**2, "process_var": DRIFT_VAR, "measurement_var": GAUSSIAN_STD**2}
    made = simulate.krpo(**true, baseline=Baseline.leave_one_out, scale=Scale.innovation_std)
    rows = []
    for law in simulate.LAWS:
        own = {"krpo leave_one_out, true Q, R": made} if law == "drifting" else {}
        for size in sizes:
            rows += cell(law, prompts, size, forms | own, batches, rng)
    return rows


def figures(rows: list[dict]) -> dict:
    colors = figure.colors(list(dict.fromkeys(row["estimator"] for row in rows)))
    rows = [row for row in rows if row["law"] in SHOWN]
    found = {
        "mse": "baseline's mean squared error",
        "own_share": "share of own reward in it",
        "first_over_last": "|A| first / last place",
    }
    baseline, panels = figure.over_sizes(rows, "law", found, colors, "estimator")
    ratios = {"snr_independent": "SNR / RLOO's, independent", "snr_bandit": "SNR / RLOO's, bandit"}
    snr, of_snr = figure.over_sizes(rows, "law", ratios, colors, "estimator")
    for panel in (*panels[[0, 2]].flat, *of_snr.flat):
        panel.set_yscale("log")
    for panel in of_snr[0]:
        panel.set_yticks(ticks := [0.5, 0.7, 1.0, 1.4, 2.0], [str(tick) for tick in ticks], minor=False)
        panel.minorticks_off()
    return {"estimator_baseline": baseline, "estimator_snr": snr}


def table(rows: list[dict]) -> list[dict]:
    return [
        {
            "law, groups of 8": row["law"],
            "estimator": row["estimator"],
            "mse": f"{row['mse']:.4f}",
            "own share": f"{row['own_share']:.3f}",
            "|A| first/last": f"{row['first_over_last']:.2f}",
            "SNR, independent": tables.interval(row, "snr_independent"),
            "SNR, bandit": tables.interval(row, "snr_bandit"),
        }
        for row in rows
        if row["size"] == 8
    ]
