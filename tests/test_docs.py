"""The documentation keeps its word: shell blocks run, keys exist, metrics are all named, the site builds."""

import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_krpo import advantage
from verl_krpo.advantage import ESTIMATORS, Estimator
from verl_krpo.advantage.krpo import krpo
from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.config import KPO_AT, KpoConfig, KrpoConfig, MemoryConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PAGES = sorted(DOCS.glob("*.md")) + [ROOT / "README.md", CONTRIBUTING]
CONFIGS = {f"algorithm.{name}": estimator.keys for name, estimator in ESTIMATORS.items()} | {KPO_AT: KpoConfig}
CPU_JOB = """#!/usr/bin/env bash
exec python -m verl_krpo check algorithm.adv_estimator=grpo data.train_batch_size=32 trainer.n_gpus_per_node=1 \
    actor_rollout_ref.rollout.name=vllm actor_rollout_ref.rollout.n=8 \
    actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4 actor_rollout_ref.actor.ppo_mini_batch_size=8 \
    actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4 "$@"
"""


def blocks(page, language="bash"):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def bash(script, cwd, timeout, **env):
    command = ["bash", "-euo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, f"{script}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A user's environment, checkout and folder of a job: verl and all it needs is there, without this package."""
    folder = tmp_path_factory.mktemp("user")
    venv.create(folder / "venv", with_pip=False, symlinks=True)
    binaries = folder / "venv" / "bin"
    command = [binaries / "python", "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(command, text=True).strip())
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "verl_krpo" not in entry.name and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    # A checkout of its own, so that building it leaves nothing behind here.
    source = folder / "checkout"
    shutil.copytree(ROOT / "verl_krpo", source / "verl_krpo", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    pip = binaries / "pip"
    pip.write_text(f'#!/bin/sh\nexec "{binaries}/python" -m pip --disable-pip-version-check "$@"\n')
    pip.chmod(0o755)
    (folder / "work").mkdir()
    (folder / "work" / "your_job.sh").write_text(CPU_JOB)
    return folder


SAID = {  # what a block of add_to_your_job.md asks for: what the job or the doctor must then print
    "verl-krpo doctor": ["in force"],
    "your_job.sh algorithm.adv_estimator=krpo": ["algorithm.krpo.process_var = 1e-05"],
    "krpo_adaptive.weight=score": ["algorithm.adv_estimator = krpo_adaptive", "algorithm.krpo_adaptive.weight = score"],
    "loss_mode=kpo": ["policy_loss.kpo.process_var = 1e-06"],
    "verl-krpo doctor --no-ray": ["algorithm.krpo.order = shuffled"],
    "krpo.measurement_var=0.05": ["measurement_var = 0.05", "krpo_adaptive.scale = none", "kpo.process_var = 0.0001"],
}


@pytest.mark.e2e
def test_every_block_of_add_it_to_your_job_runs_in_a_users_environment(user):
    env = {"PATH": f"{user / 'venv' / 'bin'}:{os.environ['PATH']}", "RAY_ADDRESS": "local", "PYTHONPATH": ""}
    install, *rest = blocks(DOCS / "add_to_your_job.md")
    assert "Successfully installed verl-krpo" in bash(install, user / "checkout", 300, **env)
    said = [(block, bash(block, user / "work", 300, **env)) for block in rest]
    assert len(said) >= 7
    for asked, told in SAID.items():
        assert any(asked in block and all(part in text for part in told) for block, text in said), asked


@pytest.mark.e2e
@pytest.mark.parametrize(
    "block",
    [
        pytest.param(block, marks=pytest.mark.nightly if place >= 2 else [])
        for place, block in enumerate(blocks(DOCS / "quickstart.md"))
    ],
)
def test_every_block_of_the_quickstart_runs(block, tmp_path):
    """As it stands there, made short from outside: two steps of training, one test of the suite."""
    env = {"STEPS": "2", "RUN_DIR": str(tmp_path / "run"), "RAY_ADDRESS": "local"}
    env["PYTEST_ADDOPTS"] = "-k test_defaults_are_the_published_settings_members_shuffled"
    env["VIRTUAL_ENV"] = sys.prefix
    said = bash(block, ROOT, 600, **env)
    assert "1 passed" in said if "test.sh" in block else (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_readme_and_the_quickstart_agree_on_the_two_commands():
    readme = [line.split(" #")[0].strip() for block in blocks(ROOT / "README.md") for line in block.splitlines()]
    first = [block.strip() for block in blocks(DOCS / "quickstart.md")[:2]]
    assert first == ["bash recipes/run_krpo_cpu.sh", "bash scripts/test.sh"]
    assert set(first) <= set(readme)


def test_the_layout_of_contributing_names_every_room_and_no_other():
    (table,) = re.findall(r"^\| in `verl_krpo/` .*?\n\n", CONTRIBUTING.read_text(), re.DOTALL | re.MULTILINE)
    named = {name for row in table.strip().splitlines()[2:] for name in re.findall(r"`([\w/.]+)`", row.split("|")[1])}
    rooms = {f"{path.name}/" if path.is_dir() else path.name for path in (ROOT / "verl_krpo").glob("[!_]*")}
    assert {name.removesuffix("kpo.py") for name in named} == rooms - {"py.typed"}


@pytest.mark.parametrize("page, least", [("notebook.md", 7), ("memory.md", 1)])
def test_the_python_of_a_page_runs(page, least, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks(DOCS / page, "python")
    assert len(code) >= least
    exec("\n".join(code), {})


def test_the_baseline_of_contributing_is_four_files_and_verl_can_call_it(monkeypatch):
    from verl_krpo.plugin import estimator, metrics

    files = dict(re.match(r"# (\S+)\n(.*)", code, re.DOTALL).groups() for code in blocks(CONTRIBUTING, "python"))
    assert len(files) == 4
    registered = dict(ESTIMATORS)
    names = {"ESTIMATORS": registered, "Estimator": Estimator}
    for code in files.values():
        exec(code, names)
    names["test_the_own_reward_is_left_out"]()

    monkeypatch.setattr(estimator, "ESTIMATORS", registered)
    monkeypatch.setattr(advantage, "ESTIMATORS", registered)
    metrics.discard()  # of tests before
    rewards = torch.tensor([[0.0, 1.0], [0.0, 0.0], [0.0, 1.0]])
    found, _ = estimator.compute_advantage("median", rewards, torch.ones(3, 2), {}, ["a", "a", "a"])
    assert found[:, 0].tolist() == [0.5, -1.0, 0.5]
    assert metrics.drain()["krpo/advantage_std"] == pytest.approx(0.5**0.5)


def test_the_two_answers_of_which_variance_are_as_the_page_says():
    page = runpy.run_path(str(ROOT / "scripts" / "which_variance.py"))
    for chance in (0.1, 0.5, 0.9):
        for baseline in (0.0, 0.3, chance, 1 - chance):
            # the gradient of a right and of a wrong answer, and their variance
            right, wrong = (1 - baseline) * (1 - chance), baseline * chance
            mean = chance * right + (1 - chance) * wrong
            var = chance * (right - mean) ** 2 + (1 - chance) * (wrong - mean) ** 2
            assert mean == pytest.approx(chance * (1 - chance))
            assert page["exact"](torch.tensor(chance), baseline).item() == pytest.approx(var, abs=1e-7)
    found = page["drawn"](0.7)
    assert sorted(found, key=found.get) == ["krpo_adaptive weight=score", "none", "krpo_adaptive", "rloo"]


def experiments():
    """Config of recipes/config, and overrides, of every training command of the paper index, each once."""
    jobs = {}
    for command in re.findall(r"`([^`]*bash recipes/run_[^`]*)`", (DOCS / "papers.md").read_text()):
        words = shlex.split(command)
        at = words.index("bash")
        knobs = dict(word.split("=", 1) for word in words[:at])
        method, task = ("kpo", "math") if "kpo" in words[at + 1] else ("krpo", knobs.get("TASK", "arithmetic"))
        jobs[(f"{method}_{task}", f"method={knobs.get('METHOD', method)}", *words[at + 2 :])] = None
    return list(jobs)


@pytest.mark.parametrize("job", experiments(), ids=" ".join)
def test_the_commands_of_the_papers_compose_and_validate(compose, job):
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import validate_config

    paths = ["data.train_files=train.parquet", "data.val_files=test.parquet", "trainer.default_local_dir=run"]
    config = compose(*paths, *job[1:], name=job[0])
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=False)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_key_that_a_page_names_exists(page):
    for at, cls in CONFIGS.items():
        short = at.removeprefix("actor_rollout_ref.actor.")
        keys = set(re.findall(rf"(?<!verl_krpo\.){re.escape(short)}\.([a-z_]+)", page.read_text()))
        assert keys <= set(cls.__dataclass_fields__), f"{page.name}: no such keys of {at}"


def test_the_tables_of_keys_and_metrics_are_those_of_the_docstrings():
    reference = runpy.run_path(str(ROOT / "scripts" / "reference.py"))
    for page in reference["PAGES"]:
        assert page.read_text() == reference["written"](page.read_text()), "run python scripts/reference.py"
    for cls in CONFIGS.values():
        for key in cls.__dataclass_fields__:
            assert f"\n| `{key}` | " in (DOCS / "configuration.md").read_text()


def test_every_metric_is_in_the_glossary():
    from types import SimpleNamespace

    from verl_krpo.plugin import loss, metrics, next_batch

    rewards, index = torch.tensor([1.0, 0, 0, 1, 1]), ["a", "a", "b", "b", "c"]
    logged = set(metrics.scalars(krpo(rewards, index), KrpoConfig()))
    _, before = krpo_memory(rewards, index, PromptMemory())
    estimate, after = krpo_memory(rewards, index, before)
    visit = metrics.Visit(before, after, after.step)
    logged |= set(metrics.scalars(estimate, MemoryConfig(), torch.ones(5), visit))
    choosing = MemoryConfig(select="signal", objective="same", allocate="signal")
    logged |= set(next_batch.choose(after, ["a", "b", "c"], 3, choosing, 2, 4, np.random.default_rng(0)).metrics)
    config = SimpleNamespace(policy_loss={}, clip_ratio=0.2, clip_ratio_low=None, clip_ratio_high=None)
    config.global_batch_info = {}
    ones = torch.ones(2, 3)
    logged |= set(loss.compute_policy_loss(-ones, -ones, ones, ones.bool(), config=config)[1])
    named = set(re.findall(r"`((?:krpo|actor)/[a-z_]+)`", (DOCS / "metrics.md").read_text()))
    assert named == logged


def test_the_exit_statuses_are_those_of_doctor():
    from verl_krpo.doctor import finding

    codes = {
        finding.NOT_INSTALLED,
        finding.BROKEN,
        finding.HIDDEN,
        finding.WRONG_VERL,
        finding.WRONG_JOB,
        finding.NOT_IN_WORKER,
    }
    written = {int(code) for code in re.findall(r"^\| (\d+) \|", (DOCS / "tools.md").read_text(), re.MULTILINE)}
    assert written == codes | {0}


def test_the_compatibility_table_has_every_tested_version():
    from verl_krpo.versions import VERL

    rows = re.findall(r"^\| (\d+\.\d+\.\d+) \| .*$", (DOCS / "compatibility.md").read_text(), re.MULTILINE)
    assert tuple(rows) == VERL
    assert "**no**" not in (DOCS / "compatibility.md").read_text()


@pytest.mark.skipif(find_spec("mkdocs") is None, reason="the site needs verl-krpo[docs]")
def test_the_site_builds_strictly_and_loads_nothing(tmp_path):
    env = {"NO_MKDOCS_2_WARNING": "1"}
    bash(f"'{sys.executable}' -m mkdocs build --strict --site-dir '{tmp_path / 'site'}'", ROOT, 600, **env)
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        text = page.read_text()
        assert not re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="https?://', text), page
        assert "arithmatex" not in text and "merror" not in text, page
        prose = re.sub(r"<(script|style|code|pre)\b.*?</\1>", "", text, flags=re.DOTALL)
        assert not re.findall(r".{30}(?:\w_\{|\\[a-z]+).{30}", prose), f"{page}: a formula that is not rendered"
    assert (tmp_path / "site" / "index.html").read_text().count("<math") >= 6


STUDIED = re.compile(r"[+-]0\.\d{3} ± 0\.\d{3}|\d\.\d{2,3} \(\d\.\d{2,3} to \d\.\d{2,3}\)")
IN_VERL = re.compile(r"[+-]0\.\d{3} ±0\.\d{3}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_figures_quoted_from_studies_and_verl_are_in_their_tables(page):
    """Every difference and measure with its interval: of studies in a table beside a CSV, of verl in a printed one."""
    text, studies = page.read_text(), "".join(table.read_text() for table in (DOCS / "results").rglob("*.md"))
    assert set(STUDIED.findall(text)) <= set(STUDIED.findall(studies))
    if "laboratory.md#in-verl" in text:
        assert set(IN_VERL.findall(text)) <= set(IN_VERL.findall("".join(blocks(DOCS / "laboratory.md", "text"))))
