"""Rows as a CSV, and as a table for people."""

import csv
from collections.abc import Sequence
from pathlib import Path


def write_csv(path: Path, rows: list[dict]) -> None:
    """rows: one dict a line, all with the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def show(headings: Sequence[str], rows: list[list[str]], title: str | None = None) -> None:
    """Print a table for a terminal of 80 columns; numbers after the first column."""
    from rich.console import Console
    from rich.table import Table

    shown = Table(title=title, title_justify="left", title_style="bold", show_edge=False, pad_edge=False)
    shown.add_column(headings[0], overflow="fold", max_width=23)
    for heading in headings[1:]:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)


def interval(row: dict, key: str, digits: int = 3, sign: str = "") -> str:
    """A number of a row with its interval, Measured.columns; also where the row comes from a CSV.

    sign: "+" where positive numbers have theirs.
    """
    value, low, high = (f"{float(row[f'{key}{end}']):{sign}.{digits}f}" for end in ("", "_low", "_high"))
    return f"{value} ({low} to {high})"


def table(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table, its columns aligned."""
    header = [title.replace("|", r"\|") for title in header]
    widths = [max(len(line[k]) for line in [header, *lines]) for k in range(len(header))]
    lines = [header, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)


def markdown(rows: list[dict]) -> str:
    """The rows as a table; a column of numbers in three digits."""

    def cell(value):
        if value is None or isinstance(value, str):
            return value or ""
        return f"{value:.3g}" if value < 100 else f"{value:.0f}"

    return table(list(rows[0]), [[cell(value) for value in row.values()] for row in rows])
