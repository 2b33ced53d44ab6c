"""krpo_adaptive against RLOO: is a prior fitted to the other prompts ever a loss?

Bernoulli rewards over six laws of the prompts' means, batches of 16, 64 and 256 prompts; estimator.py's measures, of
which are shown:

    residual   E(r_i - b_i)^2 over RLOO's
    snr        signal-to-noise of the gradient over RLOO's, for a score that is nearly independent of the reward: with
               scale=none, which compares the baselines alone as RLOO has no scale, and as it divides, by an
               estimated scale that fluctuates from batch to batch
"""

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
                batches = min(BATCHES, max(40, rewards // (2 * count * size)))
                _, row, unscaled = estimator.cell(law, count, size, forms, batches, rng)
                rows.append(
                    row | {f"snr_unscaled{end}": unscaled[f"snr_independent{end}"] for end in ("", "_low", "_high")}
                )
    return rows


def figures(rows: list[dict]) -> dict:
    shades = dict(zip(PROMPTS, ("#9fc5e8", "#5aa9d6", "#1f5fa8"), strict=True))
    drawn, panels = figure.over_sizes(rows, "law", MEASURES, shades, "prompts")
    for panel in panels.flat:
        panel.axhline(1, color="#4d4d4d", lw=0.8, ls="--")
    return {"adaptive": drawn}


def table(rows: list[dict]) -> list[dict]:
    """A line a law and number of prompts."""
    lines: dict = {}
    for row in rows:
        line = lines.setdefault(
            (row["law"], row["prompts"]), {"prompt means": row["law"], "prompts": str(row["prompts"])}
        )
        for key, name in (("residual", "E(r-b)^2"), ("snr_unscaled", "SNR, scale=none"), ("snr_independent", "SNR")):
            line[f"{name}, n={row['size']}"] = tables.interval(row, key)
    return list(lines.values())
