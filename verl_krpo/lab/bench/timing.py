"""Timing side by side: the contestants of a table take turns within a round, so that a busy machine slows all alike.

On a CPU their own CPU time counts. Compare them by the median of a round's ratios.
"""

import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable
from pathlib import Path

import torch

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler would print every start and stop
SAMPLE = 2e-2  # seconds: what is quicker is repeated until it takes as long


def paired(
    calls: dict[Hashable, Callable[[], object]], rounds: int, device: str = "cpu"
) -> dict[Hashable, list[float]]:
    """Seconds a call, one figure a round and contestant. Every round calls all of them, in a new order."""

    clock = time.thread_time if device == "cpu" else time.perf_counter

    def seconds(call, repeats):
        _wait(device)
        start = clock()
        for _ in range(repeats):
            call()
        _wait(device)
        return (clock() - start) / repeats

    repeats = {}
    for name, call in calls.items():
        call()  # whatever is cached is now
        repeats[name] = max(1, math.ceil(SAMPLE / max(seconds(call, 1), 1e-7)))
    times = {name: [] for name in calls}
    order = list(calls)
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for name in order:
            times[name].append(seconds(calls[name], repeats[name]))
    return times


def median_ratio(times: list[float], reference: list[float]) -> float:
    """The median over the rounds of times / reference."""
    return statistics.median(a / b for a, b in zip(times, reference, strict=True))


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most that torch held at once during the call, the result included, what it held before not."""
    call()
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def machine(device: str) -> dict:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
