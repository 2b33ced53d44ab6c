"""Many runs: conditions x methods x seeds in parallel processes, one CSV line each; a line there is not run again."""

import csv
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

Run = Callable[[Path, str, str, int], dict]  # the models' folder, condition, method, seed -> a line of the CSV


class Task(NamedTuple):
    condition: str
    method: str
    seed: int


def finished(path: Path) -> list[dict[str, str]]:
    """The lines of a CSV of runs, or none."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def missing(tasks: Iterable[Task], rows: Iterable[dict]) -> list[Task]:
    """The tasks whose run is not among the lines of a CSV."""
    done = {(row["condition"], row["method"], int(row["seed"])) for row in rows}
    return [task for task in tasks if task not in done]


def execute(run: Run, tasks: list[Task], models: Path, path: Path, jobs: int) -> Iterator[dict]:
    """Run the tasks in `jobs` processes and append each to the CSV as it ends, in whatever order; yields its line.

    The first task that fails ends the study with its error; what has ended stays in the CSV.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, context, initializer=_one_thread) as pool:
        pending = [pool.submit(run, models, *task) for task in tasks]
        try:
            for future in as_completed(pending):
                row = future.result()
                append(path, row)
                yield row
        finally:
            for future in pending:
                future.cancel()


def append(path: Path, row: dict) -> None:
    """One line more; the first writes the header. ValueError where the file has other columns."""
    new = not path.exists()
    if not new and (columns := path.read_text().partition("\n")[0]) != ",".join(row):
        raise ValueError(f"{path} has the columns {columns}, a run now {','.join(row)}: choose another folder")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})


def _one_thread() -> None:
    import torch
    from transformers.utils.logging import disable_progress_bar

    torch.set_num_threads(1)
    disable_progress_bar()


def tasks(
    conditions: Mapping[str, object],
    chosen: Iterable[str],
    methods: Mapping[str, object],
    of: Iterable[str],
    seeds: range,
) -> list[Task]:
    """Seed by seed, so that an interrupted study is balanced. ValueError for a name that is not known."""
    chosen, of = list(chosen), list(of)
    for kind, names, known in (("condition", chosen, conditions), ("method", of, methods)):
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"no {kind} {', '.join(unknown)}: there are {', '.join(known)}")
    return [Task(condition, method, seed) for seed in seeds for condition in chosen for method in of]


def complete(
    path: Path, run: Run, wanted: list[Task], models: Path, prepare: Callable[[str], object], jobs: int
) -> None:
    """Run what the CSV has not, on the models in `models` that `prepare` makes of a condition."""
    from rich.progress import MofNCompleteColumn, Progress

    if todo := missing(wanted, finished(path)):
        for condition in {task.condition for task in todo}:
            prepare(condition)
        with Progress(*Progress.get_default_columns(), MofNCompleteColumn()) as progress:
            bar = progress.add_task("runs", total=len(todo))
            for row in execute(run, todo, models, path, jobs):
                accuracy = row["curve"].rpartition(" ")[2]
                progress.console.print(f"{row['condition']} {row['method']} seed {row['seed']}: {accuracy}")
                progress.advance(bar)


def show(path: Path, other: str = "grpo", measure: str = "curve") -> str:
    """Read a CSV of runs, `write` what it says beside it; the table as text.

    other: a method that all are compared with besides their reference. measure: the column that is called accuracy in
    all of these, `curve` or another one of `loop.look`, which then go to a folder of its name.
    """
    from verl_krpo.lab.train import results

    return results.as_table(write(*read(path, measure), other))


def read(path: Path, measure: str = "curve") -> tuple[Path, list[dict]]:
    """The folder that a measure's tables go to, and a CSV's runs with that measure as their curve."""
    rows = finished(path)
    if not rows:
        raise ValueError(f"{path} holds no finished run")
    if measure == "curve":
        return path.parent, rows
    if measure not in rows[0]:
        raise ValueError(f"{path} has no measure {measure}: its columns are {', '.join(rows[0])}")
    return path.parent / measure, [row | {"curve": row[measure]} for row in rows]


def write(out: Path, rows: list[dict], other: str = "grpo") -> list[dict]:
    """summary.csv, table.md, curves and differences of runs; the summary's lines."""
    from verl_krpo.lab.train import results
    from verl_krpo.report import tables

    lines = results.summary(rows, other)
    tables.write_csv(out / "summary.csv", lines)
    results.draw_curves(rows, out / "curves")
    results.draw_differences(lines, out / "differences")
    (out / "table.md").write_text(results.as_table(lines) + "\n")
    return lines
