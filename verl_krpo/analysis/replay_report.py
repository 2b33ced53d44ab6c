"""What `verl-krpo replay` shows: a table in the terminal and one HTML file that needs nothing else."""

import base64
import html
import io
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from verl_krpo import __version__
from verl_krpo.analysis.replay import EDGES, METHODS, ORDERS, PLACES, Replay
from verl_krpo.config import KrpoConfig
from verl_krpo.runs import figure as look

COLOURS = [look.color(method) for method in METHODS]

COLUMNS = ("std", "max", "order", "first", "last", "no signal", "variance")
EXPLAINED = {
    "std": "standard deviation of the advantages; learning rates do not carry over where it differs",
    "max": "the largest advantage",
    "order": f"share of std(A) that is the order of the rows: {ORDERS} random orders of every step",
    "first": "mean size of the advantage of the first member of a group",
    "last": "the same of the last member; equal to the first's where the place does not matter",
    "no signal": "mean size of the advantage in groups whose rewards are all equal",
    "variance": "variance of the policy gradient at equal expected length, rloo = 1, from rewards drawn anew from each "
    "prompt's own; below 1 is better",
}


def cells(run: Replay, method: str) -> list[str]:
    """One row of the table: the numbers of COLUMNS."""
    totals = run.totals[method]
    std = totals.std()
    order = math.sqrt(totals.order / totals.rows) / std if std else math.nan
    first, last = totals.ends / run.multiple_groups if run.multiple_groups else (math.nan, math.nan)
    equal = totals.equal / totals.equal_rows if totals.equal_rows else math.nan
    return [number(v) for v in (std, totals.largest, order, first, last, equal, run.variance(method))]


def facts(run: Replay) -> list[tuple[str, str]]:
    """(what, value) rows about the rollouts themselves."""
    count, total, squares = run.rewards
    mean = total / count
    rows = [
        ("responses", f"{count:,} in {run.groups:,} groups, {len(run.per_step):,} step{'s' * (len(run.per_step) > 1)}"),
        ("reward", f"mean {number(mean)}, std {number(math.sqrt(max(0.0, squares / count - mean**2)))}"),
        ("no signal", f"equal rewards in {run.equal_groups:,} groups ({_percent(run.equal_groups, run.groups)})"),
    ]
    if run.singletons:
        rows.append(("groups of one", f"{run.singletons:,}"))
    changed = {k: v for k, v in vars(run.settings).items() if v != getattr(KrpoConfig(), k)}
    named = ", ".join(f"{k}={getattr(v, 'value', v)}" for k, v in changed.items())
    rows.append(("krpo", named or "the published settings"))
    nis = run.nis[0] / run.nis[1] if run.nis[1] else math.nan
    verdict = "fits" if 0.5 <= nis <= 2 else "too small: rewards vary more than Q, R and the prior say"
    if nis < 0.5:
        verdict = "too large: rewards vary less than Q, R and the prior say"
    rows.append(("NIS", f"{number(nis)} (1 is right; the noise is {verdict})" if nis == nis else "not defined"))
    if run.fit is None:
        rows.append(("fitted", "no group has a spread: nothing to fit"))
    else:
        fit = run.fit
        values = f"Q={number(fit.process_var)} R={number(fit.measurement_var)}"
        prior = f"m0={number(fit.init_mean)} P0={number(fit.init_var)}"
        rows.append(("fitted", f"{values} {prior} (log-likelihood +{number(fit.gain_per_reward)} a reward)"))
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


def show(runs: Sequence[Replay], console=None) -> None:
    """The report for a terminal of 80 columns."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console(highlight=False)
    for run in runs:
        console.print(Text(f"\n{run.name}", style="bold"))
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for what, value in facts(run):
            table.add_row(Text(what), Text(value))
        console.print(table)
        console.print()
        table = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("advantages", no_wrap=True)
        for heading in COLUMNS:
            table.add_column(heading, justify="right")
        for method in METHODS:
            table.add_row(method, *cells(run, method))
        console.print(table)
        console.print(Text("first, last, no signal: mean size of A there; variance: rloo = 1", style="dim"))


def page(runs: Sequence[Replay]) -> str:
    """The report as one HTML page: text, tables and figures, no script, nothing loaded."""
    parts = [_section(run) for run in runs]
    if len(runs) > 1:
        parts.insert(0, _overview(runs))
    glossary = "".join(f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in EXPLAINED.items())
    return PAGE.format(body="\n".join(parts), glossary=glossary, version=__version__)


def _section(run: Replay) -> str:
    rows = "".join(f"<tr><th>{html.escape(k)}</th><td>{html.escape(v)}</td></tr>" for k, v in facts(run))
    head = "".join(f"<th>{html.escape(c)}</th>" for c in ("method", *COLUMNS))
    body = "".join(
        f"<tr><th>{m}</th>{''.join(f'<td>{html.escape(c)}</td>' for c in cells(run, m))}</tr>" for m in METHODS
    )
    figures = "".join(_picture(draw, title, run) for draw, title in FIGURES)
    return (
        f"<h2>{html.escape(run.name)}</h2><div class=scroll><table>{rows}</table></div>"
        "<h3>Four estimators on these rewards</h3><div class=scroll><table class=numbers>"
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{figures}"
    )


def _overview(runs: Sequence[Replay]) -> str:
    head = "".join(f"<th>{m}</th>" for m in METHODS)
    rows = "".join(
        f"<tr><th>{html.escape(run.name)}</th>{''.join(f'<td>{number(run.variance(m))}</td>' for m in METHODS)}</tr>"
        for run in runs
    )
    return (
        "<h2>Variance of the gradient, rloo = 1</h2><div class=scroll><table class=numbers><thead><tr><th>run</th>"
        f"{head}</tr></thead><tbody>{rows}</tbody></table></div>"
    )


def _picture(draw, title: str, run: Replay) -> str:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6, 3.4), layout="constrained")
    with rc_context({"svg.hashsalt": title, "font.size": 10}):
        draw(figure, run)
        for axes in figure.axes:
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            if draw in LOGARITHMIC and any(h > 0 for h in _heights(axes)):
                axes.set_yscale("log")
            axes.spines[["top", "right"]].set_visible(False)
        data = io.BytesIO()
        figure.savefig(data, format="svg", metadata={"Date": None})
    source = base64.b64encode(data.getvalue()).decode()
    return (
        f'<figure><img alt="{html.escape(title)}" src="data:image/svg+xml;base64,{source}">'
        f"<figcaption>{html.escape(title)}</figcaption></figure>"
    )


def _heights(axes) -> list[float]:
    lines = [height for line in axes.lines for height in line.get_ydata()]
    return lines + [y for area in axes.collections for path in area.get_paths() for _, y in path.vertices]


def _places(figure, run: Replay) -> None:
    axes = figure.add_subplot()
    count = min(int(np.flatnonzero(run.groups_at)[-1]) + 1, PLACES)
    for method, colour in zip(METHODS, COLOURS, strict=False):
        size = run.totals[method].by_place[:count] / run.groups_at[:count]
        axes.plot(np.arange(1, count + 1), size, marker="o", markersize=3, color=colour, label=method)
    axes.set(xlabel="place in the group", ylabel="mean |A|")
    axes.legend(frameon=False, fontsize=8)


def _distribution(figure, run: Replay) -> None:
    middle = (EDGES[1:-2] + EDGES[2:-1]) / 2
    panels = figure.subplots(2, 2, sharex=True, sharey=True).flat
    for axes, method, colour in zip(panels, METHODS, COLOURS, strict=False):
        counts = run.totals[method].histogram
        axes.fill_between(middle, counts[1:-1] / max(1, counts.sum()), step="mid", color=colour, linewidth=0)
        axes.set_title(method, loc="left", fontsize=9)
        axes.set(xlim=(-6, 6))
    figure.supxlabel("A / std(A) of its step", fontsize=10)
    figure.supylabel("share of the responses", fontsize=10)


def _steps(figure, run: Replay) -> None:
    axes = figure.add_subplot()
    at = [row["step"] for row in run.per_step]
    for key, label, colour in (("reward", "mean reward", 0), ("no_signal", "groups without signal", 1)):
        marker = "o" if len(at) == 1 else None
        axes.plot(at, [row[key] for row in run.per_step], color=COLOURS[colour], label=label, marker=marker)
    axes.set(xlabel="training step", ylim=(min(0, *axes.get_ylim()), max(1, axes.get_ylim()[1])))
    axes.legend(frameon=False, fontsize=8)


def _std(figure, run: Replay) -> None:
    axes = figure.add_subplot()
    at = [row["step"] for row in run.per_step]
    for method, colour in zip(METHODS, COLOURS, strict=False):
        marker = "o" if len(at) == 1 else None
        axes.plot(at, [row[method]["std"] for row in run.per_step], color=colour, label=method, marker=marker)
    axes.set(xlabel="training step", ylabel="std(A)")
    axes.legend(frameon=False, fontsize=8)


def _order(figure, run: Replay) -> None:
    axes = figure.add_subplot()
    at = [row["step"] for row in run.per_step]
    for method, colour in zip(METHODS, COLOURS, strict=False):
        marker = "o" if len(at) == 1 else None
        axes.plot(at, [row[method]["order"] for row in run.per_step], color=colour, label=method, marker=marker)
    axes.set(xlabel="training step", ylabel="order / std(A)", ylim=(-0.02, None))
    axes.legend(frameon=False, fontsize=8)


FIGURES = (
    (_places, "Mean size of the advantage by place in the group: flat where order does not matter"),
    (_distribution, "Distribution of the advantages, each in its step's standard deviations"),
    (_steps, "Mean reward, and the share of groups whose rewards are all equal"),
    (_std, "Standard deviation of the advantages"),
    (_order, "How much of an advantage is the order of the rows"),
)

LOGARITHMIC = (_places, _distribution, _std)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>verl-krpo replay</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 0 auto; padding: 1rem; color: #222; }}
h1 {{ font-size: 1.5rem; }} h2 {{ font-size: 1.2rem; margin-top: 2rem; overflow-wrap: anywhere; }}
h3 {{ font-size: 1rem; }}
.scroll {{ overflow-x: auto; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .25rem .75rem .25rem 0; text-align: left; vertical-align: top; }}
thead th {{ border-bottom: 1px solid #999; vertical-align: bottom; }}
.numbers td, .numbers thead th + th {{ text-align: right; }}
tbody th {{ font-weight: 500; white-space: nowrap; }}
figure {{ margin: 1rem 0; }} img {{ width: 100%; max-width: 40rem; height: auto; }}
figcaption, dd, footer {{ color: #555; font-size: .9rem; }}
dd {{ margin: 0 0 .5rem 1rem; }}
</style>
</head>
<body>
<h1>Rollouts replayed under four estimators</h1>
{body}
<h2>What the columns mean</h2>
<dl>{glossary}</dl>
<footer>verl-krpo {version}. Scores are the rewards before any KL
penalty.</footer>
</body>
</html>
"""


def write(runs: Sequence[Replay], path: str | Path) -> Path:
    """Write `page` to `path`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(runs), encoding="utf-8")
    return path
