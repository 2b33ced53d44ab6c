"""The gain of KPO's filter over the tokens of a response: `python -m verl_krpo.analysis.kpo_gain --out FIGURE.png`.

Draws the gain and, beside it, the share of a constant log-ratio that the filtered one has taken over,
1 - prod_{j<=t} (1 - K_j), and prints both as a Markdown table.
"""

import argparse
from pathlib import Path

import torch

from verl_krpo.kalman import LocalLevel, gains, steady_gain

TOKENS = (1, 8, 64, 256, 1024, 4096, 16384)
SETTINGS = {
    "published: Q 1e-6, P0 0": (1e-6, 1.0, 0.0),
    "gain=steady, or init_var 9.995e-4 = R K_inf": (1e-6, 1.0, steady_gain(LocalLevel(1e-6, 1.0))),
    "init_var 1": (1e-6, 1.0, 1.0),
    "Q 1e-4 (published, unclipped)": (1e-4, 1.0, 0.0),
    "Q 1e-2": (1e-2, 1.0, 0.0),
}


def curves(setting: tuple[float, float, float], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K_t and 1 - prod_{j<=t} (1 - K_j) for t = 1..tokens, from (Q, R, P0)."""
    process_var, measurement_var, init_var = setting
    gain = gains(LocalLevel(process_var, measurement_var, 0.0, init_var), tokens)
    return gain, 1 - torch.log1p(-gain).cumsum(0).exp()


def table() -> str:
    """Gain / share of a constant log-ratio, by setting and token."""
    lines = ["| setting | " + " | ".join(f"t = {t:,}" for t in TOKENS) + " |", "| --- |" + " --- |" * len(TOKENS)]
    for name, setting in SETTINGS.items():
        gain, share = curves(setting, max(TOKENS))
        cells = [f"{gain[t - 1]:.1e} / {share[t - 1]:.2g}" for t in TOKENS]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def draw(path: Path) -> None:
    """The figure, two panels with logarithmic axes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    t = torch.arange(1, max(TOKENS) + 1)
    for name, setting in SETTINGS.items():
        for panel, curve in zip(panels, curves(setting, max(TOKENS)), strict=True):
            panel.loglog(t, curve.clamp(min=1e-9), label=name)
    for panel, title in zip(panels, ("gain $K_t$", "share of a constant log-ratio taken over"), strict=True):
        panel.set(title=title, xlabel="token of the response", ylim=(1e-7, 2))
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    draw(arguments.out)
    print(table())


if __name__ == "__main__":
    main()
