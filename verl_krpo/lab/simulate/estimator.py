"""Baselines and advantages against GRPO, RLOO and Dr.GRPO, on rewards whose true means are known.

For every law of rewards, group size and estimator, with 95 % intervals over simulated batches (bootstrap):

    mse             E(b_i - theta_i)^2, the baseline's error against the true mean of the reward
    residual        E(r_i - b_i)^2, over RLOO's: what is left to be variance of the gradient
    own_share       Cov(b_i, r_i - theta_i) / Var(r_i): the part of a reward that its own baseline takes away, 0 for an
                    unbiased one. The policy gradient shrinks by 1 - own_share, at each place by another factor where
                    it depends on the place
    mean_advantage  E[A_i] / std(A_i): 0 unless the baseline is shifted
    first_over_last mean |A| at a group's first place over its last
    snr_*           signal-to-noise |E g|^2 / tr Var g of the gradient over RLOO's, for two policies (simulate.Moments):
                    `independent`, whose score says nearly nothing about the reward, as a language model's does, and
                    `bandit`, where the reward is the action
"""

from pathlib import Path

import numpy as np

from verl_krpo.lab.simulate import simulate
from verl_krpo.report import figure, intervals, tables

SHOWN = ("uniform", "Beta(5,5)", "two-point", "gaussian", "drifting", "mixture")  # laws in the figures
SIZES = (2, 4, 8, 12, 16, 64)
MEASURES = ("mse", "residual", "own_share", "mean_advantage", "first_over_last", "snr_independent", "snr_bandit")


def cell(law: str, prompts: int, size: int, forms: dict, batches: int, rng: np.random.Generator) -> list[dict]:
    """One row a form: every measure with its interval."""
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
        first, last = np.abs(advantage[..., :1]), np.abs(advantage[..., -1:])
        values = {
            "mse": average((baseline - truth) ** 2),
            "residual": average((rewards - baseline) ** 2) / rloo_residual,
            "own_share": average((baseline - truth) * noise) / average(noise**2),
            "mean_advantage": average(advantage) / np.sqrt(average(advantage**2)),
            "first_over_last": average(first) / average(last),
        }
        for policy in ("independent", "bandit"):
            values[f"snr_{policy}"] = moments.snr(policy, weights) / rloo.snr(policy, weights)
        row = {"law": law, "prompts": prompts, "size": size, "estimator": name, "batches": batches}
        for key in MEASURES:
            row |= dict(zip((key, f"{key}_low", f"{key}_high"), intervals.of_weighted(values[key]), strict=True))
        rows.append(row)
    return rows


def measure(seed: int = 0, prompts: int = 64, sizes: tuple = SIZES, batches: int = 40) -> list[dict]:
    """One row a law, group size and estimator."""
    rng = np.random.default_rng(seed)
    forms = simulate.estimators()
    # What the model is made for: Q, R and the prior of the law that drew the rewards.
    for_drift = forms | {"krpo leave_one_out, true Q, R": simulate.true_drift()}
    rows = []
    for law in simulate.LAWS:
        for size in sizes:
            rows += cell(law, prompts, size, for_drift if law == "drifting" else forms, batches, rng)
    return rows


def draw(rows: list[dict], path: Path, measures: tuple[str, ...], titles: tuple[str, ...]) -> None:
    drawn, axes = figure.axes(len(measures), len(SHOWN), 12, 2.4 * len(measures) + 0.4, sharex=True, sharey="row")
    colors = figure.colors(list(dict.fromkeys(row["estimator"] for row in rows)))
    for line, (key, title) in enumerate(zip(measures, titles, strict=True)):
        for column, law in enumerate(SHOWN):
            axis = axes[line, column]
            for form, color in colors.items():
                of_form = [row for row in rows if row["law"] == law and row["estimator"] == form]
                size = [row["size"] for row in of_form]
                # GRPO's family dashed and on top: where the curves agree both are seen.
                style = dict(ls="-", zorder=2) if form.startswith("krpo") else dict(ls=(0, (3, 3)), zorder=3)
                axis.plot(size, [row[key] for row in of_form], ms=2.5, marker="o", color=color, label=form, **style)
                low, high = ([row[f"{key}_{end}"] for row in of_form] for end in ("low", "high"))
                axis.fill_between(size, low, high, color=color, alpha=0.2, lw=0)
            axis.set_xscale("log", base=2)
            if key != "own_share":
                axis.set_yscale("log")
            if key == "snr_independent":
                ticks = [0.5, 0.7, 1.0, 1.4, 2.0]
                axis.set_yticks(ticks, [str(tick) for tick in ticks])
                axis.minorticks_off()
            axis.set_xticks([2, 4, 8, 16, 64], ["2", "4", "8", "16", "64"])
            if line == 0:
                axis.set_title(law, fontsize=9)
            if line == len(measures) - 1:
                axis.set_xlabel("group size")
        axes[line, 0].set_ylabel(title)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    drawn.legend(handles, labels, ncols=6, loc="outside lower center", fontsize=8, frameon=False)
    figure.save(drawn, path)


def run(out: Path, seed: int = 0) -> str:
    """Write estimator.csv, estimator_baseline.png and estimator_snr.png to `out`; the table at 8 as text."""
    rows = measure(seed)
    tables.write_csv(out / "estimator.csv", rows)
    draw(
        rows,
        out / "estimator_baseline.png",
        ("mse", "own_share", "first_over_last"),
        ("baseline's mean squared error", "share of own reward in it", "|A| first / last place"),
    )
    draw(
        rows,
        out / "estimator_snr.png",
        ("snr_independent", "snr_bandit"),
        ("SNR / RLOO's, independent", "SNR / RLOO's, bandit"),
    )
    lines = [
        [row["law"], row["estimator"], f"{row['mse']:.4f}", f"{row['own_share']:.3f}", f"{row['first_over_last']:.2f}"]
        + [f"{row[k]:.3f} ({row[k + '_low']:.3f}-{row[k + '_high']:.3f})" for k in ("snr_independent", "snr_bandit")]
        for row in rows
        if row["size"] == 8
    ]
    header = ["law, groups of 8", "estimator", "mse", "own share", "|A| first/last", "SNR, independent", "SNR, bandit"]
    return tables.table(header, lines)
