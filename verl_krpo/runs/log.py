"""The one reader of what verl's loggers wrote: rows by step, series by metric, and what accuracy is.

A run is a folder (or the file itself) with metrics.jsonl of verl's `file` logger, one line a step,
{"step": int, "data": {metric: number}}, or with TensorBoard event files in it or below it. What is read most:

    critic/score/mean              mean reward of the step's rollouts
    timing_s/step                  seconds the step took
    val-core/<data>/acc/mean@<k>   held-out accuracy, k answers a problem; verl validates before the first step (step 0)
                                   and every trainer.test_freq
"""

import json
import math
import os
import statistics
from pathlib import Path

METRICS = "metrics.jsonl"
EARLIER = "metrics.earlier.jsonl"  # of earlier attempts, while one runs (run_dir)
TRACKER = "latest_checkpointed_iteration.txt"
REWARD, SECONDS, ACCURACY = "critic/score/mean", "timing_s/step", "accuracy"

Series = dict[int, float]  # step -> value


def lines(path: Path) -> list[dict]:
    """The whole lines of a JSONL file, none where there is no file. A killed job can leave a last line without its end.

    ValueError names a line that is no JSON object.
    """
    entries = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else [], start=1):
        try:
            entries.append(dict(json.loads(line)))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}, line {number} is no JSON object: {line[:80]!r}") from error
    return entries


def rows(path: str | os.PathLike) -> dict[int, dict]:
    """{step: {metric: value}} of a run over all its attempts, a live one included; empty where nothing is logged yet.

    A resumed attempt validates before it trains, and logs that under the step it resumes from: one row of two.
    ValueError names a line that is not the file logger's.
    """
    path = Path(path)
    merged: dict[int, dict] = {}
    for file in [path / EARLIER, path / METRICS] if path.is_dir() else [path]:
        for number, entry in enumerate(lines(file), start=1):
            if not (isinstance(entry.get("step"), int) and isinstance(entry.get("data"), dict)):
                raise ValueError(f"{file}, line {number} is not one of verl's file logger: {str(entry)[:80]}")
            merged[entry["step"]] = merged.get(entry["step"], {}) | entry["data"]
    return merged


def accuracy(data: dict) -> float | None:
    """Held-out accuracy of a step: the mean over the data sources; None where verl did not validate."""
    values = [v for key, v in data.items() if key.startswith("val-core/") and "/acc/mean@" in key]
    return statistics.fmean(values) if values else None


def series(path: str | os.PathLike) -> dict[str, Series]:
    """Every finite scalar of a run, metric -> {step: value}, `accuracy` among them; metrics.jsonl before event files.

    FileNotFoundError where there is neither.
    """
    path = Path(path)
    log = path / METRICS if path.is_dir() else path
    if log.suffix == ".jsonl" and (log.exists() or log.with_name(EARLIER).exists()):
        by_step = rows(path)
    elif files := _event_files(path):
        by_step = _events(files)
    else:
        raise FileNotFoundError(
            f"{path} holds no {METRICS} of verl's file logger and no TensorBoard event file: train with "
            f'trainer.logger=\'["console","file"]\' and VERL_FILE_LOGGER_PATH={log}'
        )
    metrics: dict[str, Series] = {}
    for step in sorted(by_step):
        for metric, value in (by_step[step] | {ACCURACY: accuracy(by_step[step])}).items():
            if isinstance(value, int | float) and math.isfinite(value):
                metrics.setdefault(metric, {})[step] = float(value)
    return metrics


def _event_files(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if ".tfevents." in path.name else []
    return sorted(path.rglob("events.out.tfevents.*"), key=lambda file: file.stat().st_mtime)


def _events(files: list[Path]) -> dict[int, dict]:
    # Comes with verl's logger: who has event files has it.
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    merged: dict[int, dict] = {}
    for file in files:
        events = EventAccumulator(str(file), size_guidance={"scalars": 0})
        events.Reload()
        for metric in events.Tags()["scalars"]:
            for event in events.Scalars(metric):
                merged.setdefault(event.step, {})[metric] = event.value
    return merged


def name_of(path: str | os.PathLike) -> str:
    """What a run is called: its folder, or the file's own name where that says more."""
    path = Path(path).resolve()
    return path.name if path.is_dir() else path.parent.name if path.name == METRICS else path.stem


def saved_step(folder: Path) -> int:
    """The step of the last complete checkpoint, 0 without one."""
    tracker = folder / TRACKER
    return int(tracker.read_text()) if tracker.exists() else 0
