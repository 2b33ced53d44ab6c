"""`verl-krpo plot`: training curves of several runs and seeds.

Runs given one name are seeds of one method: their mean over the seeds that have logged a step, and a band of one
standard deviation (n - 1) where there are two or more. A run that is still going is drawn as far as it is.
"""

import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from verl_krpo.report import figure
from verl_krpo.runs import log
from verl_krpo.runs.log import ACCURACY, REWARD, Series

WINDOW = 10  # steps of the moving mean


@dataclass
class Panel:
    """One picture: its title, its lines as (metric, label suffix, line style)."""

    title: str
    lines: tuple[tuple[str, str, str], ...]
    smooth: bool = True
    log: bool = False


def _one(title: str, metric: str, **options) -> Panel:
    return Panel(title, ((metric, "", "-"),), **options)


PANELS = (
    _one("mean reward", REWARD),
    _one("held-out accuracy", ACCURACY, smooth=False),
    _one("entropy (nats a token)", "actor/entropy"),
    _one("gradient norm", "actor/grad_norm", log=True),
    _one("krpo: std of the advantages", "krpo/advantage_std"),
    _one("krpo: NIS (1: the model fits)", "krpo/nis", log=True),
    _one("krpo: |A| of first over last", "krpo/advantage_abs_first_over_last", log=True),
    Panel(
        "krpo: expected of the pool, quartiles",
        tuple(
            (f"krpo/pool_{part}", f" {part}", style) for part, style in (("high", "--"), ("median", "-"), ("low", ":"))
        ),
        smooth=False,
    ),
    _one("krpo: mean std of the expected", "krpo/pool_std", smooth=False),
    Panel(
        "kpo: std of the token ratios",
        (("actor/kpo_ratio_std_raw", " before", ":"), ("actor/kpo_ratio_std_filtered", " after", "-")),
        log=True,
    ),
    _one("share of clipped tokens", "actor/pg_clipfrac"),
)


def named(run: str) -> tuple[str, Path]:
    """NAME=PATH, or a path whose last part is the name."""
    name, given, path = run.partition("=")
    return (name, Path(path)) if given and not Path(run).exists() else (log.name_of(run), Path(run))


def mean_and_std(seeds: Sequence[Series]) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean and standard deviation over the seeds that have each step; the deviation of one is 0."""
    steps = sorted(set().union(*seeds))
    values = [[series[step] for series in seeds if step in series] for step in steps]
    return steps, [statistics.fmean(v) for v in values], [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]


def smoothed(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Centered moving mean; near the ends over the values there are."""
    half = window // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def draw(
    methods: dict[str, list[dict[str, Series]]], out: str | os.PathLike, panels: Sequence[Panel] = PANELS
) -> tuple[Path, list[str]]:
    """Draw every panel that has data to OUT.png. methods: name -> seeds, each as `log.series` returns it.

    Returns the path of the PNG and the titles of the panels drawn. ValueError where no panel has data.
    """
    logged = {metric for seeds in methods.values() for seed in seeds for metric in seed}
    panels = [panel for panel in panels if any(metric in logged for metric, _, _ in panel.lines)]
    if not panels:
        raise ValueError(f"nothing to draw: none of {', '.join(m for p in PANELS for m, _, _ in p.lines)} was logged")
    drawn, axes = figure.panels(len(panels), 4.2 * min(3, len(panels)), 2.9)
    colors = figure.colors(list(methods))
    for panel, axis in zip(panels, axes, strict=True):
        for name, seeds in methods.items():
            for metric, suffix, style in panel.lines:
                if given := [seed[metric] for seed in seeds if metric in seed]:
                    _line(axis, given, panel, color=colors[name], label=name + suffix, linestyle=style)
        axis.set_title(panel.title, loc="left", fontsize=10)
        if panel.log and all(value > 0 for line in axis.lines for value in line.get_ydata()):
            axis.set_yscale("log")
        figure.whole_steps(axis, most=5)
        if panel is panels[0] or len(panel.lines) > 1:
            axis.legend(frameon=False, fontsize=8)
    drawn.supxlabel("training step", fontsize=9)
    return figure.save(drawn, out), [panel.title for panel in panels]


def _line(axis, seeds: list[Series], panel: Panel, color: str, linestyle: str, label: str) -> None:
    if panel.smooth:
        if len(seeds) == 1:
            values = seeds[0].values()
            axis.plot(list(seeds[0]), list(values), color=color, alpha=0.25, linewidth=0.8, linestyle=linestyle)
        seeds = [_smooth(series) for series in seeds]
    steps, *of_seeds = mean_and_std(seeds)
    mean, std = map(np.array, of_seeds)
    marker = "o" if len(steps) < 10 else None
    figure.band(axis, steps, mean, mean - std, mean + std, color, linestyle=linestyle, label=label, marker=marker)


def _smooth(series: Series) -> Series:
    window = min(WINDOW, max(1, len(series) // 5))
    return dict(zip(series, smoothed(list(series.values()), window), strict=True))


def show(runs: Sequence[str], out: str | os.PathLike) -> None:
    """Read the runs, draw, and say what is in the figure."""
    methods: dict[str, list[dict[str, Series]]] = {}
    for name, path in map(named, runs):
        methods.setdefault(name, []).append(log.series(path))
    drawn, titles = draw(methods, out)
    for name, seeds in methods.items():
        last = max((step for seed in seeds for series in seed.values() for step in series), default=0)
        print(f"{name}: {len(seeds)} run{'s' * (len(seeds) > 1)}, {last} steps")
    print(f"drawn: {', '.join(titles)}")
    print(f"figure: {drawn}")
