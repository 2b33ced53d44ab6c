"""`verl-krpo doctor`: is the plugin in force, here and where verl runs, and what does it make of a job?

Every check gives a finding. What stops the plugin from working is a failure with an exit status of its own:

    10  verl-krpo is not installed (its entry point is not visible to verl)
    11  the plugin's import fails
    12  VERL_USE_EXTERNAL_PLUGINS hides the plugin
    13  verl is missing, too old, or does not load entry points
    14  the job's settings are wrong (a typo in a key, a value out of range)
    15  a Ray worker has no plugin
"""

import argparse
import contextlib
import importlib.metadata
import inspect
import io
import json
import os
import signal
import subprocess
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path

from packaging.version import Version

from verl_krpo import versions
from verl_krpo.config import KPO_AT, KRPO_AT, KpoConfig, KrpoConfig, read

NOT_INSTALLED, BROKEN, HIDDEN, WRONG_VERL, WRONG_JOB, NOT_IN_WORKER = 10, 11, 12, 13, 14, 15
PROCESS_SECONDS, WORKER_SECONDS, RAY_SECONDS = 180, 180, 240
MODULES = "VERL_USE_EXTERNAL_MODULES"
PLUGINS = "VERL_USE_EXTERNAL_PLUGINS"


@dataclass
class Finding:
    """One line of the report. status: ok, setting, note, warning or failure; code: the exit status of a failure."""

    check: str
    status: str
    text: str
    detail: str = ""
    code: int = 0


def examine(overrides: list[str], ray: bool = True) -> list[Finding]:
    """Every finding, in the order of cause: what comes later is left out where an earlier failure decides it."""
    python = Finding("python", "ok", f"{sys.version.split()[0]} ({sys.executable})")
    findings = [python] + [_package(*item) for item in versions.PACKAGES.items()]
    found = [_verl(), _entry_point(), _policy()]
    findings += [finding for finding in found if finding]
    if _failed(findings):
        return findings

    fresh = _start_process()
    findings += [judge(probe(), "this process"), judge(_answer(fresh), "a fresh process")]
    findings.append(_backend())
    if ray and not _failed(findings):
        findings += _in_ray()
    if overrides and not _failed(findings):
        findings += _job(overrides)
    return findings


def exit_status(findings: list[Finding]) -> int:
    """The code of the first failure, 0 without one."""
    return next((finding.code for finding in findings if finding.code), 0)


def probe() -> dict:
    """What importing verl registers in the process that runs this. Stdlib only: it also runs where we are missing."""
    import contextlib
    import io
    import sys
    import traceback

    found = {"python": sys.version.split()[0], "executable": sys.executable, "verl": None, "error": None}
    found["registered"] = []
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            import verl
            from verl.trainer.ppo import core_algos

            found["verl"] = verl.__version__
            estimator, loss = core_algos.ADV_ESTIMATOR_REGISTRY.get("krpo"), core_algos.POLICY_LOSS_REGISTRY.get("kpo")
            found["registered"] = [f"{fn.__module__}.{fn.__name__}" for fn in (estimator, loss) if fn is not None]
            if len(found["registered"]) < 2:
                import verl_krpo.plugin  # noqa: F401 (verl swallows why a plugin fails: this raises it again)
        except Exception:
            found["error"] = traceback.format_exc()
    return found


def judge(found: dict, place: str, code: int | None = None) -> Finding:
    """The finding for what `probe` found in `place`; `code` overrides the exit status of a failure."""
    check = f"plugin in {place}"
    if len(found["registered"]) == 2:
        return Finding(check, "ok", "krpo and kpo are registered", detail=", ".join(found["registered"]))
    if found["error"]:
        last = found["error"].strip().splitlines()[-1]
        text = f"the plugin cannot be imported by {found['executable']}: {last}"
        return Finding(check, "failure", text, detail=found["error"], code=code or BROKEN)
    text = (
        f"{found['executable']} imports verl {found['verl']} without the plugin, though it can be imported: {_cure()}"
    )
    return Finding(check, "failure", text, code=code or HIDDEN)


def _cure() -> str:
    return f"start verl with {MODULES}=verl_krpo.plugin, in Ray's runtime_env too"


def _failed(findings: list[Finding]) -> bool:
    return any(finding.code for finding in findings)


def _package(name: str, tested: str | None) -> Finding:
    found = versions.installed(name)
    if found is None:
        return Finding(name, "note", "not installed")
    tested = versions.VERL if name == "verl" else (tested,)
    if found.split("+")[0] in tested:
        return Finding(name, "ok", found)
    if tested == (None,):
        return Finding(name, "note", f"{found} (no version is tested: your GPU job brings its own)")
    return Finding(name, "warning", f"{found} is not tested (tested: {', '.join(tested)})")


def _verl() -> Finding | None:
    found = versions.installed("verl")
    if found is None:
        text = f"verl is not installed in {sys.executable}: pip install verl=={versions.VERL[0]}"
        return Finding("verl", "failure", text, code=WRONG_VERL)
    if Version(found) < Version(versions.OLDEST):
        text = f"verl {found} is too old: pip install verl=={versions.VERL[0]} ({versions.OLDEST} is the oldest)"
        return Finding("verl", "failure", text, code=WRONG_VERL)
    if Version(found) < Version(versions.WITH_PLUGINS) and not _as_module():
        text = (
            f"verl {found} does not load plugins by itself (verl {versions.WITH_PLUGINS} does): "
            f"export {MODULES}=verl_krpo.plugin, or pip install verl=={versions.VERL[0]}"
        )
        return Finding("verl", "failure", text, code=WRONG_VERL)
    return None


def _as_module() -> bool:
    return "verl_krpo.plugin" in os.environ.get(MODULES, "").split(",")


def _entry_point() -> Finding:
    entries = importlib.metadata.entry_points(group="verl.plugins", name="verl_krpo")
    if entries:
        return Finding("entry point", "ok", f"verl.plugins: {next(iter(entries)).value}")
    where = Path(__file__).parents[1]
    if _as_module():
        return Finding("entry point", "note", f"not visible; {MODULES} loads the plugin instead")
    text = f"verl-krpo is not installed in {sys.executable} (running from {where}): pip install . in its checkout"
    return Finding("entry point", "failure", text, code=NOT_INSTALLED)


def _policy() -> Finding | None:
    policy = os.environ.get(PLUGINS, "auto").strip().lower()
    if policy == "auto" or "verl_krpo" in [name.strip() for name in policy.split(",")] or _as_module():
        return None
    text = f"{PLUGINS}={os.environ[PLUGINS]} keeps verl from loading the plugin: unset it, or add verl_krpo to its list"
    return Finding("plugin policy", "failure", text, code=HIDDEN)


def _start_process() -> subprocess.Popen:
    code = f"{inspect.getsource(probe)}\nimport json\nprint('\\n' + json.dumps(probe()))"
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _answer(process: subprocess.Popen) -> dict:
    output, errors = process.communicate(timeout=PROCESS_SECONDS)
    if process.returncode:
        return {"executable": sys.executable, "verl": None, "registered": [], "error": errors}
    return json.loads(output.splitlines()[-1])


def _on_cpu() -> bool:
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def _backend() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("backend", "ok", f"{torch.cuda.device_count()} GPU: {', '.join(sorted(names))}")
    if _on_cpu():
        return Finding("backend", "ok", "CPU (VERL_PLATFORM=cpu)")
    return Finding(
        "backend", "note", "no GPU here: jobs on this machine need VERL_PLATFORM=cpu, as the CPU recipes set"
    )


def ask_ray(module: str, function: str, *arguments, stderr: int | None = None) -> subprocess.CompletedProcess | None:
    """What a function that asks Ray finds, a list of dataclasses, as JSON in the last line of stdout.

    In a process of its own, killed after RAY_SECONDS (then None): ray.init can wait for ever for a cluster that died.
    """
    code = (
        f"import dataclasses, json\nfrom {module} import {function} as ask\n"
        f"print(json.dumps([dataclasses.asdict(found) for found in ask(*{arguments!r})]))"
    )
    pipes = {"stdout": subprocess.PIPE, "stderr": stderr, "text": True}
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True, **pipes)
    try:
        output, errors = process.communicate(timeout=RAY_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        return None
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def _in_ray() -> list[Finding]:
    done = ask_ray("verl_krpo.doctor", "ray_findings", stderr=subprocess.PIPE)
    if done is None:
        cluster = os.environ.get("RAY_ADDRESS") or "the cluster that last ran on this machine, or a new one"
        text = (
            f"Ray did not answer within {RAY_SECONDS} s ({cluster}), and a verl job would wait as well: start it, "
            "or run `ray stop --force`, which also removes what a Ray that died has left behind"
        )
        return [Finding("plugin in a Ray worker", "failure", text, code=NOT_IN_WORKER)]
    if done.returncode:
        return [Finding("plugin in a Ray worker", "failure", "Ray fails", detail=done.stderr, code=NOT_IN_WORKER)]
    return [Finding(**finding) for finding in json.loads(done.stdout.splitlines()[-1])]


def ray_findings() -> list[Finding]:
    """A worker on every node of the cluster that verl's driver would join, or of a local one."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    shipped = {"__name__": "__main__"}  # pickled by value: a worker without the package can still run it
    exec(inspect.getsource(probe), shipped)
    # As in a verl job: RAY_ADDRESS decides, then a cluster that runs here; without a GPU always one of its own.
    address = None if os.environ.get("RAY_ADDRESS") or not _on_cpu() else "local"
    environment = get_ppo_ray_runtime_env()
    try:
        ray.init(address, include_dashboard=False, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except ConnectionError as error:
        text = f"no Ray cluster answers (RAY_ADDRESS={os.environ.get('RAY_ADDRESS')}): {error}"
        return [Finding("plugin in a Ray worker", "failure", text, code=NOT_IN_WORKER)]
    try:
        nodes = [node for node in ray.nodes() if node["Alive"]]
        task = ray.remote(num_cpus=0, max_retries=0)(shipped["probe"])
        placed = [
            task.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote()
            for node in nodes
        ]
        found = ray.get(placed, timeout=WORKER_SECONDS)
        findings = []
        for node, one in zip(nodes, found, strict=True):
            finding = judge(one, f"a Ray worker on {node['NodeManagerAddress']}", NOT_IN_WORKER)
            if finding.code:
                finding.text += ": install verl-krpo in the environment of that node's workers"
            findings.append(finding)
        return findings
    finally:
        ray.shutdown()


def _job(overrides: list[str]) -> list[Finding]:
    """What main_ppo would be given these arguments: settings in force and the features of verl they meet."""
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException
    from verl.trainer.ppo.utils import need_critic, need_reference_policy
    from verl.utils.config import validate_config

    from verl_krpo.check import settings

    try:
        # A job prints and warns as it composes; the report has its own words for that.
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = compose(overrides)
            validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=need_critic(config))
            rows = settings(config)
    except (HydraException, OmegaConfBaseException, ValueError, AssertionError, TypeError) as error:
        return [Finding("job", "failure", f"this job would not start: {_reason(error)}", code=WRONG_JOB)]
    found = [Finding(key, "setting", str(value)) for key, value in rows]
    return found + [Finding(key, status, text) for key, status, text in meets(config)]


def _reason(error: Exception) -> str:
    """Hydra's message with its cause, without its internals and without its advice to add an unknown key by force."""
    lines = [line.strip() for cause in (error, error.__cause__) if cause for line in str(cause).splitlines()]
    skipped = ("full_key:", "object_type=", "To append to your config")
    text = " / ".join(line for line in lines if line and not line.startswith(skipped))
    for cls in (KrpoConfig, KpoConfig):
        if f"not in '{cls.__name__}'" in text:
            text += f" (keys: {', '.join(cls.__dataclass_fields__)})"
    return text


def compose(overrides: list[str]):
    """verl's config for main_ppo's own arguments (--config-path, --config-name and overrides)."""
    import hydra

    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config-path", "-cp", default="pkg://verl.trainer.config")
    parser.add_argument("--config-name", "-cn", default="ppo_trainer")
    options, rest = parser.parse_known_args(overrides)
    if options.config_path.startswith("pkg://"):
        where = hydra.initialize_config_module(options.config_path.removeprefix("pkg://"), version_base=None)
    else:
        where = hydra.initialize_config_dir(str(Path(options.config_path).resolve()), version_base=None)
    with where:
        return hydra.compose(options.config_name, overrides=rest)


def meets(config) -> list[tuple[str, str, str]]:
    """(key, note or warning, text) for each setting of verl's that changes what KRPO or KPO does."""
    algorithm, actor, rollout = config.algorithm, config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout
    rows = []
    if algorithm.adv_estimator == "krpo":
        rows += _krpo_meets(config, algorithm, actor, rollout)
    if actor.policy_loss.loss_mode == "kpo":
        rows += _kpo_meets(config, actor)
    if algorithm.adv_estimator != "krpo" and actor.policy_loss.loss_mode != "kpo":
        text = f"{algorithm.adv_estimator}, with loss_mode={actor.policy_loss.loss_mode}: this job uses neither"
        rows.append(("algorithm.adv_estimator", "warning", f"{text} KRPO nor KPO"))
    return rows


def _krpo_meets(config, algorithm, actor, rollout) -> list[tuple[str, str, str]]:
    krpo = read(KrpoConfig, algorithm.get("krpo"), KRPO_AT)
    at = "actor_rollout_ref."
    rows = []
    if rollout.n == 1:
        rows.append((at + "rollout.n", "warning", "1: a group of one is compared with the prior mean only; use n >= 4"))
    if krpo.order == "arrival":
        rows.append(
            (KRPO_AT + ".order", "warning", "arrival: verl's rows arrive shortest first, so place follows length")
        )
    elif config.trainer.balance_batch:
        rows.append(
            ("trainer.balance_batch", "note", "rows are moved; harmless, as krpo.order=shuffled follows no row order")
        )
    if krpo.scale == "filter_std" and actor.grad_clip:
        text = f"{actor.grad_clip}: published KRPO advantages are several times GRPO's, so this clips far more often"
        rows.append((at + "actor.grad_clip", "note", text))
    if algorithm.use_kl_in_reward:
        rows.append(
            ("algorithm.use_kl_in_reward", "warning", "the KL penalty is part of the rewards that are filtered")
        )
    if rollout.multi_turn.enable:
        rows.append(
            (
                at + "rollout.multi_turn",
                "note",
                "a session counts once, by its final output; tool tokens are masked",
            )
        )
    if algorithm.filter_groups.enable:
        rows.append(("algorithm.filter_groups", "note", "groups of equal rewards are dropped before krpo sees them"))
    if (algorithm.get("rollout_correction") or {}).get("rollout_rs"):
        rows.append(
            ("algorithm.rollout_correction.rollout_rs", "note", "a response that is masked whole leaves its group")
        )
    return rows


def _kpo_meets(config, actor) -> list[tuple[str, str, str]]:
    from verl_krpo.kalman import LocalLevel, gains

    kpo = read(KpoConfig, actor.policy_loss.get("kpo"), KPO_AT)
    at = "actor_rollout_ref.actor."
    rows = []
    if actor.ppo_epochs == 1 and actor.ppo_mini_batch_size >= config.data.train_batch_size:
        text = f"{actor.ppo_mini_batch_size}: one update a batch: the ratio is 1 and kpo does nothing; make it smaller"
        rows.append((at + "ppo_mini_batch_size", "warning", text))
    tokens = config.data.max_response_length
    if kpo.measurement_var != "batch":
        gain = gains(LocalLevel(kpo.process_var, kpo.measurement_var, 0.0, kpo.init_var), tokens)[-1].item()
        if gain < 1e-4:
            text = (
                f"{tokens}: the gain reaches {gain:.1e} there, kpo hardly moves; raise process_var for short responses"
            )
            rows.append(("data.max_response_length", "warning", text))
    low = actor.clip_ratio_low if actor.clip_ratio_low is not None else actor.clip_ratio
    if kpo.clip and low > 0.01:
        rows.append(
            (at + "clip_ratio_low", "warning", f"{low}: the filtered ratio stays near 1; published are 3e-4 and 4e-4")
        )
    if (config.algorithm.get("rollout_correction") or {}).get("bypass_mode"):
        text = "old log-probs are the rollout's: their noise enters the ratio that kpo filters"
        rows.append(("algorithm.rollout_correction.bypass_mode", "note", text))
    if config.distillation.enabled:
        rows.append(
            (
                "distillation.enabled",
                "warning",
                "kpo is the loss of the task rewards; distillation has its own beside it",
            )
        )
    if actor.loss_agg_mode != "seq-mean-token-mean":
        text = f"{actor.loss_agg_mode}: published is seq-mean-token-mean"
        rows.append((at + "loss_agg_mode", "note", text))
    return rows


def as_json(findings: list[Finding]) -> str:
    """The findings and the exit status, as one JSON object."""
    return json.dumps({"exit_status": exit_status(findings), "findings": [asdict(f) for f in findings]}, indent=2)


def show(findings: list[Finding]) -> None:
    """The report on the terminal; the traceback of a failed import comes last."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    colours = {"ok": "green", "note": "cyan", "warning": "yellow", "failure": "bold red"}
    job = next((i for i, f in enumerate(findings) if f.status == "setting"), len(findings))
    table = Table(box=None, show_header=False, padding=(0, 1, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold", max_width=40)
    table.add_column(overflow="fold")
    for f in findings[:job]:
        table.add_row(Text(f.status, style=colours[f.status]), Text(f.check), Text(f.text))
    console.print(table)
    if findings[job:]:
        console.print("\nThis job:")
    for f in findings[job:]:
        if f.status == "setting":
            console.print(Text(f"  {f.check} = {f.text}"))
        else:
            console.print(Text(f.status, style=colours[f.status]), Text(f"{f.check}: {f.text}"))
    for f in findings:
        if f.code and f.detail:
            console.print(Text("\n" + f.detail.rstrip()))
    status = exit_status(findings)
    counted = sum(f.status == "warning" for f in findings)
    if status:
        verdict = "the plugin is in force, this job is not right" if status == WRONG_JOB else "not in force"
        console.print(Text(f"\n{verdict} (exit status {status})", style="bold red"))
    else:
        warned = f", {counted} warning{'s' * (counted > 1)}" if counted else ""
        console.print(Text(f"\nin force{warned}", style="bold green"))
