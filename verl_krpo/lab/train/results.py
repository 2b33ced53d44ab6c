"""What many runs say, a condition at a time: every method against its reference, the first of REFERENCES that was run.

accuracy    interquartile mean over the seeds of the accuracy at the end, 95 % interval by the bootstrap
difference  mean over the seeds of the paired difference at the end, 95 % interval by Student's t
area        the same of the accuracy averaged over the run, which fluctuates less
to_other, area_to_other    these two to another method, GRPO if none is named
wins        share of the seeds in which the method ends higher
rollouts    until the mean curve reaches the level that the reference has after three quarters of its rollouts, over
            the reference's own; 95 % interval by the bootstrap over seeds, paired; inf: not reached in the run
collapsed   seeds that end below where they began; shown where there is one

One seed has no interval, and fewer than FEWEST_SEEDS have none by the bootstrap.
"""

from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy import stats

from verl_krpo.report import figure, tables
from verl_krpo.report.intervals import Measured, bootstrapped, half_width, mean_and_half

# batch_mean where groups are of one, reinforce of policy losses, uniform_rloo of choices of prompts
REFERENCES = ("rloo", "batch_mean", "reinforce", "uniform_rloo")
LEVEL_AFTER = 0.75  # of the reference's rollouts
FEWEST_SEEDS = 5  # seeds that a bootstrap needs


def by_condition(rows: list[dict]) -> dict[str, dict[str, dict[int, dict]]]:
    """condition -> method -> seed -> line of the CSV, its curve as an array.

    Runs of a seed are paired: ValueError where they begin with different models. Seeds may have different ones, since
    a warm start differs from machine to machine.
    """
    runs: dict = defaultdict(lambda: defaultdict(dict))
    for row in rows:
        line = row | {"curve": np.array(row["curve"].split(), dtype=float)}
        seeds = runs[row["condition"]][row["method"]]
        if int(row["seed"]) in seeds:
            raise ValueError(f"{row['condition']}, {row['method']}, seed {row['seed']} is in the CSV twice")
        seeds[int(row["seed"])] = line
    for condition, methods in runs.items():
        for seed in {seed for seeds in methods.values() for seed in seeds}:
            starts = {seeds[seed]["curve"][0] for seeds in methods.values() if seed in seeds}
            if len(starts) > 1:
                raise ValueError(
                    f"{condition}, seed {seed}: runs of several models, which begin at "
                    f"{', '.join(map(str, sorted(starts)))}: runs of one seed are to be made on one machine"
                )
    return runs


def summary(rows: list[dict], other: str = "grpo") -> list[dict]:
    """One line a condition and method; over the seeds that the method shares with its reference."""
    lines = []
    for condition, methods in by_condition(rows).items():
        reference = next((name for name in REFERENCES if name in methods), None)
        if reference is None:
            raise ValueError(f"{condition}: none of {', '.join(REFERENCES)} to compare with")
        for method, runs in sorted(methods.items(), key=lambda item: _order(item[0])):
            seeds = sorted(runs.keys() & methods[reference].keys())
            own, of_reference = ([of[seed] for seed in seeds] for of in (runs, methods[reference]))
            if seeds:
                line = {"condition": condition, "reference": reference, "method": method, "seeds": len(seeds)}
                line |= compare(own, of_reference) | to_other(runs, methods.get(other, {})) | {"other": other}
                lines.append(line)
    return lines


def _order(method: str) -> int:
    """As in the palette: related methods beside one another."""
    known = list(figure.METHOD_COLORS)
    return known.index(method) if method in known else len(known)


def compare(own: list[dict], other: list[dict]) -> dict[str, float]:
    """The measures above, of paired runs."""
    curves, others = (np.stack([run["curve"] for run in runs]) for runs in (own, other))
    difference = curves[:, -1] - others[:, -1]
    accuracy, low, high = over_seeds(interquartile_mean, curves)
    ratio, ratio_low, ratio_high = over_seeds(rollouts, curves, others)
    return {
        "accuracy": accuracy,
        "accuracy_low": low,
        "accuracy_high": high,
        **_paired("difference", difference),
        **_paired("area", curves.mean(1) - others.mean(1)),
        "wins": float((difference > 0).mean()),
        "rollouts": ratio,
        "rollouts_low": ratio_low,
        "rollouts_high": ratio_high,
        "collapsed": int((curves[:, -1] < curves[:, 0]).sum()),
    }


def to_other(runs: dict[int, dict], others: dict[int, dict]) -> dict[str, float]:
    """Paired differences at the end and over the run, with half of their intervals; NaN where the other was not run."""
    if not (seeds := sorted(runs.keys() & others.keys())):
        return dict.fromkeys(("to_other", "to_other_half", "area_to_other", "area_to_other_half"), np.nan)
    own, other = (np.stack([of[seed]["curve"] for seed in seeds]) for of in (runs, others))
    return _paired("to_other", own[:, -1] - other[:, -1]) | _paired("area_to_other", own.mean(1) - other.mean(1))


def _paired(name: str, difference: np.ndarray) -> dict[str, float]:
    """Mean over the seeds, and half of its interval."""
    return dict(zip((name, f"{name}_half"), mean_and_half(difference), strict=True))


def interquartile_mean(curves: np.ndarray) -> np.ndarray:
    """Of the last accuracies of curves (..., seeds, times)."""
    return stats.trim_mean(curves[..., -1], 0.25, axis=-1)


def rollouts(curves: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Where the mean of curves (..., seeds, times) first reaches the level, over where the mean of the others does.

    inf where it never does; NaN where the others begin above the level, that is where they have learned nothing.
    """
    own, other = curves.mean(-2), others.mean(-2)
    before = int(LEVEL_AFTER * (other.shape[-1] - 1))
    part = LEVEL_AFTER * (other.shape[-1] - 1) - before
    level = (1 - part) * other[..., before] + part * other[..., min(before + 1, other.shape[-1] - 1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        return first_at(own, level) / first_at(other, level)


def first_at(curve: np.ndarray, level: np.ndarray) -> np.ndarray:
    """The time, interpolated, at which curves (..., times) first reach a level (...); inf if they never do."""
    reached = curve >= level[..., None]
    k = reached.argmax(-1)
    value, previous = (np.take_along_axis(curve, at[..., None], -1)[..., 0] for at in (k, np.maximum(k - 1, 0)))
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.where(k > 0, k - 1 + (level - previous) / (value - previous), 0.0)
    return np.where(reached.any(-1), between, np.inf)


def over_seeds(statistic, *paired: np.ndarray) -> Measured:
    """Of a statistic of arrays (seeds, times): its value, and the 95 % interval over the seeds, NaN of few."""
    if len(paired[0]) < FEWEST_SEEDS:
        return Measured(float(statistic(*paired)), np.nan, np.nan)
    return bootstrapped(statistic, *paired, rng=np.random.default_rng(0), method="nearest")


def as_table(lines: list[dict]) -> str:
    cells = [
        [
            line["condition"],
            line["method"],
            str(line["seeds"]),
            f"{line['accuracy']:.3f}" + _interval(f"{line['accuracy_low']:.3f}", f"{line['accuracy_high']:.3f}"),
            signed(line["difference"], line["difference_half"]),
            signed(line["area"], line["area_half"]),
            signed(line["to_other"], line["to_other_half"]),
            signed(line["area_to_other"], line["area_to_other_half"]),
            f"{line['wins']:.0%}",
            rollouts_cell(line),
        ]
        for line in lines
    ]
    references = {line["reference"] for line in lines}
    to = f"to {references.pop()}" if len(references) == 1 else "to reference"
    to_other = f"to {lines[0]['other']}"
    header = ["condition", "method", "seeds", "accuracy", to, "area", to_other, "area", "wins", "rollouts"]
    if any(line["collapsed"] for line in lines):
        header.append("collapsed")
        cells = [[*cell, str(line["collapsed"])] for cell, line in zip(cells, lines, strict=True)]
    return tables.table(header, cells)


def rollouts_cell(line: dict) -> str:
    """Of a line of `summary`."""
    return _ratio(line["rollouts"]) + _interval(_ratio(line["rollouts_low"]), _ratio(line["rollouts_high"]))


def signed(value: float, half: float) -> str:
    """A dash where there is no interval, as of one seed or of a method to itself."""
    return f"{value:+.3f} ± {half:.3f}" if half > 0 else "-"


def _interval(low: str, high: str) -> str:
    return "" if {"nan", "-"} & {low, high} or low == high else f" ({low} to {high})"


def _ratio(value: float) -> str:
    return "never" if np.isinf(value) else "-" if np.isnan(value) else f"{value:.2f}"


def draw_curves(rows: list[dict], path: Path) -> None:
    """A panel a condition: held-out accuracy over rollouts, mean over the seeds and its 95 % interval."""
    runs = by_condition(rows)
    drawn, panels = figure.panels(len(runs), 11, 3.2)
    colors = figure.colors(sorted({row["method"] for row in rows}))
    for panel, (condition, methods) in zip(panels, runs.items(), strict=True):
        for method in sorted(methods):
            seeds = list(methods[method].values())
            curves = np.stack([run["curve"] for run in seeds])
            mean, half = curves.mean(0), [half_width(values) for values in curves.T]
            at = np.arange(curves.shape[1]) * int(seeds[0]["rollouts"])
            figure.band(panel, at, mean, mean - half, mean + half, colors[method], label=method)
        counts = sorted({len(seeds) for seeds in methods.values()})
        panel.set_title(f"{condition}, seeds: {' to '.join(map(str, dict.fromkeys((counts[0], counts[-1]))))}")
        panel.set_xlabel("rollouts")
    panels[0].set_ylabel("held-out accuracy")
    figure.legend(drawn, ncols=6)
    figure.save(drawn, path)


def draw_differences(lines: list[dict], path: Path) -> None:
    """A forest plot a condition: the paired difference of every method and its 95 % interval."""
    conditions = list(dict.fromkeys(line["condition"] for line in lines))
    drawn, panels = figure.panels(len(conditions), 11, 2.6, sharex=True)
    colors = figure.colors(sorted({line["method"] for line in lines}))
    for panel, condition in zip(panels, conditions, strict=True):
        shown = [line for line in lines if line["condition"] == condition and line["method"] != line["reference"]]
        shown.sort(key=lambda line: line["difference"])
        for k, line in enumerate(shown):
            at, half = line["difference"], line["difference_half"]
            panel.errorbar(at, k, xerr=half, fmt="o", ms=4, color=colors[line["method"]])
        panel.set_yticks(range(len(shown)), [line["method"] for line in shown])
        panel.axvline(0, color="0.3", linewidth=0.8, linestyle="--")
        panel.set_title(condition)
        panel.set_xlabel("accuracy less the reference's, paired")
    figure.save(drawn, path)
