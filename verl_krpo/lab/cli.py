"""`verl-krpo study`: the commands of the laboratory. They import what they need when they run."""

import functools
import importlib
from pathlib import Path
from typing import Annotated

import typer

study = typer.Typer(
    help="Estimators on simulated rewards, estimators and losses in training; prints a table.", no_args_is_help=True
)

Out = Annotated[Path, typer.Option("--out", help="The folder to write to.", file_okay=False)]
Seed = Annotated[int, typer.Option(help="The same seed makes the same thing.")]
Seeds = Annotated[int, typer.Option(help="How many; 0 only reads OUT/runs.csv.")]
Jobs = Annotated[int, typer.Option(help="Processes, one thread each.")]


SIMULATED = {
    "permutation": "How far advantages and gradient depend on the order of a group (seconds).",
    "estimator": "Every form against GRPO, Dr.GRPO and RLOO over laws of rewards and group sizes (about a minute).",
    "sensitivity": "Signal-to-noise and scale over a grid of Q and R (seconds).",
    "adaptive": "krpo_adaptive against RLOO over prompts, group sizes and batch sizes (a few minutes).",
    "memory": "krpo_memory against RLOO and krpo_adaptive on prompts that recur and drift (a few minutes).",
    "selection": "What algorithm.filter_groups does to the gradient of each estimator (a few minutes).",
}


def _simulated(name: str) -> None:
    def command(out: Out, seed: Seed = 0) -> None:
        from verl_krpo.lab.simulate import simulate

        print(simulate.run(importlib.import_module(f"verl_krpo.lab.simulate.{name}"), out, seed))

    study.command(name, help=SIMULATED[name])(command)


for _name in SIMULATED:
    _simulated(_name)


@study.command()
def forecast(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Recorded rollouts, as verl-krpo replay reads.")],
    out: Out,
    seed: Seed = 0,
) -> None:
    """How well krpo_memory and published trackers foretell a prompt's next visit, on recorded rollouts (seconds)."""
    from verl_krpo.replay import forecast

    print(forecast.run(runs, out, seed))


@study.command()
def gain(out: Out) -> None:
    """The gain of KPO's filter along a response (seconds)."""
    from verl_krpo.lab.simulate import gain

    print(gain.run(out))


Models = Annotated[Path, typer.Option(help="Folder of the warm-started models; what is missing is made there.")]
MODELS = Path("runs/model")


def prepare(models: Path, condition: str) -> None:
    """Build the model of a condition's task, where it is missing."""
    from verl_krpo.lab.train.conditions import CONDITIONS
    from verl_krpo.lab.train.tasks import TASKS

    task = TASKS[CONDITIONS[condition].task]
    task.build(models / task.folder)


@study.command()
def training(
    out: Out,
    conditions: Annotated[str, typer.Option(help="Names from lab/train/conditions.py.")] = "pairs,fours,fours_flip",
    methods: Annotated[
        str, typer.Option(help="Names from lab/train/methods.py.")
    ] = "rloo,grpo,jspo,krpo,krpo_adaptive",
    seeds: Seeds = 20,
    first_seed: int = 0,
    models: Models = MODELS,
    jobs: Jobs = 2,
    other: Annotated[str, typer.Option(help="A method to compare all with, besides RLOO or REINFORCE.")] = "grpo",
    measure: Annotated[
        str, typer.Option(help="What is compared: curve (the accuracy of a sample), greedy, pass8 or entropy.")
    ] = "curve",
) -> None:
    """Train a tiny model under every method, on paired seeds; what is in OUT/runs.csv is not run again."""
    from verl_krpo.lab.train import loop, study

    chosen = range(first_seed, first_seed + seeds)
    tasks = study.tasks(loop.CONDITIONS, conditions.split(","), loop.METHODS, methods.split(","), chosen)
    study.complete(out / "runs.csv", loop.run, tasks, models, functools.partial(prepare, models), jobs)
    print(study.show(out / "runs.csv", other, measure))


@study.command()
def pretrained(
    folder: Annotated[Path, typer.Option(help="What scripts/pretrained_cpu.py made: a model, and tasks beside it.")],
    out: Out,
    conditions: Annotated[str, typer.Option(help="Names from lab/train/pretrained.py.")] = "long_sums,long_products",
    methods: Annotated[
        str, typer.Option(help="Names from lab/train/methods.py.")
    ] = "rloo,none,krpo_adaptive,krpo_adaptive_score",
    seeds: Seeds = 5,
    first_seed: int = 0,
    jobs: Jobs = 2,
) -> None:
    """Train the last layers of a pretrained model under every method, on paired seeds, and measure their gradients."""
    from verl_krpo.lab.train import pretrained, study
    from verl_krpo.lab.train.methods import METHODS

    chosen = range(first_seed, first_seed + seeds)
    tasks = study.tasks(pretrained.CONDITIONS, conditions.split(","), METHODS, methods.split(","), chosen)
    study.complete(
        out / "runs.csv", pretrained.run, tasks, folder, lambda condition: pretrained.prepare(folder / condition), jobs
    )
    print(pretrained.show(out / "runs.csv"))


@study.command()
def compare(
    out: Out = Path("docs/results/compare"),
    models: Models = MODELS,
    jobs: Jobs = 2,
    gradients: Annotated[
        Path | None, typer.Option(help="Where study gradient wrote its CSVs of these tasks: compares the two rankings.")
    ] = None,
) -> None:
    """The main table: every task, every estimator at its best rate, ten seeds (two to three hours of two cores)."""
    from verl_krpo.lab.train import compare

    print(compare.run(out, models, functools.partial(prepare, models), jobs, gradients))


@study.command()
def off_policy(
    out: Out,
    condition: Annotated[str, typer.Option(help="calm, harsh, calm_long, harsh_long, length_256 and so on.")] = "calm",
    methods: Annotated[
        str, typer.Option(help="Names from lab/train/losses.py.")
    ] = "reinforce,vanilla,gspo,kpo,kpo_Q0.001_clip0.02",
    seeds: Seeds = 10,
    first_seed: int = 0,
    models: Models = MODELS,
    jobs: Jobs = 2,
    other: Annotated[str, typer.Option(help="A loss to compare all with, besides REINFORCE.")] = "vanilla",
) -> None:
    """The same for policy losses on long answers, with many updates a batch."""
    training(out, condition, methods, seeds, first_seed, models, jobs, other)


@study.command()
def choice(
    out: Out,
    conditions: Annotated[str, typer.Option(help="Pools, by the share that is hopeless.")] = "dead_0,dead_30,dead_60",
    methods: Annotated[str, typer.Option(help="A way to choose and an estimator each, from lab/train/choose.py.")] = "",
    seeds: Seeds = 10,
    first_seed: int = 0,
    models: Models = MODELS,
    jobs: Jobs = 2,
    record: Annotated[
        Path | None, typer.Option(help="A folder for the rewards of every visit: what study forecast reads.")
    ] = None,
    measure: Annotated[
        str, typer.Option(help="Accuracy of what is compared: curve (the pool) or transfer (prompts outside of it).")
    ] = "curve",
) -> None:
    """Which prompts a step rolls out, and how many responses each gets: every way at equal rollouts (an hour)."""
    from verl_krpo.lab.train import choose, study
    from verl_krpo.lab.train.tasks import TASKS

    names = methods.split(",") if methods else list(choose.METHODS)
    chosen = range(first_seed, first_seed + seeds)
    tasks = study.tasks(choose.CONDITIONS, conditions.split(","), choose.METHODS, names, chosen)
    task = TASKS[choose.TASK]
    study.complete(
        out / "runs.csv",
        functools.partial(choose.run, record=record),
        tasks,
        models,
        lambda condition: task.build(models / task.folder),
        jobs,
    )
    print(choose.show(out / "runs.csv", measure))


@study.command()
def clipped(
    out: Out,
    conditions: Annotated[
        str, typer.Option(help="Names from lab/train/conditions.py.")
    ] = "length_256,length_512,length_1024",
    models: Models = MODELS,
) -> None:
    """Where along a response policy losses clip (a minute of one core)."""
    from verl_krpo.lab.train import clipped

    for condition in conditions.split(","):
        prepare(models, condition)
    print(clipped.run(out, models, conditions.split(",")))


@study.command()
def gradient(
    out: Out,
    conditions: Annotated[
        str, typer.Option(help="Names from lab/train/conditions.py.")
    ] = "pairs,eights,learn_pairs,learn_eights",
    pretrained: Annotated[
        Path | None,
        typer.Option(help="A task's folder that scripts/pretrained_cpu.py made, in the place of conditions."),
    ] = None,
    batches: Annotated[int, typer.Option(help="For each model; 0.3 MB on disk each and method.")] = 100,
    models: Models = MODELS,
    parts: Annotated[Path, typer.Option(help="Gradients that are there are not computed again.")] = Path(
        "runs/gradient"
    ),
) -> None:
    """Signal and variance of real policy gradients, of tiny models in training or of a pretrained one."""
    from verl_krpo.lab.train import gradient
    from verl_krpo.lab.train.pretrained import subject

    if pretrained:
        print(gradient.run(out, [subject(pretrained)], batches, gradient.OF_PRETRAINED, parts))
        return
    for condition in conditions.split(","):
        prepare(models, condition)
        print(gradient.run(out, gradient.of_training(models, condition), batches, gradient.SHOWN, parts), flush=True)
