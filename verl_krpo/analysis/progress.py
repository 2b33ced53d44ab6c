"""Run a verl job with its long output in a file and one line of progress on the terminal."""

import json
import os
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

REWARD, SECONDS = "critic/score/mean", "timing_s/step"
POLL_SECONDS = 0.5


def run(command: list[str], log: str | os.PathLike, metrics: str | os.PathLike, stall_seconds: float = 900) -> int:
    """Run `command`, its output going to the file `log`, and report from verl's file-logger JSONL `metrics`.

    Returns the command's exit status. A job that fails shows the end of its log. A job that logs neither output nor
    metrics for `stall_seconds` is ended and counts as failed (status 1).
    """
    log, metrics = Path(log), Path(metrics)
    began = seen = time.monotonic()
    size, step = -1, -1
    with open(log, "wb") as output:
        job = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
    try:
        while job.poll() is None:
            time.sleep(POLL_SECONDS)
            now = time.monotonic()
            step = _report(metrics, step)
            if step < 0:
                _say(f"starting verl: Ray, workers, model ... {now - began:.0f} s", lasting=False)
            grown = log.stat().st_size + (metrics.stat().st_size if metrics.exists() else 0)
            if grown != size:
                size, seen = grown, now
            elif now - seen > stall_seconds:
                print(f"\nno output for {stall_seconds:.0f} s: ending the job, see {log}", file=sys.stderr)
                job.terminate()
                job.wait(60)
                return 1
    except KeyboardInterrupt:
        job.terminate()
        job.wait(60)
        raise
    _report(metrics, step)
    if sys.stdout.isatty():
        print()
    if job.returncode != 0:
        with open(log, errors="replace") as lines:
            tail = "".join(deque(lines, 40))
        print(f"\n{tail}\nthe job ended with status {job.returncode}; its whole output: {log}", file=sys.stderr)
    return job.returncode


def _report(metrics: Path, step: int) -> int:
    """Show the rows beyond `step`; return the last step shown. Every tenth step and every validation stays."""
    for row in _new_rows(metrics, step):
        step = row["step"]
        _say(_summary(row), lasting=step % 10 == 0 or _accuracy(row["data"]) is not None)
    return step


def _new_rows(metrics: Path, after: int) -> list[dict]:
    """Whole rows of the JSONL with a step beyond `after`; step 0 is the validation before training."""
    if not metrics.exists():
        return []
    lines = metrics.read_text().split("\n")[:-1]
    return [row for row in map(json.loads, lines) if row["step"] > after]


def _accuracy(data: dict) -> float | None:
    """Mean held-out accuracy of a validation, None where there was none at this step."""
    found = [value for key, value in data.items() if key.startswith("val-") and "/acc/mean@" in key]
    return sum(found) / len(found) if found else None


def _summary(row: dict) -> str:
    data = row["data"]
    text = f"step {row['step']:4d}"
    if REWARD in data:
        text += f"   reward {data[REWARD]:.3f}"
    if SECONDS in data:
        text += f"   {data[SECONDS]:.1f} s"
    if (accuracy := _accuracy(data)) is not None:
        text += f"   held-out accuracy {accuracy:.3f}"
    return text


def _say(text: str, lasting: bool) -> None:
    """A line that stays, or on a terminal one that the next line replaces."""
    if sys.stdout.isatty():
        print(f"\r{text}\033[K", end="\n" if lasting else "", flush=True)
    elif lasting:
        print(text, flush=True)


if __name__ == "__main__":  # python -m verl_krpo.analysis.progress LOG METRICS COMMAND...
    sys.exit(run(sys.argv[3:], log=sys.argv[1], metrics=sys.argv[2]))
