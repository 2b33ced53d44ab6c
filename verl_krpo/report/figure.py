"""One look for every figure: a method has one color everywhere, plain axes, a PNG."""

import os
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

# Colors that color-blind readers tell apart (Okabe and Ito; for losses Tol's muted scheme), gray for group means.
METHOD_COLORS = {
    "grpo": "#8a8a8a",
    "drgrpo": "#bdbdbd",
    "rloo": "#333333",
    "krpo": "#D55E00",
    "krpo_predicted": "#E69F00",
    "krpo_posterior": "#8e6bbf",
    "krpo_smoothed": "#b79bd8",
    "krpo_leave_one_out": "#56B4E9",
    "krpo_adaptive": "#0072B2",
    "krpo_memory": "#009E73",
    "jspo": "#CC79A7",
    "kpo": "#117733",
    "kpo_unclipped": "#44AA99",
    "krpo_kpo": "#882255",
    "gspo": "#999933",
}
OTHER_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLE = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "0.92",
    "grid.linewidth": 0.8,
    "font.size": 9.5,
    "savefig.dpi": 150,
}


def color(name: str) -> str:
    """The color of a method, named as in recipes/config/method or as studies label it ("krpo leave_one_out")."""
    return colors([name])[name]


def colors(names: Sequence[str]) -> dict[str, str]:
    """A color for each name: its method's, or one that is still free where the name is no method's or not the first.

    The method is the longest one that the name begins with: `krpo_adaptive_cpu_seed1` is krpo_adaptive's.
    """
    chosen: dict[str, str] = {}
    for name in names:
        method = _method(name)
        if method and METHOD_COLORS[method] not in chosen.values():
            chosen[name] = METHOD_COLORS[method]
    for name in names:
        if name not in chosen:
            free = [color for color in OTHER_COLORS if color not in chosen.values()]
            chosen[name] = free[0] if free else OTHER_COLORS[len(chosen) % len(OTHER_COLORS)]
    return chosen


def _method(name: str) -> str | None:
    words = re.sub(r"[^a-z0-9]+", "_", name.lower().replace(".", "")).strip("_") + "_"
    return max((method for method in METHOD_COLORS if words.startswith(method + "_")), key=len, default=None)


def axes(rows: int, columns: int, width: float, height: float, **options):
    """(figure, its axes (rows, columns)), width x height inches, without a display. Options go to `subplots`."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        return figure, figure.subplots(rows, columns, squeeze=False, **options)


def panels(count: int, width: float, height: float, **options):
    """(figure, list of `count` axes), at most three side by side: width of all, height of a row. See `axes`."""
    rows = -(-count // 3)
    figure, grid = axes(rows, min(3, count), width, height * rows + 0.5, **options)
    for spare in grid.flat[count:]:
        spare.remove()
    return figure, list(grid.flat[:count])


def legend(figure, **options) -> None:
    """One legend for all panels: every label once."""
    shown = {}
    for axis in figure.axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            shown.setdefault(label, handle)
    figure.legend(shown.values(), shown, **{"loc": "outside upper left", "frameon": False, "ncols": 3} | options)


def whole_steps(panel, most: int = 8) -> None:
    """Whole numbers on the axis of training steps."""
    from matplotlib.ticker import MaxNLocator

    panel.xaxis.set_major_locator(MaxNLocator(nbins=most, integer=True, steps=[1, 2, 5, 10]))


def band(panel, x, middle, low, high, color: str, **line) -> None:
    """A line and the band around it."""
    panel.plot(x, middle, color=color, **{"linewidth": 1.8} | line)
    panel.fill_between(x, np.asarray(low), np.asarray(high), color=color, alpha=0.18, linewidth=0)


def over_sizes(rows: list[dict], across: str, measures: dict[str, str], lines: dict[object, str], by: str):
    """(figure, its panels): a column for every value of `across`, a row for every measure, key -> label, and in each a
    line over the group size, with its interval, for every value of `by` in `lines`, which has their colors."""
    from matplotlib.ticker import NullLocator

    columns = list(dict.fromkeys(row[across] for row in rows))
    drawn, panels = axes(
        len(measures), len(columns), 2 * len(columns), 2.4 * len(measures) + 0.5, sharex=True, sharey="row"
    )
    for (line, column), panel in np.ndenumerate(panels):
        key, here = list(measures)[line], [row for row in rows if row[across] == columns[column]]
        sizes = sorted({row["size"] for row in here if row["size"].bit_count() == 1})
        for value, color in lines.items():
            own = [row for row in here if row[by] == value]
            ends = ([row[f"{key}{end}"] for row in own] for end in ("", "_low", "_high"))
            # Others' estimators dashed and on top: where curves agree both are seen.
            others = by == "estimator" and not str(value).startswith("krpo")
            style = {"linestyle": (0, (3, 3)), "zorder": 3} if others else {}
            band(panel, [row["size"] for row in own], *ends, color, label=value, marker="o", markersize=2.5, **style)
        panel.set_xscale("log", base=2)
        panel.set_xticks(sizes, [str(size) for size in sizes])
        panel.xaxis.set_minor_locator(NullLocator())
        panel.set(title=columns[column] if line == 0 else "", ylabel="" if column else measures[key])
    drawn.supxlabel("group size", fontsize=9)
    legend(drawn, title=by, ncols=6, loc="outside upper center", fontsize=8)
    return drawn, panels


def save(figure, path: str | os.PathLike) -> Path:
    """Write PATH.png (the ending may be given); its path."""
    from matplotlib import rc_context

    path = Path(f"{str(path).removesuffix('.png')}.png")
    path.parent.mkdir(parents=True, exist_ok=True)
    with rc_context(STYLE):
        figure.savefig(path)
    return path
