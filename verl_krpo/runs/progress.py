"""What the terminal shows of a job whose output goes to a file: all of it, or one line of progress."""

import sys
from collections import deque
from pathlib import Path

from verl_krpo.runs.log import METRICS, REWARD, SECONDS, accuracy, rows


class Output:
    """The job's own output, as it comes."""

    def __init__(self, log: Path):
        self.file = open(log, "rb")

    def update(self) -> None:
        sys.stdout.buffer.write(self.file.read())
        sys.stdout.flush()

    def close(self, failed: bool) -> None:
        self.update()
        self.file.close()


class Line:
    """One line that follows verl's file logger; every tenth step and every validation stays on the terminal."""

    def __init__(self, log: Path):
        from tqdm import tqdm

        self.log, self.step, self.size = log, -1, 0
        self.line = tqdm(bar_format="{desc} [{elapsed}]", desc="starting verl: Ray, workers, model", disable=None)

    def update(self) -> None:
        self.line.refresh()
        metrics = self.log.parent / METRICS
        if not metrics.exists() or metrics.stat().st_size == self.size:
            return
        self.size = metrics.stat().st_size
        logged = rows(metrics)
        for self.step in sorted(step for step in logged if step > self.step):
            text = summary(self.step, logged[self.step])
            self.line.set_description_str(text)
            if self.step % 10 == 0 or accuracy(logged[self.step]) is not None:
                self.line.write(text)

    def close(self, failed: bool) -> None:
        self.update()
        self.line.leave = False
        self.line.close()
        if failed:
            with open(self.log, errors="replace") as lines:
                print("".join(deque(lines, 40)), file=sys.stderr)


def summary(step: int, data: dict) -> str:
    """A step in a line."""
    text = f"step {step:4d}"
    if REWARD in data:
        text += f"   reward {data[REWARD]:.3f}"
    if SECONDS in data:
        text += f"   {data[SECONDS]:.1f} s"
    if (held_out := accuracy(data)) is not None:
        text += f"   held-out accuracy {held_out:.3f}"
    return text
