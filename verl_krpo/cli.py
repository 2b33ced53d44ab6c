"""`verl-krpo`: the command line. Commands import what they need when they run, so that --help is quick."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from verl_krpo import __version__
from verl_krpo.data.source import NAMES
from verl_krpo.lab.bench import TABLES
from verl_krpo.lab.cli import Out, Seed, study

app = typer.Typer(
    help="KRPO and KPO for verl: data, models, studies and runs read back.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data = typer.Typer(
    help="Write a dataset as verl parquet (train.parquet, test.parquet and a card).", no_args_is_help=True
)
app.add_typer(data, name="data")
app.add_typer(study, name="study")


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True}  # arguments of another parser


@data.command()
def arithmetic(
    out: Out,
    level: Annotated[str, typer.Option(help="easy, normal, hard, or sums (two terms, for the tiny model).")] = "normal",
    train: Annotated[int | None, typer.Option(help="Rows for training; the level's own number if not given.")] = None,
    test: Annotated[int | None, typer.Option(help="Rows held out; the level's own number if not given.")] = None,
    seed: Seed = 0,
) -> None:
    """Generated arithmetic: no test problem occurs in any training set, whatever the seed."""
    from verl_krpo.data.arithmetic import prepare

    prepare(out, level=level, train_rows=train, test_rows=test, seed=seed)


def _published(name: str) -> None:
    def command(
        out: Out,
        source: Annotated[
            Path | None, typer.Option(help="Local files in the dataset's schema, instead of the hub.")
        ] = None,
        limit: Annotated[int | None, typer.Option(help="At most so many problems a split.")] = None,
        topic: Annotated[str | None, typer.Option(help="openmath_instruct: only problems of this topic.")] = None,
    ) -> None:
        from verl_krpo.data.source import prepare

        prepare(name, out, source, limit, topic)

    data.command(name, help=f"{name}, from the Hugging Face hub or local files.")(command)


for _name in NAMES:
    _published(_name)


@app.command()
def tiny_model(
    out: Out,
    seed: Seed = 0,
    steps: Annotated[int, typer.Option(help="Steps of the supervised warm start.")] = 500,
) -> None:
    """Build the tiny Qwen2 model of the CPU recipes and warm-start it (about a minute)."""
    from verl_krpo.tiny_model import build

    build(out, seed=seed, steps=steps)


@app.command(context_settings={"ignore_unknown_options": True})
def doctor(
    overrides: Annotated[
        list[str] | None, typer.Argument(help="What you give verl.trainer.main_ppo, after --", metavar="-- OVERRIDES")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of the table.")] = False,
    ray: Annotated[bool, typer.Option(help="Look into a Ray worker on every node (about 10 s).")] = True,
) -> None:
    """Is the plugin in force here, in a fresh process and in Ray's workers; and what would a verl job use of it?"""
    from verl_krpo.doctor import show

    raise typer.Exit(show.doctor(overrides or [], ray, as_json))


@app.command(context_settings=PASSED_ON, add_help_option=False)
def check(context: typer.Context) -> None:
    """Compose and validate a verl job, start nothing; takes main_ppo's own arguments."""
    from verl_krpo.doctor import job

    raise typer.Exit(job.check(context.args))


@app.command(context_settings=PASSED_ON, add_help_option=False)
def preflight(context: typer.Context) -> None:
    """Name all that a verl job would miss here, before Ray starts; takes main_ppo's own arguments."""
    from verl_krpo.doctor import preflight

    raise typer.Exit(preflight.main(context.args))


@app.command()
def replay(
    rollouts: Annotated[
        list[Path], typer.Argument(help="Folders that trainer.rollout_data_dir named, or .jsonl files.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The HTML report.", dir_okay=False)] = Path("replay.html"),
    krpo: Annotated[
        list[str] | None, typer.Option("--krpo", metavar="KEY=VALUE", help="A key of algorithm.krpo for method krpo.")
    ] = None,
) -> None:
    """What each estimator would make of recorded rollouts: grpo, rloo, krpo, krpo_adaptive, krpo_memory, jspo."""
    from tqdm import tqdm

    from verl_krpo.replay import page
    from verl_krpo.replay.recompute import replay, settings_from
    from verl_krpo.replay.rollouts import files

    settings = settings_from(krpo or [])
    sizes = [sum(path.stat().st_size for path in files(where)) for where in rollouts]
    runs = []
    for where, size in zip(rollouts, sizes, strict=True):
        with tqdm(total=size, desc=where.name, unit="B", unit_scale=True, leave=False, disable=None) as line:
            runs.append(replay(where, settings, advance=line.update))
    page.show(runs)
    print(f"\nreport: {page.write(runs, out)}")


@app.command(context_settings={"allow_interspersed_args": False})
def run(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="Everything of the run goes there.")],
    command: Annotated[
        list[str] | None, typer.Argument(metavar="COMMAND...", help="The job; without it one line sums the run up.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="One line of progress instead of the job's output.")] = False,
) -> None:
    """Run a verl job in a directory of its own, or go on with it after a crash."""
    from verl_krpo.runs import run_dir as runs

    if command:
        raise typer.Exit(runs.run(run_dir, command[command[0] == "--" :], quiet))
    print(" ".join(f"{key} {value:.4g}" for key, value in runs.summary(run_dir).items()))


@app.command()
def curves(
    runs: Annotated[list[Path], typer.Argument(help="Folders that hold a metrics.jsonl of verl's file logger.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="The figure, without ending; `reward` beside the first log.")
    ] = None,
    against: Annotated[
        str | None, typer.Option("--against", metavar="METHOD", help="Also differences to a method, paired by seed.")
    ] = None,
) -> None:
    """What runs have learned: held-out accuracy before and after, reward, seconds a step, and the reward curve."""
    from verl_krpo.runs.curves import show

    show(runs, out, against=against)


@app.command()
def plot(
    runs: Annotated[
        list[str], typer.Argument(metavar="[NAME=]RUN...", help="Folders; one NAME for the seeds of a method.")
    ],
    out: Annotated[Path, typer.Option("--out", help="The figure, a PNG; its ending may be left out.")] = Path("plot"),
) -> None:
    """Training curves of several runs and seeds: reward, accuracy, entropy, gradient norm, krpo and kpo metrics."""
    from verl_krpo.runs.plot import show

    show(runs, out)


@app.command()
def evaluate(
    dumps: Annotated[
        list[Path], typer.Argument(help="STEP.jsonl, or the folder it is in; the others are compared with the first.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", help="For CSV and figure; beside the first dump if not given.")
    ] = None,
) -> None:
    """avg@k, pass@k and maj@k of verl's validation dumps, with intervals and paired comparisons."""
    from verl_krpo.evaluate.checkpoints import show

    show(dumps, out)


@app.command()
def bench(
    table: Annotated[str, typer.Argument(help="; ".join(f"{name}: {text}" for name, text in TABLES.items()) + ".")],
    rounds: Annotated[int, typer.Option(help="How often each contestant takes its turn.")] = 15,
    device: Annotated[str, typer.Option(help="cpu, or cuda for filter and kpo.")] = "cpu",
    json: Annotated[Path | None, typer.Option(help="Also write the rows and the machine here.", dir_okay=False)] = None,
) -> None:
    """What filters, loss, estimator, memory and reward cost: a Markdown table, one thread on a CPU."""
    from verl_krpo.lab.bench import run

    print(run(table, rounds, device, json))


def main() -> None:
    """The entry point: what the user got wrong is one line, anything else keeps its traceback."""
    try:
        app()
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        print(f"verl-krpo: {error}", file=sys.stderr)
        sys.exit(2)
