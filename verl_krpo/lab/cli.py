"""`verl-krpo study`: the commands of the laboratory. They import what they need when they run."""

from pathlib import Path
from typing import Annotated

import typer

study = typer.Typer(
    help="Estimators on simulated rewards, estimators and losses in training; prints a table.", no_args_is_help=True
)

Out = Annotated[Path, typer.Option("--out", help="The folder to write to.", file_okay=False)]
Seed = Annotated[int, typer.Option(help="The same seed makes the same thing.")]


@study.command()
def permutation(out: Out, seed: Seed = 0) -> None:
    """How far advantages and gradient depend on the order of a group (seconds)."""
    from verl_krpo.lab.simulate import permutation

    print(permutation.run(out, seed))


@study.command()
def estimator(out: Out, seed: Seed = 0) -> None:
    """Every form against GRPO, Dr.GRPO and RLOO over laws of rewards and group sizes (about a minute)."""
    from verl_krpo.lab.simulate import estimator

    print(estimator.run(out, seed))


@study.command()
def sensitivity(out: Out, seed: Seed = 0) -> None:
    """Signal-to-noise and scale over a grid of Q and R (seconds)."""
    from verl_krpo.lab.simulate import sensitivity

    print(sensitivity.run(out, seed))


@study.command()
def adaptive(out: Out, seed: Seed = 0) -> None:
    """krpo_adaptive against RLOO over prompts, group sizes and batch sizes (a few minutes)."""
    from verl_krpo.lab.simulate import adaptive

    print(adaptive.run(out, seed))


@study.command()
def memory(out: Out, seed: Seed = 0) -> None:
    """krpo_memory against RLOO and krpo_adaptive on prompts that recur and drift (a few minutes)."""
    from verl_krpo.lab.simulate import memory

    print(memory.run(out, seed))


@study.command()
def selection(out: Out, seed: Seed = 0) -> None:
    """What algorithm.filter_groups does to the gradient of each estimator (a few minutes)."""
    from verl_krpo.lab.simulate import selection

    print(selection.run(out, seed))


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


@study.command()
def training(
    out: Out,
    conditions: Annotated[str, typer.Option(help="Names from lab/train/conditions.py.")] = "pairs,fours,fours_flip",
    methods: Annotated[
        str, typer.Option(help="Names from lab/train/methods.py.")
    ] = "rloo,grpo,jspo,krpo,krpo_adaptive",
    seeds: Annotated[int, typer.Option(help="How many; 0 only reads OUT/runs.csv.")] = 20,
    first_seed: int = 0,
    model: Annotated[Path, typer.Option(help="The tiny model, made there if it is not.")] = Path("runs/model/tiny"),
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    other: Annotated[str, typer.Option(help="A method to compare all with, besides RLOO.")] = "grpo",
) -> None:
    """Train the tiny model under every method, on paired seeds; what is in OUT/runs.csv is not run again."""
    from verl_krpo.lab.train import on_policy, study
    from verl_krpo.tiny_model import build

    chosen = range(first_seed, first_seed + seeds)
    tasks = study.tasks(on_policy.CONDITIONS, conditions.split(","), on_policy.METHODS, methods.split(","), chosen)
    print(study.study(out, on_policy.run, tasks, model, build, jobs, other))


@study.command()
def gradient(
    out: Out,
    condition: Annotated[str, typer.Option(help="A name from lab/train/conditions.py.")] = "pairs",
    batches: Annotated[int, typer.Option(help="For each checkpoint; 2 MB of memory each and method.")] = 100,
    model: Annotated[Path, typer.Option(help="The tiny model, made there if it is not.")] = Path("runs/model/tiny"),
) -> None:
    """Signal-to-noise of the tiny model's own policy gradient, early, midway and late in training (minutes)."""
    from verl_krpo.lab.train import gradient
    from verl_krpo.tiny_model import build

    build(model)
    print(gradient.run(out, model, condition, batches))


@study.command()
def off_policy(
    out: Out,
    condition: Annotated[str, typer.Option(help="A name from lab/train/off_policy.py.")] = "calm",
    methods: Annotated[
        str, typer.Option(help="Names from lab/train/off_policy.py.")
    ] = "reinforce,vanilla,gspo,kpo,kpo_Q0.001_clip0.02",
    seeds: Annotated[int, typer.Option(help="How many; 0 only reads OUT/runs.csv.")] = 10,
    first_seed: int = 0,
    model: Annotated[Path, typer.Option(help="Warm-started models, made there if they are not.")] = Path("runs/model"),
    jobs: Annotated[int, typer.Option(help="Processes, one thread each.")] = 2,
    other: Annotated[str, typer.Option(help="A loss to compare all with, besides REINFORCE.")] = "vanilla",
) -> None:
    """Policy losses on long answers with many updates a batch; what is in OUT/runs.csv is not run again."""
    from verl_krpo.lab.train import off_policy, study

    tasks = study.tasks(
        off_policy.CONDITIONS,
        [condition],
        off_policy.METHODS,
        methods.split(","),
        range(first_seed, first_seed + seeds),
    )
    length = off_policy.CONDITIONS[condition].length
    folder = model / f"digits_{length}"
    print(study.study(out, off_policy.run, tasks, folder, lambda path: off_policy.build(path, length), jobs, other))
