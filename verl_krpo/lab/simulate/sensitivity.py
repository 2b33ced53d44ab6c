"""Which Q and R? The published estimator and leave_one_out over a grid of both, against RLOO.

Q is the variance of the drift that the filter assumes, R that of the noise. Prior N(0, 1) as published, Bernoulli
rewards of uniform p, groups of 8; measures as in estimator.py. (`residual` of the published form is no figure of merit,
since b_i has seen r_i.) What counts is Q / R: beyond about 1/n the filter forgets the first rewards of a group, and
P0 / R: below about 1 it believes the prior more than the rewards.
"""

import itertools

import numpy as np

from verl_krpo.config import Baseline
from verl_krpo.lab.simulate import estimator, simulate
from verl_krpo.report import figure

PROCESS_VARS = (0.0, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
MEASUREMENT_VARS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
BASELINES = {"published": Baseline.causal, "leave_one_out": Baseline.leave_one_out}


def measure(seed: int = 0, prompts: int = 64, size: int = 8, batches: int = 60) -> list[dict]:
    """One row a baseline, Q and R."""
    grid = list(itertools.product(BASELINES, PROCESS_VARS, MEASUREMENT_VARS))
    forms = {
        (name, q, r): simulate.krpo(process_var=q, measurement_var=r, baseline=BASELINES[name]) for name, q, r in grid
    }
    forms = {"RLOO": simulate.with_verl("rloo_vectorized")} | forms
    _, *rows = estimator.cell("uniform", prompts, size, forms, batches, np.random.default_rng(seed))
    return [dict(zip(("baseline", "Q", "R"), row.pop("estimator"), strict=True)) | row for row in rows]


def figures(rows: list[dict]) -> dict:
    """The published setting is framed."""
    from matplotlib.patches import Rectangle

    drawn, axes = figure.axes(len(BASELINES), 2, 9.5, 6.4)
    shown = {"snr_independent": ("gradient SNR / RLOO's", 1.0), "std": ("std of A (GRPO: 1)", 6.0)}
    for line, baseline in enumerate(BASELINES):
        for axis, (key, (title, bound)) in zip(axes[line], shown.items(), strict=True):
            values = np.array([row[key] for row in rows if row["baseline"] == baseline])
            values = values.reshape(len(PROCESS_VARS), len(MEASUREMENT_VARS)).T
            axis.imshow(np.log2(values), cmap="RdBu", vmin=-bound, vmax=bound, aspect="auto", origin="lower")
            for (y, x), value in np.ndenumerate(values):
                color = "white" if abs(np.log2(value)) > 0.6 * bound else "black"
                text = f"{value:.2f}" if value < 100 else f"{value:.0f}"
                axis.text(x, y, text, ha="center", va="center", fontsize=7.5, color=color)
            axis.set_xticks(range(len(PROCESS_VARS)), [f"{q:g}" for q in PROCESS_VARS])
            axis.set_yticks(range(len(MEASUREMENT_VARS)), [f"{r:g}" for r in MEASUREMENT_VARS])
            axis.grid(False)
            axis.set(title=f"{baseline}: {title}", xlabel="Q", ylabel="R")
            at = PROCESS_VARS.index(1e-5) - 0.5, MEASUREMENT_VARS.index(1e-2) - 0.5
            axis.add_patch(Rectangle(at, 1, 1, fill=False, lw=1.8, edgecolor="black"))
    return {"sensitivity": drawn}


def table(rows: list[dict]) -> list[dict]:
    """SNR, a line a baseline and R."""
    lines: dict = {}
    for row in rows:
        line = lines.setdefault((row["baseline"], row["R"]), {"SNR / RLOO's": row["baseline"], "R": f"{row['R']:g}"})
        half = (row["snr_independent_high"] - row["snr_independent_low"]) / 2
        line[f"Q = {row['Q']:g}"] = f"{row['snr_independent']:.3f} ±{half:.3f}"
    return list(lines.values())
