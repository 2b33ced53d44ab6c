"""What the filters cost: `python -m verl_krpo.bench filter [--json FILE]` prints a Markdown table.

A table is a function that returns rows of plain numbers; `paired` times the contestants of one of its lines. They take
turns within a round, and on a CPU their own CPU time counts: a busy machine slows all of them alike. Compare them by
the median of a round's ratios.
"""

import argparse
import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Hashable
from functools import partial
from pathlib import Path

import torch

from verl_krpo.kalman import filter as kalman
from verl_krpo.kalman import local_level, naive

SHAPES = ((8, 1024), (32, 4096), (64, 16384), (8, 131072))
MODEL = {"process_var": 1e-6, "measurement_var": 1.0}  # KPO's default
SAMPLE = 2e-3  # seconds: what is quicker is repeated until it takes as long


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


def published(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The published filter (arXiv 2602.10609) from its description, P0 = 0: all of it in float32.

    With cosh eta = 1 + q/2, q = Q/R and U_t = sinh(t eta) / sinh(eta):

        K_t = q U_t / (U_t (q + 1) - U_{t-1}),    A_t = prod_{j <= t} (1 - K_j),    x_t = A_t sum_{s <= t} K_s z_s / A_s

    K_t is held within [1e-6, 1 - 1e-6]; A_t is exp of a sum of logarithms, held above 1e-30; a masked token observes 0.
    It also spreads P_t = R K_t over the rows.
    """
    q = torch.tensor(MODEL["process_var"] / MODEL["measurement_var"], device=z.device)
    seen = mask.float()
    z = z.float() * seen
    eta = torch.log(1 + q / 2 + torch.sqrt(torch.clamp((1 + q / 2) ** 2 - 1, min=0)))
    u = torch.sinh(torch.arange(1, z.shape[1] + 1, device=z.device) * eta) / torch.sinh(eta)
    gain = q * u / (u * (q + 1) - torch.cat([u.new_zeros(1), u[:-1]]))
    gain = gain.clamp(1e-6, 1 - 1e-6)
    spread = (MODEL["measurement_var"] * gain).expand_as(z) * seen  # noqa: F841
    fall = (1 - gain).log().cumsum(0).clamp(min=math.log(1e-30)).exp()
    rise = gain * (1 / fall).clamp(max=math.exp(80))
    return fall * (z * rise).cumsum(1) * seen


def loop(z: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """One step after the other, all rows at once, float64."""
    gains = local_level.schedule(z.shape[1], **MODEL, init_var=0.0).gain.to(z.device)
    state = torch.zeros(len(z), dtype=torch.float64, device=z.device)
    rank = torch.zeros(len(z), dtype=torch.int64, device=z.device)
    out = torch.empty_like(z)
    for t in range(z.shape[1]):
        step = gains[rank] * (z[:, t] - state)
        state = torch.where(mask[:, t], state + step, state)
        rank += mask[:, t]
        out[:, t] = state
    return out


def filter_table(rounds: int, device: str) -> list[dict]:
    """Ours against what else there is, without a mask, with one that is all true, padded and with holes."""
    return [row for shape in SHAPES for row in _filter_rows(shape, rounds, device)]


def _filter_rows(shape: tuple[int, int], rounds: int, device: str) -> list[dict]:
    batch, steps = shape
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(shape, generator=generator)
    lengths = steps // 2 + torch.randint(steps // 2, (batch, 1), generator=generator)
    masks = {
        "none": None,
        "all": torch.ones(shape, dtype=torch.bool),
        "right-padded": torch.arange(steps) < lengths,
        "holes": torch.rand(shape, generator=generator) > 0.2,
    }
    exact = {name: naive.filtered_mean(z.double(), mask, **MODEL) for name, mask in masks.items()}
    z = z.to(device)
    masks = {name: None if mask is None else mask.to(device) for name, mask in masks.items()}
    calls = {("ours", name): partial(kalman.filtered_mean, z, mask, **MODEL) for name, mask in masks.items()}
    calls |= {("published", name): partial(published, z, masks[name]) for name in ("all", "holes")}
    calls |= {("torch.cumsum", "none"): partial(torch.cumsum, z, 1), ("copy", "none"): z.clone}
    slow = {("naive loop", "holes"): partial(loop, z, masks["holes"])}
    times = paired(calls, rounds, device) | paired(slow, 1, device)

    rows = []
    for (method, name), call in (calls | slow).items():
        row = {"shape": f"{batch} x {steps}", "method": method, "mask": name}
        row["microseconds"] = 1e6 * statistics.median(times[method, name])
        reference = times["published", "holes" if name == "holes" else "all"]
        row["speed / published"] = median_ratio(reference, times[method, name]) if (method, name) in calls else None
        row["max error / max state"] = row["peak memory / input"] = None
        if method in ("ours", "published", "naive loop"):
            error = (call().cpu().double() - exact[name]).abs().amax(dim=1) / exact[name].abs().amax(dim=1)
            row["max error / max state"] = error.max().item()
        if (method, name) in calls:
            row["peak memory / input"] = 1 + peak_bytes(call, device) / z.nbytes
        rows.append(row)
    return rows


TABLES = {"filter": filter_table}


def markdown(rows: list[dict]) -> str:
    """The rows as a table; a column of numbers in three digits."""

    def cell(value):
        return (
            ""
            if value is None
            else value
            if isinstance(value, str)
            else f"{value:.3g}"
            if value < 100
            else f"{value:.0f}"
        )

    lines = [list(rows[0]), ["---"] * len(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine(device: str) -> dict:
    cpu = next((line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), "")
    return {
        "device": torch.cuda.get_device_name() if device != "cpu" else cpu or platform.processor(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m verl_krpo.bench", description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the rows and the machine here")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    rows = TABLES[options.table](options.rounds, options.device)
    print(markdown(rows))
    if options.json:
        report = {"table": options.table, "rounds": options.rounds, "machine": machine(options.device), "rows": rows}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=1) + "\n")


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize()


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


if __name__ == "__main__":
    main()
