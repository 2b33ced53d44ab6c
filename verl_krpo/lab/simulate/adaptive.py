"""krpo_adaptive against RLOO: is a prior fitted to the other prompts ever a loss?

Bernoulli rewards over six laws of the prompts' means, batches of 16, 64 and 256 prompts, 95 % intervals over batches
(bootstrap):

    residual   E(r_i - b_i)^2 over RLOO's
    snr        signal-to-noise of the gradient over RLOO's, for a score that is nearly independent of the reward: with
               scale=none, which compares the baselines alone as RLOO has no scale, and as it divides, by an
               estimated scale that fluctuates from batch to batch
"""

from pathlib import Path

import numpy as np

from verl_krpo.config import AdaptiveConfig, AdaptiveScale
from verl_krpo.lab.simulate import estimator, simulate
from verl_krpo.report import figure, tables

MEASURES = {
    "residual": "E(r-b)$^2$ / RLOO's",
    "snr_unscaled": "SNR / RLOO's,\nscale=none",
    "snr_independent": "SNR / RLOO's,\nas it divides",
}
PROMPTS = (16, 64, 256)
SIZES = (2, 4, 8, 16)
REWARDS = 1_000_000  # a cell, so that small batches are as many as it takes
BATCHES = 4000  # a cell, at most


def measure(seed: int = 0, prompts: tuple = PROMPTS, sizes: tuple = SIZES, rewards: int = REWARDS) -> list[dict]:
    """One row a law, batch and group size; snr_unscaled is that of the baseline alone."""
    rng = np.random.default_rng(seed)
    forms = {
        "RLOO": simulate.with_verl("rloo_vectorized"),
        "krpo_adaptive": simulate.ours("krpo_adaptive"),
        "scale=none": simulate.ours("krpo_adaptive", AdaptiveConfig(scale=AdaptiveScale.none)),
    }
    rows = []
    for law in simulate.PROMPT_MEANS:
        for count in prompts:
            for size in sizes:
                batches = max(40, rewards // (2 * count * size))
                _, row, baseline = estimator.cell(law, count, size, forms, min(batches, BATCHES), rng)
                for end in ("", "_low", "_high"):
                    row[f"snr_unscaled{end}"] = baseline[f"snr_independent{end}"]
                rows.append(row)
    return rows


def draw(rows: list[dict], path: Path) -> None:
    drawn, axes = figure.axes(3, len(simulate.PROMPT_MEANS), 12, 6.6, sharex=True, sharey="row")
    colors = ["#9fc5e8", "#5aa9d6", "#1f5fa8"]
    for column, law in enumerate(simulate.PROMPT_MEANS):
        for line, (key, label) in enumerate(MEASURES.items()):
            axis = axes[line, column]
            for count, color in zip(PROMPTS, colors, strict=True):
                cells = [row for row in rows if row["law"] == law and row["prompts"] == count]
                size = [row["size"] for row in cells]
                value = np.array([row[key] for row in cells])
                error = np.abs(np.array([[row[f"{key}_low"], row[f"{key}_high"]] for row in cells]).T - value)
                axis.errorbar(size, value, yerr=error, fmt="o-", ms=3, lw=1.3, color=color, label=f"{count} prompts")
            axis.axhline(1, color="#4d4d4d", lw=0.8, ls="--")
            axis.set_xscale("log", base=2)
            axis.set_xticks(SIZES, [str(size) for size in SIZES])
            if column == 0:
                axis.set_ylabel(label)
            if line == 0:
                axis.set_title(law, fontsize=9)
            if line == len(MEASURES) - 1:
                axis.set_xlabel("group size")
    axes[0, 0].legend(fontsize=8)
    figure.save(drawn, path)


def run(out: Path, seed: int = 0) -> str:
    """Write adaptive.csv and adaptive.png to `out`; every cell as text."""
    rows = measure(seed)
    tables.write_csv(out / "adaptive.csv", rows)
    draw(rows, out / "adaptive.png")
    lines = []
    for law in simulate.PROMPT_MEANS:
        for count in PROMPTS:
            cells = [row for row in rows if row["law"] == law and row["prompts"] == count]
            line = [law, str(count)]
            for key in MEASURES:
                line += [f"{c[key]:.3f} ({c[key + '_low']:.3f}-{c[key + '_high']:.3f})" for c in cells]
            lines.append(line)
    header = [f"{name}, n={size}" for name in ("E(r-b)^2", "SNR, scale=none", "SNR") for size in SIZES]
    return tables.table(["prompt means", "prompts", *header], lines)
