"""Which Q and R? The published estimator and leave_one_out over a grid of both, against RLOO.

Q is the variance of the drift that the filter assumes, R that of the noise. Prior N(0, 1) as published, Bernoulli
rewards, 95 % intervals over batches (bootstrap). What counts is Q / R: beyond about 1/n the filter forgets the first
rewards of a group, and P0 / R: below about 1 it believes the prior more than the rewards.

    residual   E(r_i - b_i)^2 over RLOO's; for the published form not a figure of merit, since b_i has seen r_i
    snr        signal-to-noise of the gradient over RLOO's, for a score that is nearly independent of the reward
    std_of_A   standard deviation of the advantages (GRPO's is 1): what a learning rate has to reckon with
"""

from pathlib import Path

import numpy as np

from verl_krpo.config import Baseline, KrpoConfig, Order
from verl_krpo.lab.simulate import simulate
from verl_krpo.report import figure, intervals, tables

PROCESS_VARS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MEASUREMENT_VARS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
BASELINES = {"published": Baseline.causal, "leave_one_out": Baseline.leave_one_out}
MEASURES = ("residual", "snr", "std_of_A")


def measure(seed: int = 0, law: str = "uniform", prompts: int = 64, size: int = 8, batches: int = 60) -> list[dict]:
    """One row a baseline, Q and R."""
    rng = np.random.default_rng(seed)
    rewards, truth, std = simulate.draw(law, rng, prompts, size, batches)
    weights = intervals.weights(rng, batches)

    def moments(estimator):
        # No form here looks across prompts: one batch holds them all.
        baseline, advantage = (m.reshape(rewards.shape) for m in estimator(rewards.reshape(-1, size)))
        residual = weights @ ((rewards - baseline) ** 2).mean(axis=(1, 2, 3))
        snr = simulate.Moments.of(rewards - truth, std, advantage).snr("independent", weights)
        return residual, snr, np.sqrt(weights @ (advantage**2).mean(axis=(1, 2, 3)))

    rloo_residual, rloo_snr, _ = moments(simulate.with_verl("rloo_vectorized"))
    rows = []
    for name, baseline in BASELINES.items():
        for process_var in PROCESS_VARS:
            for measurement_var in MEASUREMENT_VARS:
                settings = KrpoConfig(process_var, measurement_var, order=Order.arrival, baseline=baseline)
                residual, snr, spread = moments(simulate.ours("krpo", settings))
                row = {"baseline": name, "law": law, "size": size, "Q": process_var, "R": measurement_var}
                for key, values in zip(MEASURES, (residual / rloo_residual, snr / rloo_snr, spread), strict=True):
                    row |= dict(zip((key, f"{key}_low", f"{key}_high"), intervals.of_weighted(values), strict=True))
                rows.append(row)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    from matplotlib.patches import Rectangle

    drawn, axes = figure.axes(len(BASELINES), 2, 9.5, 6.4)
    titles = {"snr": "gradient SNR / RLOO's", "std_of_A": "std of A (GRPO: 1)"}
    for line, baseline in enumerate(BASELINES):
        for column, (key, title) in enumerate(titles.items()):
            axis = axes[line, column]
            values = np.array([row[key] for row in rows if row["baseline"] == baseline])
            values = values.reshape(len(PROCESS_VARS), len(MEASUREMENT_VARS)).T
            shown = np.log2(values)
            bound = 1.0 if key == "snr" else 6.0
            axis.imshow(shown, cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
            for (y, x), value in np.ndenumerate(values):
                color = "white" if abs(shown[y, x]) > 0.6 * bound else "black"
                axis.text(x, y, f"{value:.2f}" if value < 100 else f"{value:.0f}", ha="center", va="center",
                          fontsize=7.5, color=color)  # fmt: skip
            axis.set_xticks(range(len(PROCESS_VARS)), [f"{q:g}" for q in PROCESS_VARS])
            axis.set_yticks(range(len(MEASUREMENT_VARS)), [f"{r:g}" for r in MEASUREMENT_VARS])
            axis.grid(False)
            axis.set_title(f"{baseline}: {title}", fontsize=9)
            axis.set_xlabel("Q")
            axis.set_ylabel("R")
            at = PROCESS_VARS.index(1e-5) - 0.5, MEASUREMENT_VARS.index(1e-2) - 0.5
            axis.add_patch(Rectangle(at, 1, 1, fill=False, lw=1.8, edgecolor="black"))
    figure.save(drawn, path)


def run(out: Path, seed: int = 0) -> str:
    """Write sensitivity.csv and sensitivity.png to `out` (the published setting is framed); SNR as text."""
    rows = measure(seed)
    tables.write_csv(out / "sensitivity.csv", rows)
    draw(rows, out / "sensitivity.png")
    lines = []
    for baseline in BASELINES:
        for r in MEASUREMENT_VARS:
            cells = [row for row in rows if row["baseline"] == baseline and row["R"] == r]
            lines.append(
                [baseline, f"{r:g}"] + [f"{c['snr']:.3f} ±{(c['snr_high'] - c['snr_low']) / 2:.3f}" for c in cells]
            )
    return tables.table(["SNR / RLOO's", "R"] + [f"Q = {q:g}" for q in PROCESS_VARS], lines)
