"""What the terminal shows of a job whose output goes to a file: all of it, or one line of progress."""

import re
import sys
from collections import deque
from pathlib import Path

from verl_krpo.backends.ram import HOW_TO_NEED_LESS
from verl_krpo.runs.log import METRICS, REWARD, SECONDS, accuracy, rows

MEMORY_LINE = re.compile(r"^memory: .+(?=\n)", re.MULTILINE)  # what the CPU platform says before Ray starts
TOTAL_STEPS = re.compile(r"Total training steps: (\d+)")  # verl, before the first step
OUT_OF_MEMORY = re.compile(r"Memory on the node \(.*?\).*? was ([\d.]+)GB(?: used)? / ([\d.]+)GB")
TOP_USER = re.compile(r"PID\s+MEM\(GB\)\s+COMMAND\s+\d+\s+([\d.]+)\s+(\S+)")


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
    """One line that follows verl's file logger, with the time that is left; every tenth step and every validation stays
    on the terminal."""

    def __init__(self, log: Path):
        from tqdm import tqdm

        self.log, self.step, self.size, self.memory = log, -1, 0, None
        starting = "starting verl: Ray, workers, model; about half a minute, more on a busy machine"
        self.line = tqdm(bar_format="{desc} [{elapsed}]", desc=starting, disable=None)
        if self.line.disable:  # no terminal
            print(starting, flush=True)

    def update(self) -> None:
        self.line.refresh()
        if self.memory is None and (found := MEMORY_LINE.search(self.log.read_text(errors="replace"))):
            self.memory = found[0]
            self.line.write(self.memory)
        metrics = self.log.parent / METRICS
        if not metrics.exists() or metrics.stat().st_size == self.size:
            return
        self.size = metrics.stat().st_size
        logged = rows(metrics)
        if self.step < 0 and logged:
            total = TOTAL_STEPS.search(self.log.read_text(errors="replace"))
            self.line.reset(total=int(total[1]) if total else None)
            self.line.initial = min(logged)
            self.line.bar_format = "{desc} [{elapsed}, about {remaining} left]"
        for self.step in sorted(step for step in logged if step > self.step):
            text = summary(self.step, logged[self.step])
            self.line.n = self.step
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
            if reason := out_of_memory(self.log.read_text(errors="replace")):
                print(reason, file=sys.stderr)


def out_of_memory(log: str) -> str | None:
    """Ray's report of a node that ran out of memory in a sentence, with the keys to lower; None without one."""
    found = OUT_OF_MEMORY.search(log)
    if found is None:
        return None
    largest = TOP_USER.search(log, found.start())
    most = f", {largest[1]} GB of them by {largest[2].strip()}" if largest else ""
    return f"Ray ended the job for memory: {found[1]} of {found[2]} GB were in use{most}. {HOW_TO_NEED_LESS}"


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
