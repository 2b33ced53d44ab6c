"""What every study writes: a CSV, a figure, a table for people."""

import csv
from pathlib import Path

STYLE = {
    "figure.dpi": 120,
    "savefig.bbox": "tight",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "font.size": 9,
}
# GRPO's family grey, the published form red, ours blue: the same in every figure.
COLORS = {
    "GRPO": "#9a9a9a",
    "Dr.GRPO": "#c4c4c4",
    "RLOO": "#4d4d4d",
    "krpo (published)": "#c0392b",
    "krpo predicted": "#e08e45",
    "krpo posterior": "#8e6bbf",
    "krpo smoothed": "#b79bd8",
    "krpo leave_one_out": "#5aa9d6",
    "krpo_adaptive": "#1f5fa8",
    "krpo_memory": "#0b2f5c",
}


def write_csv(path: Path, rows: list[dict]) -> None:
    """rows: one dict a line, all with the same keys."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows({k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)


def figure(rows: int, columns: int, width: float, height: float, **options):
    """A matplotlib figure and its axes in the house style, without a display."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    with plt.rc_context(STYLE):
        return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained", **options)


def save(drawn, path: Path) -> None:
    import matplotlib.pyplot as plt

    path.parent.mkdir(parents=True, exist_ok=True)
    drawn.savefig(path)
    plt.close(drawn)


def table(header: list[str], lines: list[list[str]]) -> str:
    """A markdown table, its columns aligned."""
    header = [title.replace("|", r"\|") for title in header]
    widths = [max(len(line[k]) for line in [header, *lines]) for k in range(len(header))]
    lines = [header, ["-" * width for width in widths], *lines]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in lines)
