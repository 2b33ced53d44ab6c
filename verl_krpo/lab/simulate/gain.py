"""The gain K_t of KPO's filter over the tokens of a response, and the share of a constant log-ratio that has been taken
over by then, 1 - prod_{j<=t} (1 - K_j).
"""

from pathlib import Path

import torch

from verl_krpo.kalman import LocalLevel, gains, steady_gain
from verl_krpo.report import figure, tables

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


def run(out: Path) -> str:
    """Write kpo_gain.png to `out`; gain / share of a constant log-ratio, by setting and token, as text."""
    drawn, (panels,) = figure.axes(1, 2, 10, 3.8)
    t, lines = torch.arange(1, max(TOKENS) + 1), []
    for name, setting in SETTINGS.items():
        gain, share = curves(setting, max(TOKENS))
        for panel, curve in zip(panels, (gain, share), strict=True):
            panel.loglog(t, curve.clamp(min=1e-9), label=name)
        lines.append({"setting": name} | {f"t = {t:,}": f"{gain[t - 1]:.1e} / {share[t - 1]:.2g}" for t in TOKENS})
    for panel, title in zip(panels, ("gain $K_t$", "share of a constant log-ratio taken over"), strict=True):
        panel.set(title=title, xlabel="token of the response", ylim=(1e-7, 2))
    panels[1].legend()
    figure.save(drawn, out / "kpo_gain")
    return tables.markdown(lines)
