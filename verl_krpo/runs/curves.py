"""`verl-krpo curves`: what runs have learned, a table in the terminal and a figure.

A metric that a log does not have is named in the table; the rest is shown all the same.
"""

import math
import os
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from verl_krpo.report import tables
from verl_krpo.report.paired import differences
from verl_krpo.runs import log, plot
from verl_krpo.runs.log import ACCURACY, REWARD, SECONDS, Series
from verl_krpo.runs.plot import WINDOW

SHOWN = {REWARD: REWARD, SECONDS: SECONDS, ACCURACY: "val-core/*/acc/mean@*"}


@dataclass
class Run:
    """One run: every metric that was logged."""

    name: str
    folder: Path
    series: dict[str, Series]

    def values(self, metric: str) -> list[float]:
        return list(self.series.get(metric, {}).values())

    def numbers(self) -> tuple[float, ...]:
        """Accuracy before and after, mean reward of the first and last WINDOW steps, median seconds a step, or NaN."""
        accuracy, reward, seconds = (self.values(metric) or [math.nan] for metric in (ACCURACY, REWARD, SECONDS))
        first, last = statistics.fmean(reward[:WINDOW]), statistics.fmean(reward[-WINDOW:])
        return accuracy[0], accuracy[-1], first, last, statistics.median(seconds)

    def checkpoint(self) -> Path | None:
        """The newest checkpoint that verl finished writing."""
        step = log.saved_step(self.folder)
        return self.folder / f"global_step_{step}" if step else None


def read(path: str | os.PathLike) -> Run:
    """Read a run, a folder or its log. FileNotFoundError without a log, ValueError for one without a step."""
    path = Path(path)
    series = log.series(path)
    if not (REWARD in series or ACCURACY in series):
        raise ValueError(f"{path} holds neither {REWARD} nor {SHOWN[ACCURACY]}: has the first step ended?")
    return Run(log.name_of(path), path if path.is_dir() else path.parent, series)


def table(runs: Sequence[Run], drawn: Path | None = None) -> None:
    """Print one row a run, then the paths; fits in 80 columns."""
    rows = []
    for run in runs:
        *learned, seconds = map(_number, run.numbers())
        rows.append([run.name, *learned, str(max(run.series.get(REWARD, [0]))), seconds])
    rewards = (f"reward\nfirst {WINDOW}", f"\nlast {WINDOW}")
    tables.show(("run", "accuracy\nbefore", "\nafter", *rewards, "\nsteps", "s/step\nmedian"), rows)
    if rows := _over_seeds(runs):
        print()
        headings = ("method", "\nseeds", "accuracy\nbefore", "\nafter", f"reward\nlast {WINDOW}", "s/step\nmedian")
        tables.show(headings, rows)
    for run in runs:
        for metric, key in SHOWN.items():
            if metric not in run.series:
                print(f"{run.name}: the log holds no {key}")
        if len(run.values(ACCURACY)) == 1:
            print(f"{run.name}: validated once only, so before and after are one")
    for run in runs:
        if checkpoint := run.checkpoint():
            print(f"checkpoint{f' of {run.name}' if len(runs) > 1 else ''}: {checkpoint}")
    if drawn:
        print(f"figure: {drawn}")


def _methods(runs: Sequence[Run]) -> dict[str, list[Run]]:
    """The runs of each method, whose names end in `_seedN`; none where no method has two."""
    methods: dict[str, list[Run]] = {}
    for run in runs:
        methods.setdefault(re.sub(r"_seed\d+$", "", run.name), []).append(run)
    return methods if max(map(len, methods.values())) > 1 else {}


def _over_seeds(runs: Sequence[Run]) -> list[list[str]]:
    """Mean and standard deviation over the seeds of every method."""
    rows = []
    for name, seeds in _methods(runs).items():
        before, after, _, last, seconds = zip(*(run.numbers() for run in seeds), strict=True)
        rows.append([name, str(len(seeds)), *map(_mean_and_spread, (before, after, last, seconds))])
    return rows


def table_of_differences(runs: Sequence[Run], against: str) -> None:
    """Print reward and accuracy, and what they differ by from the method `against`, paired by seed.

    The mean reward of the whole run fluctuates less than the accuracy at its end.
    """

    def cells(_: int, mean: float, difference: float, half: float) -> list[str]:
        interval = "" if math.isnan(half) else f" ±{half:.3f}"
        return [_number(mean, 3), "-" if math.isnan(difference) else f"{difference:+.3f}{interval}"]

    rewards = {run.name: statistics.fmean(run.values(REWARD) or [math.nan]) for run in runs}
    reward = differences(rewards, against)
    accuracy = differences({run.name: run.numbers()[1] for run in runs}, against)
    headings = ("method", "\nseeds", "mean\nreward", f"to\n{against}", "accuracy\nat end", f"to\n{against}")
    print()
    rows = [[name, str(of[0]), *cells(*of), *cells(*accuracy[name])] for name, of in reward.items()]
    tables.show(headings, rows)


def _mean_and_spread(values: Sequence[float]) -> str:
    mean = statistics.fmean(values)  # NaN where a run did not log it
    spread = f" ±{statistics.stdev(values):.2f}" if len(values) > 1 and not math.isnan(mean) else ""
    return f"{_number(mean)}{spread}"


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def show(
    paths: Sequence[str | os.PathLike],
    out: str | os.PathLike | None = None,
    against: str | None = None,
) -> Path:
    """Read the runs, draw the figure (default: reward.png beside the first log) and print the tables asked for."""
    runs = [read(path) for path in paths]
    if not runs:
        raise ValueError("name at least one run: a metrics.jsonl or its folder")
    names = [run.name for run in runs]
    for run, path in zip(runs, paths, strict=True):
        if names.count(run.name) > 1:
            run.name = str(path)
    lines = _methods(runs) or {run.name: [run] for run in runs}
    series = {name: [run.series for run in seeds] for name, seeds in lines.items()}
    drawn, _ = plot.draw(series, out or runs[0].folder / "reward", plot.PANELS[:2])
    table(runs, drawn)
    if against:
        table_of_differences(runs, against)
    return drawn
