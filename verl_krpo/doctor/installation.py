"""Is the plugin in force, here and in a fresh process: versions, verl's policy, and what is changed in verl."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from packaging.version import Version

from verl_krpo import versions
from verl_krpo.backends import on_cpu
from verl_krpo.doctor import probe
from verl_krpo.doctor.finding import BROKEN, HIDDEN, NOT_INSTALLED, WRONG_VERL, Finding, exit_status

PROCESS_SECONDS = 180
EXTERNAL_MODULES, EXTERNAL_PLUGINS = "VERL_USE_EXTERNAL_MODULES", "VERL_USE_EXTERNAL_PLUGINS"
AS_MODULE = f"{EXTERNAL_MODULES}=verl_krpo.plugin"


def look() -> list[Finding]:
    """In the order of cause: what comes later is left out where an earlier failure decides it."""
    findings = [Finding("python", "ok", f"{sys.version.split()[0]} ({sys.executable})")]
    findings += [_package(*item) for item in versions.PACKAGES.items()]
    findings += _verl() + [_entry_point()] + _policy() + _rllm()
    if exit_status(findings):
        return findings
    fresh = subprocess.Popen(
        [sys.executable, "-m", "verl_krpo.doctor.probe"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    findings.append(verdict(probe.registered(), "this process"))
    findings.append(verdict(_answer(fresh), "a fresh process"))
    findings.append(_backend())
    return findings + ([] if exit_status(findings) else hooks())


def verdict(answer: dict[str, Any], place: str, code: int | None = None) -> Finding:
    """The finding for what `probe.registered` found in `place`; `code` overrides the exit status of a failure."""
    check, executable = f"plugin in {place}", answer["executable"]
    if len(answer["registered"]) == 2:
        return Finding(check, "ok", "krpo and kpo are registered", detail=", ".join(answer["registered"]))
    if answer["error"]:
        last = answer["error"].strip().splitlines()[-1]
        text = f"the plugin cannot be imported by {executable}: {last}"
        return Finding(check, "failure", text, detail=answer["error"], code=code or BROKEN)
    text = f"{executable} imports verl {answer['verl']} without the plugin, though it can be imported"
    return Finding(
        check, "failure", text, f"start verl with {AS_MODULE}, in Ray's runtime_env too", code=code or HIDDEN
    )


def hooks() -> list[Finding]:
    """What is changed in verl at run time: whether each is in force, why, and until when."""
    from verl_krpo.backends import hooks as backend_hooks
    from verl_krpo.plugin import hooks as plugin_hooks

    findings = []
    for hook in (*plugin_hooks.HOOKS, *backend_hooks.HOOKS):
        if hook.cpu and not on_cpu():
            continue
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings(), contextlib.suppress(Exception):
            warnings.simplefilter("ignore")
            importlib.import_module(hook.module)
        status = {"in force": "ok", "waiting": "note", "missing": "warning" if hook.needed else "note"}[hook.state()]
        why_not = {"waiting": "its module cannot be imported here", "missing": "this verl has no such function"}
        text = f"{hook.why}; until {hook.until}" if status == "ok" else f"{why_not[hook.state()]} ({hook.why})"
        findings.append(Finding(hook.name, status, text, detail=hook.module, section="Changed in verl at run time"))
    return findings


def _package(name: str, tested: str | None) -> Finding:
    version = versions.installed(name)
    if version is None:
        return Finding(name, "note", "not installed")
    known = versions.VERL if name == "verl" else (tested,)
    if version.split("+")[0] in known:
        return Finding(name, "ok", version)
    if known == (None,):
        return Finding(name, "note", f"{version} (no version is tested: your GPU job brings its own)")
    return Finding(name, "warning", f"{version} is not tested (tested: {', '.join(known)})")


def _verl() -> list[Finding]:
    version, newest = versions.installed("verl"), f"pip install verl=={versions.VERL[0]}"
    if version is None:
        return [Finding("verl", "failure", f"verl is not installed in {sys.executable}", newest, code=WRONG_VERL)]
    if Version(version) < Version(versions.OLDEST):
        text = f"verl {version} is too old ({versions.OLDEST} is the oldest)"
        return [Finding("verl", "failure", text, newest, code=WRONG_VERL)]
    if Version(version) < Version(versions.WITH_PLUGINS) and not _as_module():
        text = f"verl {version} does not load plugins by itself (verl {versions.WITH_PLUGINS} does)"
        return [Finding("verl", "failure", text, f"export {AS_MODULE}, or {newest}", code=WRONG_VERL)]
    return []


def _as_module() -> bool:
    return "verl_krpo.plugin" in os.environ.get(EXTERNAL_MODULES, "").split(",")


def _entry_point() -> Finding:
    entries = importlib.metadata.entry_points(group="verl.plugins", name="verl_krpo")
    if entries:
        return Finding("entry point", "ok", f"verl.plugins: {next(iter(entries)).value}")
    if _as_module():
        return Finding("entry point", "note", f"not visible; {EXTERNAL_MODULES} loads the plugin instead")
    text = f"verl-krpo is not installed in {sys.executable} (running from {Path(__file__).parents[2]})"
    return Finding("entry point", "failure", text, "pip install . in its checkout", code=NOT_INSTALLED)


def _policy() -> list[Finding]:
    policy = os.environ.get(EXTERNAL_PLUGINS, "auto").strip().lower()
    if policy == "auto" or "verl_krpo" in [name.strip() for name in policy.split(",")] or _as_module():
        return []
    text = f"{EXTERNAL_PLUGINS}={os.environ[EXTERNAL_PLUGINS]} keeps verl from loading the plugin"
    return [Finding("plugin policy", "failure", text, "unset it, or add verl_krpo to its list", code=HIDDEN)]


def _rllm() -> list[Finding]:
    """rLLM drives verl, and computes advantages itself since its pull request 537. (There is another package rllm.)"""
    spec = importlib.util.find_spec("rllm")  # of a top-level package it imports nothing
    if spec is None or not any(Path(place, "trainer").is_dir() for place in spec.submodule_search_locations or ()):
        return []
    text = (
        "jobs of rLLM never call verl's estimators: algorithm.adv_estimator=krpo has no effect there; losses are called"
    )
    return [Finding("rllm", "warning", text, "register krpo_adaptive with rLLM: docs/examples/rllm_krpo.py")]


def _answer(process: subprocess.Popen) -> dict[str, Any]:
    output, errors = process.communicate(timeout=PROCESS_SECONDS)
    if process.returncode:
        return {"executable": sys.executable, "verl": None, "registered": [], "error": errors}
    return json.loads(output.splitlines()[-1])


def _backend() -> Finding:
    import torch

    if torch.cuda.is_available():
        names = {torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())}
        return Finding("backend", "ok", f"{torch.cuda.device_count()} GPU: {', '.join(sorted(names))}")
    if on_cpu():
        return Finding("backend", "ok", "CPU (VERL_PLATFORM=cpu)")
    text = "no GPU here: jobs on this machine need VERL_PLATFORM=cpu, as the CPU recipes set"
    return Finding("backend", "note", text)
