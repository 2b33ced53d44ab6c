"""`verl-krpo preflight`: what a job would miss, named at once and before Ray starts."""

import os
import sys
from pathlib import Path

from omegaconf import DictConfig

from verl_krpo.doctor import data, machine, model, nodes, probe
from verl_krpo.doctor.finding import MISSING, Finding, exit_status, missing
from verl_krpo.doctor.installation import verdict
from verl_krpo.doctor.job import compose, reason


def examine(overrides: list[str], prepares_data: bool = False) -> list[Finding]:
    """Everything that the job with these arguments of main_ppo would miss on this machine, [] when it can start.

    prepares_data: the recipe writes the data files itself, later.
    """
    findings = plugin()
    if findings:
        return findings  # the job's own config does not compose without it
    config = compose(overrides)
    findings = machine.gpus(config) or machine.engine(config) + machine.attention(config)
    findings += model.present(config) or model.chat_template(config) + model.lengths(config)
    findings += ([] if prepares_data else data.columns(config)) + data.reward(config)
    findings += machine.mini_batch(config) + machine.disk(config)
    if not exit_status(findings) and config.trainer.nnodes > 1:
        findings += cluster(config)
    return findings


def plugin() -> list[Finding]:
    """krpo and kpo are in verl's registries, in this process."""
    found = verdict(probe.registered(), "this process", MISSING)
    return [found] if found.code else []


def cluster(config: DictConfig) -> list[Finding]:
    """A running Ray cluster with enough nodes and GPUs; on each node the plugin, the local model and the data."""
    trainer = config.trainer
    address = config.ray_kwargs.ray_init.get("address") or os.environ.get("RAY_ADDRESS")
    if not address:
        return [missing(f"NNODES={trainer.nnodes} needs a Ray cluster, and RAY_ADDRESS is not set", nodes.HOW_TO_START)]
    paths = (Path(path) for path in (*data.files(config), config.actor_rollout_ref.model.path))
    here = tuple(str(path.absolute()) for path in paths if path.exists())
    findings = nodes.ask(address, trainer.nnodes, trainer.n_gpus_per_node, here)
    return [finding for finding in findings if finding.code]


def main(arguments: list[str]) -> int:
    """`verl-krpo preflight [--prepares-data] ARGUMENTS OF MAIN_PPO`: the exit status is 1 if something is missing."""
    from hydra.errors import HydraException

    overrides = [argument for argument in arguments if argument != "--prepares-data"]
    try:
        findings = examine(overrides, prepares_data="--prepares-data" in arguments)
    except HydraException as error:  # a typo in a key or a METHOD: its message, without Hydra's inner calls
        print(f"this job does not compose: {reason(error)}", file=sys.stderr)
        return 1
    for finding in findings:
        word = "missing" if finding.code else finding.status
        print(f"{word}: {finding.text}\n  -> {finding.fix}\n{finding.detail}".rstrip(), file=sys.stderr)
    return 1 if exit_status(findings) else 0
