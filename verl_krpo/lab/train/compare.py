"""The main table: every task of COMPARED under every estimator, each at the best of three learning rates.

    rates    every method on every task at each of RATES on a seed of its own; it keeps the rate that scores highest
    table    the same on SEEDS other seeds at that rate, paired

A run's score is the part that it has learned of what there was to learn, (end - start) / (1 - start), of accuracies of
the held-out questions. The end is the mean of the last LAST looks, since one of them fluctuates. Over tasks and seeds,
as rliable defines them (arXiv 2108.13264):

    IQM       mean of the middle half of all scores
    P(X > Y)  probability that a run of X scores higher than one of Y, of the same task, other seeds among them;
              half of a tie; mean over the tasks

with 95 % intervals by the bootstrap, which draws seeds anew within each task. Beside them the paired differences to
RLOO, task by task, and how the ranking agrees with that by the signal-to-noise ratio of the gradient.
"""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from scipy import stats

from verl_krpo.lab.train import results, study
from verl_krpo.lab.train.conditions import COMPARED, CONDITIONS, RATES, at_rate
from verl_krpo.report import intervals, tables

METHODS = ("rloo", "none", "batch_mean", "grpo", "opo", "otb", "jspo", "krpo", "krpo_adaptive", "krpo_adaptive_score")
OF_RECURRING = ("spo", "dbb", "krpo_memory", "krpo_memory_score")
REFERENCE = "rloo"
DUELS = (
    ("krpo_adaptive", "batch_mean"),
    ("krpo_adaptive", "jspo"),
    ("krpo_adaptive_score", "krpo_adaptive"),
    ("krpo_adaptive_score", "none"),
    ("krpo_adaptive_score", "otb"),
    ("krpo", "grpo"),
    ("krpo_memory", "krpo_adaptive"),
    ("krpo_memory_score", "krpo_adaptive_score"),
    ("krpo_memory", "spo"),
)
RATE_SEED = 100
SEEDS = 10
LAST = 5  # looks, a quarter of the run
RESAMPLES = 2000
Rates = dict[tuple[str, str], float]  # (task, method) -> learning rate
MEASURES = {"curve": "accuracy", "greedy": "greedy", "pass8": "pass@8"}


def methods(condition: str) -> tuple[str, ...]:
    return METHODS + (OF_RECURRING if CONDITIONS[condition].pool else ())


def for_rates() -> list[study.Task]:
    return [
        study.Task(at_rate(condition, rate), method, RATE_SEED)
        for condition in COMPARED
        for rate in RATES
        for method in methods(condition)
    ]


def for_table(rates: Rates) -> list[study.Task]:
    """Seed by seed, so that an interrupted study is balanced."""
    return [
        study.Task(at_rate(condition, rates[condition, method]), method, seed)
        for seed in range(SEEDS)
        for condition in COMPARED
        for method in methods(condition)
    ]


def end(curve: str) -> float:
    """Mean of the last LAST values of a curve."""
    return float(np.mean([float(value) for value in curve.split()[-LAST:]]))


def score(curve: str) -> float:
    """The part learned of what there was to learn, of the values of a curve."""
    start = float(curve.split()[0])
    return (end(curve) - start) / (1 - start)


def best_rates(rows: list[dict]) -> Rates:
    """The one of RATES with the highest score, of the runs of RATE_SEED."""
    scores: dict[tuple[str, str], dict[float, float]] = {}
    for row in rows:
        if int(row["seed"]) == RATE_SEED:
            rates = scores.setdefault((_task(row), row["method"]), {})
            rates[float(row["learning_rate"])] = score(row["curve"])
    return {key: max(rates, key=rates.__getitem__) for key, rates in scores.items()}


def _task(row: dict) -> str:
    return row["condition"].rpartition("_lr_")[0]


def of_table(rows: list[dict], rates: Rates) -> list[dict]:
    """The lines of the seeds that all tasks and methods have, their conditions without the rate."""
    wanted = for_table(rates)
    lacking = {task.seed for task in study.missing(wanted, rows)}
    seeds = {task.seed for task in wanted} - lacking
    if not seeds:
        raise ValueError("no seed has all its runs yet: let the study go on")
    named = [row | {"condition": _task(row)} for row in rows if int(row["seed"]) in seeds]
    return [row for row in named if float(row["learning_rate"]) == rates[row["condition"], row["method"]]]


def matrix(rows: list[dict], method: str, measure: str = "curve") -> np.ndarray:
    """Scores (tasks, seeds) of a method, in order of their names and numbers: runs end in any order."""
    scores: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["method"] == method:
            scores.setdefault(row["condition"], {})[int(row["seed"])] = score(row[measure])
    return np.array([[seeds[seed] for seed in sorted(seeds)] for _, seeds in sorted(scores.items())])


def _resampled(scores: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(RESAMPLES, tasks, seeds): seeds drawn anew within each task."""
    chosen = rng.integers(scores.shape[1], size=(RESAMPLES, *scores.shape))
    return np.take_along_axis(scores[None], chosen, axis=2)


def interquartile_mean(scores: np.ndarray) -> intervals.Measured:
    """Of scores (tasks, seeds)."""
    drawn = _resampled(scores, np.random.default_rng(0)).reshape(RESAMPLES, -1)
    value = stats.trim_mean(scores, 0.25, axis=None)
    return intervals.Measured(float(value), *intervals.middle(stats.trim_mean(drawn, 0.25, axis=1)))


def _improvement(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Of scores (..., tasks, seeds): (...)."""
    difference = own[..., :, None] - other[..., None, :]
    return ((difference > 0) + 0.5 * (difference == 0)).mean((-1, -2, -3))


def probability_of_improvement(own: np.ndarray, other: np.ndarray) -> intervals.Measured:
    """P(own > other) of scores (tasks, seeds) each."""
    rng = np.random.default_rng(0)
    drawn = _improvement(_resampled(own, rng), _resampled(other, rng))
    return intervals.Measured(float(_improvement(own, other)), *intervals.middle(drawn))


def overall(rows: list[dict]) -> list[dict]:
    """One line a method, over all tasks."""
    reference, lines = matrix(rows, REFERENCE), []
    for method in METHODS:
        line: dict = {"method": method, "seeds": reference.shape[1]}
        for measure, name in MEASURES.items():
            line |= interquartile_mean(matrix(rows, method, measure)).columns(name)
        line |= probability_of_improvement(matrix(rows, method), reference).columns("better")
        ends = [end(row["entropy"]) for row in rows if row["method"] == method]
        lines.append(line | {"entropy": float(np.mean(ends))})
    return sorted(lines, key=lambda line: -line["accuracy"])


def overall_table(lines: list[dict]) -> str:
    header = ["method", "seeds", *(f"{name}, IQM" for name in MEASURES.values()), "P(better than RLOO)"]
    return tables.table(
        [*header, "entropy"],
        [
            [
                line["method"],
                str(line["seeds"]),
                *(tables.interval(line, name) for name in (*MEASURES.values(), "better")),
            ]
            + [f"{line['entropy']:.3f}"]
            for line in lines
        ],
    )


def by_task(rows: list[dict]) -> list[dict]:
    """One line a task and method: accuracy at the end, and the paired difference to RLOO's, with half its interval."""
    ends: dict[str, dict[str, dict[int, float]]] = {}
    for row in rows:
        ends.setdefault(row["condition"], {}).setdefault(row["method"], {})[int(row["seed"])] = end(row["curve"])
    lines = []
    for task, found in sorted(ends.items()):
        reference = np.array([found[REFERENCE][seed] for seed in sorted(found[REFERENCE])])
        for method, seeds in sorted(found.items()):
            own = np.array([seeds[seed] for seed in sorted(seeds)])
            difference, half = intervals.mean_and_half(own - reference)
            line = {"task": task, "method": method, "seeds": len(own), "accuracy": float(own.mean())}
            lines.append(line | {"difference": difference, "half": half})
    return lines


def task_table(lines: list[dict], tasks: Iterable[str], shown: tuple[str, ...]) -> str:
    """RLOO's accuracy at the end, and the paired differences to it, a line a task."""
    found = {(line["task"], line["method"]): line for line in lines}

    def cell(task: str, method: str) -> str:
        return "{difference:+.3f} ± {half:.3f}".format(**found[task, method])

    others = [method for method in shown if method != REFERENCE]
    cells = [
        [task, f"{found[task, REFERENCE]['accuracy']:.3f}", *(cell(task, method) for method in others)]
        for task in tasks
    ]
    return tables.table(["task", "RLOO", *others], cells)


def duels(rows: list[dict]) -> list[dict]:
    """One line of each of DUELS, over the tasks that both were run on.

    difference: mean of the paired differences of scores over tasks and seeds; better: P(first > second); ahead, behind:
    in so many tasks the 95 % interval of the paired difference lies above 0, below 0.
    """
    lines = []
    for first, second in DUELS:
        tasks = {row["condition"] for row in rows if row["method"] == first}
        shared = [row for row in rows if row["condition"] in tasks]
        own, other = matrix(shared, first), matrix(shared, second)
        drawn = _resampled(own - other, np.random.default_rng(0)).mean((1, 2))
        line = {"first": first, "second": second, "tasks": len(own)}
        difference = intervals.Measured(float((own - other).mean()), *intervals.middle(drawn))
        line |= difference.columns("difference")
        line |= probability_of_improvement(own, other).columns("better")
        by_task = [intervals.mean_and_half(task) for task in own - other]
        line["ahead"] = sum(mean - half > 0 for mean, half in by_task)
        line["behind"] = sum(mean + half < 0 for mean, half in by_task)
        lines.append(line)
    return lines


def duel_table(lines: list[dict]) -> str:
    return tables.table(
        ["first", "second", "score, first less second", "P(first better)", "tasks", "ahead", "behind"],
        [
            [line["first"], line["second"]]
            + [tables.interval(line, "difference", sign="+"), tables.interval(line, "better")]
            + [str(line[key]) for key in ("tasks", "ahead", "behind")]
            for line in lines
        ],
    )


def rate_table(rates: Rates) -> str:
    lines = [[task, *(f"{rates[task, method]:g}" for method in METHODS)] for task in COMPARED]
    return tables.table(["task", *METHODS], lines)


def agreement(finished: list[dict], by_training: list[dict], gradients: Path) -> str:
    """Spearman's correlation over the methods, a line a task: snr of the gradient halfway, and accuracy at the end.

    Beside it the same of the runs that the rates were found with, where every method has the middle one of RATES.
    """
    rate, lines = RATES[len(RATES) // 2], []
    for task in COMPARED:
        path = gradients / f"{task}_{CONDITIONS[task].steps // 2}.csv"
        with path.open(newline="") as file:
            snr = {row["method"]: float(row["snr"]) for row in csv.DictReader(file)}
        ends = {line["method"]: line["difference"] for line in by_training if line["task"] == task}
        same = {
            row["method"]: end(row["curve"])
            for row in finished
            if row["condition"] == at_rate(task, rate) and int(row["seed"]) == RATE_SEED
        }
        both = [method for method in METHODS if method in snr and method in ends]
        ranks = [stats.spearmanr([snr[m] for m in both], [of[m] for m in both]).statistic for of in (ends, same)]
        firsts = [", ".join(sorted(both, key=lambda method: -of[method])[:3]) for of in (snr, ends)]
        lines.append([task, *(f"{rank:+.2f}" for rank in ranks), *firsts])
    header = ["task", "rank correlation", f"all at {rate:g}, one seed", "first three by snr", "by training"]
    return tables.table(header, lines)


def run(out: Path, models: Path, prepare, jobs: int, gradients: Path | None) -> str:
    """Run what OUT/runs.csv has not, then `show`."""
    from verl_krpo.lab.train import loop

    path = out / "runs.csv"
    study.complete(path, loop.run, for_rates(), models, prepare, jobs)
    study.complete(path, loop.run, for_table(best_rates(study.finished(path))), models, prepare, jobs)
    return show(out, gradients)


def show(out: Path, gradients: Path | None) -> str:
    """Tables of what OUT/runs.csv has, written beside it; agreement.md where GRADIENTS has `study gradient`'s CSVs."""
    finished = study.finished(out / "runs.csv")
    rates = best_rates(finished)
    rows = of_table(finished, rates)
    lines, tasks, found = overall(rows), by_task(rows), duels(rows)
    results.draw_curves(rows, out / "curves")
    tables.write_csv(out / "overall.csv", lines)
    tables.write_csv(out / "tasks.csv", tasks)
    tables.write_csv(out / "duels.csv", found)
    recurring = [task for task in COMPARED if CONDITIONS[task].pool]
    texts = {
        "overall": overall_table(lines),
        "tasks": task_table(tasks, COMPARED, METHODS),
        "duels": duel_table(found),
        "recurring": task_table(tasks, recurring, (REFERENCE, *OF_RECURRING)),
        "rates": rate_table(rates),
    }
    if gradients:
        texts["agreement"] = agreement(finished, tasks, gradients)
    for name, text in texts.items():
        (out / f"{name}.md").write_text(text + "\n")
    return "\n\n".join(texts.values())
