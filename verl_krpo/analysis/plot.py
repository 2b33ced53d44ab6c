"""`verl-krpo plot`: training curves of several runs and seeds, from verl's file logger or TensorBoard's event files.

A run is a folder (or the file itself) with metrics.jsonl, or with event files in it or below it. Runs given one
name are seeds of one method: their mean over the seeds that have logged a step, and a band of one standard deviation
(n - 1) where there are two or more. A run that is still going is drawn as far as it is.
"""

import math
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_krpo.analysis.curves import ACCURACY, COLOURS, LOG, REWARD, entries, smoothed

Series = dict[int, float]  # step -> value
WINDOW = 10
EVENTS = "events.out.tfevents.*"


@dataclass
class Panel:
    """One picture: its title, and for every line a metric; `accuracy` is the mean of val-core/*/acc/mean@*."""

    title: str
    lines: tuple[tuple[str, str, str], ...]  # (metric, label suffix, line style)
    smooth: bool = True
    log: bool = False


def _one(title: str, metric: str, **options) -> Panel:
    return Panel(title, ((metric, "", "-"),), **options)


PANELS = (
    _one("mean reward", REWARD),
    _one("held-out accuracy", "accuracy", smooth=False),
    _one("entropy (nats a token)", "actor/entropy"),
    _one("gradient norm", "actor/grad_norm", log=True),
    _one("krpo: std of the advantages", "krpo/advantage_std"),
    _one("krpo: NIS (1: the model fits)", "krpo/nis", log=True),
    _one("krpo: |A| of first over last", "krpo/advantage_abs_first_over_last", log=True),
    Panel(
        "kpo: std of the token ratios",
        (("actor/kpo_ratio_std_raw", " before", ":"), ("actor/kpo_ratio_std_filtered", " after", "-")),
        log=True,
    ),
    _one("share of clipped tokens", "actor/pg_clipfrac"),
)


def read(path: str | os.PathLike) -> dict[str, Series]:
    """Every finite scalar of a run, metric -> {step: value}; metrics.jsonl is preferred to event files.

    FileNotFoundError where there is neither, ValueError for a file logger's log that is none.
    """
    path = Path(path)
    log = path / LOG if path.is_dir() else path
    if log.suffix == ".jsonl" and log.exists():
        rows = entries(log)
    elif files := _event_files(path):
        rows = _events(files)
    else:
        raise FileNotFoundError(f"{path} holds no {LOG} of verl's file logger and no TensorBoard event file")
    found: dict[str, Series] = {}
    for step, data in rows:
        for metric, value in data.items():
            if isinstance(value, int | float) and math.isfinite(value):
                found.setdefault(metric, {})[step] = float(value)
    accuracy: dict[int, list[float]] = {}
    for metric in [metric for metric in found if metric.startswith(ACCURACY) and "/acc/mean@" in metric]:
        for step, value in found[metric].items():
            accuracy.setdefault(step, []).append(value)
    if accuracy:
        found["accuracy"] = {step: statistics.fmean(values) for step, values in accuracy.items()}
    return found


def _event_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if ".tfevents." in path.name else []
    return sorted(path.rglob(EVENTS), key=lambda file: file.stat().st_mtime)


def _events(files: list[Path]):
    # Comes with verl's logger: who has event files has it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for metric in events.Tags()["scalars"]:
            for event in events.Scalars(metric):
                yield event.step, {metric: event.value}


def named(run: str) -> tuple[str, Path]:
    """NAME=PATH, or a path whose last part is the name."""
    name, given, path = run.partition("=")
    if given and not Path(run).exists():
        return name, Path(path)
    path = Path(run)
    return (path.stem if path.is_file() else path.resolve().name), path


def band(seeds: Sequence[Series]) -> tuple[list[int], list[float], list[float]]:
    """Steps, mean and standard deviation over the seeds that have each step; the deviation of one is 0."""
    steps = sorted(set().union(*seeds))
    values = [[series[step] for series in seeds if step in series] for step in steps]
    spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    return steps, [statistics.fmean(v) for v in values], spread


def _smooth(series: Series) -> Series:
    steps = sorted(series)
    window = min(WINDOW, max(1, len(steps) // 5))
    return dict(zip(steps, smoothed([series[step] for step in steps], window), strict=True))


def draw(methods: dict[str, list[dict[str, Series]]], out: str | os.PathLike) -> tuple[Path, list[str]]:
    """Draw every panel that has data to OUT.png and OUT.svg. methods: name -> seeds, each as `read` returns it.

    Returns the path of the PNG and the titles of the panels drawn. ValueError where no panel has data.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    logged = {metric for seeds in methods.values() for seed in seeds for metric in seed}
    panels = [panel for panel in PANELS if any(metric in logged for metric, _, _ in panel.lines)]
    if not panels:
        raise ValueError(f"nothing to draw: none of {', '.join(m for p in PANELS for m, _, _ in p.lines)} was logged")
    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * rows + 0.3), layout="constrained")
    for place, panel in enumerate(panels, 1):
        axes = figure.add_subplot(rows, columns, place)
        for number, (name, seeds) in enumerate(methods.items()):
            for metric, suffix, style in panel.lines:
                held = [seed[metric] for seed in seeds if metric in seed]
                if held:
                    _line(axes, held, panel, COLOURS[number % len(COLOURS)], name + suffix, style)
        axes.set_title(panel.title, loc="left", fontsize=10)
        if panel.log and all(value > 0 for line in axes.lines for value in line.get_ydata()):
            axes.set_yscale("log")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.grid(color="0.92", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        if place == 1 or len(panel.lines) > 1:
            axes.legend(frameon=False, fontsize=8)
    figure.supxlabel("training step", fontsize=9)
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".svg", ".png"):
        figure.savefig(out.with_name(out.name + suffix), dpi=150)
    return out.with_name(out.name + ".png"), [panel.title for panel in panels]


def _line(axes, seeds: list[Series], panel: Panel, colour: str, label: str, style: str) -> None:
    if panel.smooth:
        if len(seeds) == 1:
            steps = sorted(seeds[0])
            axes.plot(steps, [seeds[0][s] for s in steps], color=colour, alpha=0.25, linewidth=0.8, linestyle=style)
        seeds = [_smooth(series) for series in seeds]
    steps, mean, spread = band(seeds)
    few = len(steps) < 10
    axes.plot(steps, mean, color=colour, linewidth=1.8, linestyle=style, label=label, marker="o" if few else None)
    if len(seeds) > 1:
        low, high = ([m + sign * s for m, s in zip(mean, spread, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)


def show(runs: Sequence[str], out: str | os.PathLike) -> None:
    """Read the runs, draw, and say what is in the figure."""
    methods: dict[str, list[dict[str, Series]]] = {}
    for run in runs:
        name, path = named(run)
        methods.setdefault(name, []).append(read(path))
    drawn, titles = draw(methods, out)
    for name, seeds in methods.items():
        last = max((step for seed in seeds for series in seed.values() for step in series), default=0)
        print(f"{name}: {len(seeds)} run{'s' * (len(seeds) > 1)}, {last} steps")
    print(f"drawn: {', '.join(titles)}")
    print(f"figure: {drawn} and {drawn.with_suffix('.svg').name}")
