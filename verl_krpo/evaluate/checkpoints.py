"""What checkpoints can do: avg@k, pass@k and maj@k from verl's validation dumps, and paired comparisons.

verl writes STEP.jsonl to `trainer.validation_data_dir`, a line a response: input, output, gts, score, acc, and what
else the reward returns; the `math` reward adds pred (the final answer) and source (the benchmark). Of n samples of a
problem, c of them right:

    avg@n     c / n; verl's own acc/mean@n, which counts a session that failed, and is not in the dump, as wrong
    pass@k    the probability that k samples hold a right one (pass_at_k.py)
    maj@k     the expected correctness of the most frequent answer of k samples

Each is averaged over the problems of a benchmark. Intervals: 95 %, by resampling problems. Two checkpoints are
compared on the problems that both dumps hold: mean difference of avg@n, its interval by resampling problems, and the
two-sided p-value of a sign-flip permutation test.
"""

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from verl_krpo.evaluate.pass_at_k import majority_at, pass_at, powers_of_two
from verl_krpo.report import figure, tables
from verl_krpo.report.intervals import Measured, p_value, resampled
from verl_krpo.reward import answer_tag
from verl_krpo.reward.math import extract


@dataclass
class Problem:
    """The samples of one problem: whether each is right, and its answer ("" for none)."""

    right: list[float] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


Benchmark = dict[tuple[str, str], Problem]  # (prompt, ground truth) -> problem


@dataclass
class Comparison:
    benchmark: str
    problems: int
    left_out: int
    difference: Measured
    p_value: float


def read(path: str | os.PathLike) -> dict[str, Benchmark]:
    """The benchmarks of a dump: a STEP.jsonl, or a folder, of which the last step is read.

    FileNotFoundError without a dump, ValueError for a line that is not one.
    """
    path = _dump(Path(path))
    samples: dict[str, dict] = {}
    with open(path, encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                entry = json.loads(line)
                entry["input"], entry["output"], entry["acc"]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path}, line {number} is not of verl's validation dump: {error!r}") from error
            # An agent loop can have several outputs a session, {uid}_{session}_{output}, in this order: the first one's
            # input is the problem, and verl scores the last.
            session = str(entry.get("uid", number)).rpartition("_")[0] or str(number)
            samples[session] = entry | {"input": samples.get(session, entry)["input"]}
    benchmarks: dict[str, Benchmark] = {}
    for entry in samples.values():
        problems = benchmarks.setdefault(str(entry.get("source") or "validation"), {})
        problem = problems.setdefault((entry["input"], str(entry.get("gts"))), Problem())
        problem.right.append(float(entry["acc"]))
        problem.answers.append(_answer(entry))
    if not benchmarks:
        raise ValueError(f"{path} holds no samples")
    return dict(sorted(benchmarks.items()))


def _dump(path: Path) -> Path:
    if path.is_file():
        return path
    steps = [file for file in path.glob("*.jsonl") if re.fullmatch(r"\d+", file.stem)]
    if not steps:
        raise FileNotFoundError(f"{path} holds no STEP.jsonl: validate with trainer.validation_data_dir={path}")
    return max(steps, key=lambda file: int(file.stem))


def _answer(entry: dict) -> str:
    if entry.get("pred") is not None:
        return str(entry["pred"])
    tagged = answer_tag.extract(entry["output"])
    return (extract(entry["output"]) if tagged is None else tagged.strip()) or ""


def summary(benchmark: Benchmark) -> dict[str, Measured]:
    """avg@n, and pass@k and maj@k for k = 1, 2, 4, ... and n. n is the least number of samples a problem has."""
    problems = list(benchmark.values())
    n = min(len(problem.right) for problem in problems)
    made = {f"avg@{n}": resampled([float(np.mean(problem.right)) for problem in problems])}
    for k in powers_of_two(n):
        passed = [pass_at(len(p.right), sum(r >= 1 for r in p.right), k) for p in problems]
        voted = [majority_at(p.answers, p.right, k) for p in problems]
        made[f"pass@{k}"], made[f"maj@{k}"] = resampled(passed), resampled(voted)
    return made


def compare(name: str, before: Benchmark, after: Benchmark) -> Comparison:
    """avg@n of `after` minus that of `before`, on the problems of both. ValueError when they share none."""
    shared = before.keys() & after.keys()
    if not shared:
        raise ValueError(f"{name}: the two dumps share no problem (same prompt and ground truth)")
    differences = [float(np.mean(after[key].right) - np.mean(before[key].right)) for key in sorted(shared)]
    left_out = len(before.keys() | after.keys()) - len(shared)
    return Comparison(name, len(shared), left_out, resampled(differences), p_value(differences))


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart."""
    parts = [(p.with_suffix("") if p.suffix == ".jsonl" else p).resolve().parts for p in paths]
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    raise ValueError(f"the same dump is named twice: {', '.join(map(str, paths))}")


def show(paths: Sequence[str | os.PathLike], out: str | os.PathLike | None = None) -> Path:
    """Print the table of the dumps, and the comparison of each with the first; write evaluation.csv and .png.

    They go to the folder `out`, by default that of the first dump. Returns the path of the CSV.
    """
    if not paths:
        raise ValueError("name at least one dump: a STEP.jsonl or its folder")
    paths = [Path(path) for path in paths]
    runs = dict(zip(_names(paths), map(read, paths), strict=True))
    measured = {run: {name: summary(b) for name, b in benchmarks.items()} for run, benchmarks in runs.items()}
    rows = []
    for run, benchmarks in measured.items():
        lines = []
        for name, estimates in benchmarks.items():
            of_run = {"checkpoint": run, "benchmark": name, "problems": len(runs[run][name])}
            rows += [of_run | {"metric": metric} | e._asdict() | {"p_value": ""} for metric, e in estimates.items()]
            counts = sorted({len(problem.right) for problem in runs[run][name].values()})
            samples = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
            cells = (_cell(estimates[f"{metric}@{counts[0]}"]) for metric in ("avg", "pass", "maj"))
            lines.append([name, f"{len(runs[run][name])} x {samples}", *cells])
        tables.show(("benchmark", "size x n", "avg@n", "pass@n", "maj@n"), lines, title=run)
    print("percent [95 % interval over problems], n samples a problem")

    first, *others = runs
    for run in others:
        print(f"\n{run} minus {first}, avg in points:")
        shared = [name for name in runs[run] if name in runs[first]]
        for c in (compare(name, runs[first][name], runs[run][name]) for name in shared):
            of_run = {"checkpoint": run, "benchmark": c.benchmark, "problems": c.problems, "metric": "avg difference"}
            rows.append(of_run | c.difference._asdict() | {"p_value": c.p_value})
            value, low, high = (100 * x for x in c.difference)
            left_out = f", {c.left_out} not in both" if c.left_out else ""
            text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}], p = {c.p_value:.2g}, {c.problems} problems{left_out}"
            print(f"  {c.benchmark}: {text}")
        if not shared:
            print("  no benchmark in common")

    out = Path(out) if out is not None else _dump(paths[0]).parent
    tables.write_csv(out / "evaluation.csv", rows)
    print(f"table: {out / 'evaluation.csv'}")
    print(f"figure: {plot(measured, out / 'evaluation.png')}")
    return out / "evaluation.csv"


def _cell(estimate: Measured) -> str:
    value, low, high = (100 * x for x in estimate)
    return f"{value:.3g} [{low:.0f}, {high:.0f}]" if value >= 99.95 else f"{value:.1f} [{low:.0f}, {high:.0f}]"


def plot(measured: dict[str, dict[str, dict[str, Measured]]], path: str | os.PathLike) -> Path:
    """A panel a benchmark: pass@k (lines) and maj@k (dashed) over k with their intervals, to PATH.png."""
    names = sorted({name for benchmarks in measured.values() for name in benchmarks})
    drawn, axes = figure.panels(len(names), max(5.0, 3.4 * min(3, len(names))), 3.0)
    colors = figure.colors(list(measured))
    for axis, name in zip(axes, names, strict=True):
        for run, benchmarks in measured.items():
            for metric, style in (("pass", "-"), ("maj", "--")):
                label = f"{run if len(measured) > 1 else ''} {metric}@k".strip()
                _draw(axis, benchmarks.get(name, {}), metric, color=colors[run], linestyle=style, label=label)
        axis.set_title(name, loc="left", fontsize=10)
        axis.set(xlabel="samples k", ylim=(0, 1))
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda k, _: f"{k:g}")
    figure.legend(drawn, ncols=2)
    return figure.save(drawn, path)


def _draw(axis, estimates: dict[str, Measured], metric: str, **line) -> None:
    at = sorted((int(key.partition("@")[2]), e) for key, e in estimates.items() if key.startswith(f"{metric}@"))
    ks, values = [k for k, _ in at], [e for _, e in at]
    if metric == "pass":
        low, high = [e.low for e in values], [e.high for e in values]
        figure.band(axis, ks, [e.value for e in values], low, high, marker="o", markersize=4, **line)
    else:
        axis.plot(ks, [e.value for e in values], marker="o", markersize=4, linewidth=1.8, **line)
