"""What `verl-krpo replay` shows: a verdict and a table in the terminal, and one HTML file that needs nothing else."""

import base64
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from verl_krpo import __version__
from verl_krpo.advantage import ESTIMATORS
from verl_krpo.config import KrpoConfig, Weight
from verl_krpo.replay.recompute import HISTOGRAM_EDGES, RANDOM_ORDERS, Replay
from verl_krpo.report import figure

COLUMNS = ("std", "max", "order", "first", "last", "no signal", "variance")
EXPLAINED = {
    "std": "standard deviation of the advantages; learning rates do not carry over where it differs",
    "max": "the largest advantage",
    "order": f"share of std(A) that is the order of the rows: {RANDOM_ORDERS} random orders of every step",
    "first": "mean size of the advantage of the first member of a group",
    "last": "the same of the last member; equal to the first's where the place does not matter",
    "no signal": "mean size of the advantage in groups whose rewards are all equal",
    "variance": "noise per signal, rloo = 1; below 1 is better. Where rollouts have log-probs or score weights w it is "
    "the variance of the policy gradient at equal expected length, E[w A^2]; where not, that of the rewards around the "
    "baseline, E[A^2], which is the gradient's only if right and wrong answers have scores of one size",
    "_score": "the estimator with weight=score",
}
# What selects each method in a verl job; the controls are no methods of verl's.
KEYS = {name: f"algorithm.adv_estimator={name}" for name in ("grpo", "rloo", "opo", *ESTIMATORS)}
KEYS |= {
    f"{name}_score": f"+algorithm={name} algorithm.{name}.weight=score" for name in ("krpo_adaptive", "krpo_memory")
}
TOO_MUCH = 1.05  # variance over rloo's from which a method is advised against


def verdict(run: Replay) -> list[str]:
    """The rewards in a line, how the methods compare, and the key to add."""
    sizes = np.unique(np.concatenate([row["sizes"] for row in run.per_step])).astype(int)
    groups = f"groups of {sizes[0]}" if len(sizes) == 1 else f"groups of {sizes[0]} to {sizes[-1]}"
    signal = f"{_percent(run.total('equal_groups'), run.total('groups'))} of the groups without signal"
    lines = [f"{groups}, rewards {'0/1' if run.every('binary') else 'of several values'}, {signal}."]
    variances = {method: run.variance(method) for method in run.methods if method != "rloo"}
    if math.isnan(variances["grpo"]):
        return [*lines, "No group has a spread: nothing can be learned from these rewards under any method."]
    settings = "published" if run.settings == KrpoConfig() else "your settings"
    compared = []
    for method, value in sorted(variances.items(), key=lambda item: item[1]):
        name = {"krpo": f"krpo ({settings})", "none": "no baseline"}.get(method, method)
        interval = run.interval(method)
        text = f"{name} {value:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")
        compared.append(text + (": do not use" if value > TOO_MUCH and method in KEYS else ""))
    lines.append(f"{of_what(run)}, rloo = 1: {', '.join(compared)}.")
    if len(run.per_step) < 10:
        lines.append(f"From {len(run.per_step)} step{'s' * (len(run.per_step) > 1)}: too few for intervals.")
    best = min(variances.keys() & KEYS.keys(), key=variances.__getitem__)
    interval = run.interval(best)
    if interval and interval[1] >= 1 or variances[best] > 0.99:
        return [*lines, f"Nothing is clearly better than rloo here: {KEYS['rloo']}"]
    return [*lines, f"To use {best}, add: {KEYS[best]}"]


def of_what(run: Replay) -> str:
    """Whose variance is shown."""
    if Weight.score in run.kinds:
        return "Variance of the gradient"
    return "Variance of the rewards (no log-probs here to tell the gradient's)"


def cells(run: Replay, method: str) -> list[str]:
    """One row of the table: the numbers of COLUMNS."""
    totals = run.totals[method]
    std = totals.std()
    order = math.sqrt(totals.order / totals.rows) / std if std else math.nan
    several, equal_rows = run.total("groups_of_several"), run.total("equal_rows")
    first, last = totals.ends / several if several else (math.nan, math.nan)
    equal = totals.equal / equal_rows if equal_rows else math.nan
    return [number(v) for v in (std, totals.largest, order, first, last, equal, run.variance(method))]


def facts(run: Replay) -> list[tuple[str, str]]:
    """(what, value) rows about the rollouts themselves."""
    count, groups, equal = (run.total(key) for key in ("rows", "groups", "equal_groups"))
    mean, squares, steps = run.total("sum") / count, run.total("squares"), len(run.per_step)
    rows = [
        ("responses", f"{count:,} in {groups:,} groups, {steps:,} step{'s' * (steps > 1)}"),
        ("reward", f"mean {number(mean)}, std {number(math.sqrt(max(0.0, squares / count - mean**2)))}"),
        ("no signal", f"equal rewards in {equal:,} groups ({_percent(equal, groups)})"),
    ]
    known = len(run.memories["krpo_memory"])
    prompts = f"{known:,}, each {number(groups / max(1, known))} times"
    rows.append(
        ("prompts", prompts if run.every("named") else "rows have no input: krpo_memory knows none of them again")
    )
    if singles := groups - run.total("groups_of_several"):
        rows.append(("groups of one", f"{singles:,}"))
    changed = {k: v for k, v in vars(run.settings).items() if v != getattr(KrpoConfig(), k)}
    named = ", ".join(f"{k}={getattr(v, 'value', v)}" for k, v in changed.items())
    rows.append(("krpo", named or "the published settings"))
    fits = [row for row in run.per_step if not math.isnan(row["nis"])]
    nis = sum(row["nis"] * row["rows"] for row in fits) / sum(row["rows"] for row in fits) if fits else math.nan
    verdict = "right" if 0.5 <= nis <= 2 else "too small: rewards vary more than Q, R and the prior say"
    if nis < 0.5:
        verdict = "too large: rewards vary less than Q, R and the prior say"
    rows.append(("NIS", f"{number(nis)} (1 is right; the noise is {verdict})" if nis == nis else "not defined"))
    if run.reading.by_text:
        text = "rows have no uid: grouped by prompt text, so a prompt drawn twice in a step is one group"
        rows.append(("grouping", text))
    if run.reading.damaged:
        rows.append(("damaged", f"{run.reading.damaged:,} of {run.reading.lines:,} lines were left out"))
        rows += [("", example) for example in run.reading.examples]
    return rows


def number(value: float) -> str:
    """Three digits, no exponent where there need be none."""
    if not math.isfinite(value):
        return "-"
    if value == 0 or 1e-3 <= abs(value) < 1e5:
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return "0" if abs(value) < 1e-12 else f"{value:.1e}"


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def show(runs: Sequence[Replay]) -> None:
    """The report for a terminal of 80 columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for run in runs:
        console.print(Text(f"\n{run.name}", style="bold"))
        for line in verdict(run):
            console.print(Text(line))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for what, value in facts(run):
            table.add_row(Text(what), Text(value))
        console.print()
        console.print(table)
        console.print()
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("advantages", no_wrap=True)
        for heading in COLUMNS:
            table.add_column(heading, justify="right")
        for method in run.methods:
            table.add_row(method, *cells(run, method))
        console.print(table)
        console.print(Text("first, last, no signal: mean size of A there; variance: rloo = 1", style="dim"))


def write(runs: Sequence[Replay], path: str | Path) -> Path:
    """Write `html` to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html(runs), encoding="utf-8")
    return path


def html(runs: Sequence[Replay]) -> str:
    """The report as one HTML page: text, tables and figures, no script, nothing loaded."""
    from jinja2 import Environment, PackageLoader

    page = Environment(loader=PackageLoader("verl_krpo", "replay"), autoescape=True).get_template("page.html.j2")
    methods = list(dict.fromkeys(method for run in runs for method in run.methods))
    shown = {"methods": methods, "columns": COLUMNS, "explained": EXPLAINED, "version": __version__}
    return page.render(runs=runs, cells=cells, facts=facts, number=number, pictures=pictures, verdict=verdict, **shown)


def pictures(run: Replay) -> list[tuple[str, str]]:
    """(title, SVG as base64) of every figure."""
    at = [row["step"] for row in run.per_step]
    per_step = {key: {m: [row[m][key] for row in run.per_step] for m in run.methods} for key in ("std", "order")}
    reward = {"mean reward": "reward", "groups without signal": "no_signal"}
    reward = {label: [row[key] for row in run.per_step] for label, key in reward.items()}
    groups_at = np.trim_zeros(run.total("groups_at"))
    places = np.arange(1, 1 + len(groups_at))
    by_place = {m: run.totals[m].by_place[: len(places)] / groups_at for m in run.methods}
    return [
        _lines("Mean size of the advantage by place in the group: flat where order does not matter",
               places, by_place, "place in the group", "mean |A|", log=True),
        _distribution("Distribution of the advantages, each in its step's standard deviations", run),
        _lines("Mean reward, and the share of groups whose rewards are all equal", at, reward, "training step"),
        _lines("Standard deviation of the advantages", at, per_step["std"], "training step", "std(A)", log=True),
        _lines("How much of an advantage is the order of the rows",
               at, per_step["order"], "training step", "order / std(A)"),
    ]  # fmt: skip


def _lines(title: str, x, series: dict, xlabel: str, ylabel: str = "", log: bool = False) -> tuple[str, str]:
    drawn, ((axis,),) = figure.axes(1, 1, 6, 3.4)
    colors = _colors(series)
    for name, values in series.items():
        style = {"ls": "--" if name.endswith("_score") else "-", "marker": "o" if len(x) < 10 else None}
        axis.plot(x, values, color=colors[name], label=name, markersize=3, **style)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if log and any(np.max(values) > 0 for values in series.values()):
        axis.set_yscale("log")
    elif not log:
        axis.set_ylim(min(0, axis.get_ylim()[0]), max(1, axis.get_ylim()[1]))
    figure.whole_steps(axis)
    figure.legend(drawn, ncols=min(4, len(series)), fontsize=8)
    return _svg(title, drawn)


def _colors(names: Iterable[str]) -> dict[str, str]:
    """A method with weights has the color of the one without."""
    bases = {name: name.removesuffix("_score") for name in names}
    colors = figure.colors(list(dict.fromkeys(bases.values())))
    return {name: colors[base] for name, base in bases.items()}


def _distribution(title: str, run: Replay) -> tuple[str, str]:
    drawn, axes = figure.panels(len(run.methods), 6, 1.5, sharex=True, sharey=True)
    colors = _colors(run.methods)
    middle = (HISTOGRAM_EDGES[1:-2] + HISTOGRAM_EDGES[2:-1]) / 2
    for axis, method in zip(axes, run.methods, strict=True):
        counts = run.totals[method].histogram
        share = counts[1:-1] / max(1, counts.sum())
        axis.fill_between(middle, share, step="mid", color=colors[method], linewidth=0)
        axis.set_title(method, loc="left", fontsize=9)
        axis.set_xlim(-6, 6)
        if share.any():
            axis.set_yscale("log")
    drawn.supxlabel("A / std(A) of its step", fontsize=10)
    drawn.supylabel("share of the responses", fontsize=10)
    return _svg(title, drawn)


def _svg(title: str, drawn) -> tuple[str, str]:
    data = io.BytesIO()
    drawn.savefig(data, format="svg", metadata={"Date": None})
    return title, base64.b64encode(data.getvalue()).decode()
