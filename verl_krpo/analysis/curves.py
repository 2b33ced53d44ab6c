"""What runs have learned: a table in the terminal and a figure, from the log of verl's `file` logger.

A run is a metrics.jsonl (trainer.logger=["console","file"], VERL_FILE_LOGGER_PATH) or the folder that holds it, one
line a step: {"step": int, "data": {metric: number}}. What is read from it:

    critic/score/mean           mean reward of the step's rollouts
    timing_s/step               seconds the step took
    val-core/<data>/acc/...     held-out accuracy; verl validates before the first step and every trainer.test_freq

A metric that a log lacks is named in the table; the rest is shown all the same.
"""

import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

REWARD, SECONDS, ACCURACY = "critic/score/mean", "timing_s/step", "val-core/"
LOG = "metrics.jsonl"
WINDOW = 10
# Okabe and Ito's colours, which colour-blind readers tell apart, the darkest first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")


@dataclass
class Run:
    """One run, each series as {step: value}; an empty one was not logged."""

    name: str
    path: Path
    reward: dict[int, float] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    accuracy: dict[int, float] = field(default_factory=dict)
    checkpoint: Path | None = None

    def missing(self) -> list[str]:
        """Names of the metrics that the log lacks."""
        held = {REWARD: self.reward, SECONDS: self.seconds, f"{ACCURACY}*/acc/*": self.accuracy}
        return [key for key, series in held.items() if not series]


def read(path: str | os.PathLike) -> Run:
    """Read a log, or the log in a folder. A line that a killed run left half-written at the end is passed over.

    FileNotFoundError without a log; ValueError for a line that is no such log's, or no step at all.
    """
    path = Path(path)
    log = path / LOG if path.is_dir() else path
    if not log.exists():
        raise FileNotFoundError(
            f'{log} does not exist: train with trainer.logger=\'["console","file"]\' and VERL_FILE_LOGGER_PATH={log}'
        )
    run = Run(name=log.parent.name if log.name == LOG else log.stem, path=log, checkpoint=_checkpoint(log.parent))
    for step, data in entries(log):
        _keep(run, step, data)
    if not (run.reward or run.accuracy):
        raise ValueError(f"{log} holds neither {REWARD} nor {ACCURACY}*/acc/*: has the first step ended?")
    return run


def entries(log: Path) -> Iterator[tuple[int, dict]]:
    """(step, {metric: number}) of every line; one left half-written at the end is passed over.

    ValueError for a line that is not the file logger's.
    """
    lines = log.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            entry = json.loads(line)
            step, data = int(entry["step"]), entry["data"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines) > 1:
                return
            raise ValueError(f"{log}, line {number} is not one of verl's file logger: {line[:80]!r}") from error
        yield step, data


def _keep(run: Run, step: int, data: dict) -> None:
    for key, series in ((REWARD, run.reward), (SECONDS, run.seconds)):
        if key in data:
            series[step] = data[key]
    # One mean over the data sources; verl's mean@k is the mean of k samples a problem.
    held_out = [v for k, v in data.items() if k.startswith(ACCURACY) and "/acc/mean@" in k]
    if held_out:
        run.accuracy[step] = statistics.fmean(held_out)


def _checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that verl finished writing below `folder`."""
    latest = folder / "latest_checkpointed_iteration.txt"
    return folder / f"global_step_{latest.read_text().strip()}" if latest.exists() else None


def mean_of(series: dict[int, float], first: bool) -> float:
    """Mean over the first or last WINDOW steps, NaN for an empty series."""
    values = [series[step] for step in sorted(series)]
    return statistics.fmean(values[:WINDOW] if first else values[-WINDOW:]) if values else math.nan


def smoothed(values: Sequence[float], window: int = WINDOW) -> list[float]:
    """Centred moving mean; near the ends over the values there are."""
    half = window // 2
    return [statistics.fmean(values[max(0, i - half) : i + half + 1]) for i in range(len(values))]


def table(runs: Sequence[Run], figure: Path | None = None, console=None) -> None:
    """Print one row a run, then the paths; fits in 80 columns."""
    from rich.console import Console
    from rich.table import Table

    console = console or Console(soft_wrap=False)
    shown = Table(title=None, show_edge=False, pad_edge=False)
    shown.add_column("run", overflow="fold", max_width=24)
    for heading in (
        "accuracy\nbefore",
        "\nafter",
        f"reward\nfirst {WINDOW}",
        f"\nlast {WINDOW}",
        "\nsteps",
        "s/step\nmedian",
    ):
        shown.add_column(heading, justify="right")
    for run in runs:
        *learned, seconds = map(_number, figures_of(run))
        shown.add_row(run.name, *learned, str(max(run.reward, default=0)), seconds)
    console.print(shown)
    _over_seeds(runs, console)
    for run in runs:
        for key in run.missing():
            console.print(f"{run.name}: the log holds no {key}", soft_wrap=True, markup=False, highlight=False)
        if len(run.accuracy) == 1:
            console.print(f"{run.name}: validated once only, so before and after are one", soft_wrap=True, markup=False)
    paths = [(f"checkpoint of {run.name}" if len(runs) > 1 else "checkpoint", run.checkpoint) for run in runs]
    for label, path in [*paths, ("figure", figure)]:
        if path is not None:
            console.print(f"{label}: {path}", soft_wrap=True, markup=False, highlight=False)


def figures_of(run: Run) -> tuple[float, ...]:
    """Accuracy before and after, mean reward of the first and last WINDOW steps, median seconds a step; NaN: no log."""
    return (
        _at(run.accuracy, min),
        _at(run.accuracy, max),
        mean_of(run.reward, first=True),
        mean_of(run.reward, first=False),
        statistics.median(run.seconds.values()) if run.seconds else math.nan,
    )


def _over_seeds(runs: Sequence[Run], console) -> None:
    """A second table where runs differ in their `_seedN` alone: mean and standard deviation over the seeds."""
    from rich.table import Table

    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(re.sub(r"_seed\d+$", "", run.name), []).append(run)
    if max(map(len, groups.values())) < 2:
        return
    shown = Table(title=None, show_edge=False, pad_edge=False)
    shown.add_column("method", overflow="fold", max_width=22)
    for heading in ("\nseeds", "accuracy\nbefore", "\nafter", f"reward\nlast {WINDOW}", "s/step\nmedian"):
        shown.add_column(heading, justify="right")
    for name, seeds in groups.items():
        before, after, _, last, seconds = zip(*map(figures_of, seeds), strict=True)
        shown.add_row(name, str(len(seeds)), *map(_mean_and_spread, (before, after, last, seconds)))
    console.print()
    console.print(shown)


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{_number(statistics.fmean(values))}{spread}"


def _at(series: dict[int, float], pick) -> float:
    return series[pick(series)] if series else math.nan


def _number(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"


def plot(runs: Sequence[Run], path: str | os.PathLike) -> Path:
    """Draw the mean reward (faint; smoothed over WINDOW steps) and held-out accuracy (points) to PATH.png and PATH.svg.

    Returns the path of the PNG.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    alone = len(runs) == 1
    for run, colour in zip(runs, _cycle(len(runs)), strict=True):
        steps = sorted(run.reward)
        values = [run.reward[step] for step in steps]
        axes.plot(steps, values, color=colour, alpha=0.25, linewidth=1)
        line = "mean reward" if alone else run.name
        axes.plot(steps, smoothed(values), color=colour, linewidth=2, label=line)
        at = sorted(run.accuracy)
        heights = [run.accuracy[step] for step in at]
        points = "held-out accuracy" if alone else None
        axes.plot(at, heights, "o", color=colour, markeredgecolor="white", label=points, clip_on=False, zorder=3)
        if alone and at:
            for step, height in ((at[0], heights[0]), (at[-1], heights[-1])):
                axes.annotate(f"{height:.2f}", (step, height), (0, -15), textcoords="offset points", ha="center")
    axes.set_xlabel("training step")
    axes.set_ylabel("reward, accuracy" if alone else "mean reward (lines), held-out accuracy (points)")
    logged = [value for run in runs for series in (run.reward, run.accuracy) for value in series.values()]
    axes.set_ylim(min(0, *logged), max(1, *logged))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(color="0.9", linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    title = runs[0].name if alone else None
    figure.legend(loc="outside upper left", frameon=False, ncols=3, title=title, alignment="left")

    path = Path(path).with_suffix("")
    path.parent.mkdir(parents=True, exist_ok=True)
    for suffix in (".svg", ".png"):
        figure.savefig(path.with_name(path.name + suffix), dpi=150)
    return path.with_name(path.name + ".png")


def _cycle(count: int) -> list[str]:
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def show(paths: Sequence[str | os.PathLike], figure: str | os.PathLike | None = None, console=None) -> Path:
    """Read the runs, draw the figure (default: reward.png beside the first log) and print the table."""
    runs = [read(path) for path in paths]
    if not runs:
        raise ValueError("name at least one run: a metrics.jsonl or its folder")
    names = [run.name for run in runs]
    for run in runs:
        if names.count(run.name) > 1:
            run.name = str(run.path)
    drawn = plot(runs, figure or runs[0].path.parent / "reward")
    table(runs, drawn, console)
    return drawn
