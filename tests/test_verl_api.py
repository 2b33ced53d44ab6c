"""scripts/check_verl_api.py: nothing breaks in the installed verl, and what a doctored copy has changed is named."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verl_krpo import versions

SCRIPT = Path(__file__).parents[1] / "scripts/check_verl_api.py"
CORE, CPU = "krpo and kpo", "CPU backend"

spec = importlib.util.spec_from_file_location("check_verl_api", SCRIPT)
api = sys.modules["check_verl_api"] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(api)

ABSTRACT = "    @abc.abstractmethod\n    def "
# file, what it says, what the doctored copy says; then what is to be named, how, for whom
CHANGES = [
    ("trainer/ppo/core_algos.py", "def agg_loss(", "def aggregate(", "core_algos.agg_loss", "is not there", CORE),
    (
        "utils/config.py",
        " use_critic: bool",
        " critic: bool",
        "validate_config(...)",
        "no parameter use_critic",
        "tools",
    ),
    ("utils/tracking.py", "def log(self, data", "def log(self, metrics", "Tracking.log", "begins with (self, me", CORE),
    (
        "trainer/ppo/ray_trainer.py",
        '"index"',
        '"group"',
        "ray_trainer.compute_advantage",
        "no longer names index",
        CORE,
    ),
    ("workers/utils/losses.py", "old_log_prob=old", "behavior=old", "-> policy_loss_fn", "calls policy_loss_fn", CORE),
    (
        "workers/rollout/vllm_rollout/vllm_rollout.py",
        "def _execute_method",
        "def _collective",
        "ServerAdapter._execute_method",
        "is not there",
        "optional hook",
    ),
    (
        "plugin/platform/platform_base.py",
        f"{ABSTRACT}device_count(",
        f"{ABSTRACT}warp_size(self): ...\n\n{ABSTRACT}device_count(",
        "PlatformBase.warp_size",
        "is abstract, and ours has none",
        CPU,
    ),
    ("workers/rollout/replica.py", ".replica_rank", ".number", "RolloutReplica.replica_rank", "is not there", CPU),
]


@pytest.fixture(scope="module")
def broken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("doctored") / "verl"
    shutil.copytree(api.unpacked(None, Path()), folder, copy_function=os.symlink)
    for path, old, new, *_ in CHANGES:
        text = (folder / path).read_text()
        assert old in text
        (folder / path).unlink()
        (folder / path).write_text(text.replace(old, new))
    return [need for need in api.needs(api.Verl(folder)) if need.problem]


@pytest.mark.parametrize("what, problem, room", [change[3:] for change in CHANGES])
def test_what_changed_is_named(broken, what, problem, room):
    assert any(n.what.endswith(what) and problem in n.problem and n.room == room for n in broken), broken


def test_nothing_else_is_named(broken):
    assert {n.what for n in broken if not any(n.what.endswith(change[3]) for change in CHANGES)} == set()


V1 = "        run_ppo(config, task_runner_class=TaskRunnerV1)\n"
LEGACY = "        run_ppo(config, task_runner_class=TaskRunner)\n"


def copy_that_refuses(folder, *starts):
    """A verl whose main raises in place of starting these trainers, as its branch neo does for V1."""
    shutil.copytree(api.unpacked(None, Path()), folder, copy_function=os.symlink)
    main = folder / "trainer/main_ppo.py"
    text = main.read_text()
    main.unlink()
    for start in starts:
        assert start in text
        text = text.replace(start, '        raise RuntimeError("this trainer is disabled: " "take the other")\n')
    main.write_text(text)
    return api.Verl(folder)


def test_each_trainer_reaches_its_own_hooks():
    verl = api.Verl(api.unpacked(None, Path()))
    v1, legacy = api.trainers(verl)
    assert (v1.name, legacy.name) == ("V1 trainer", "legacy trainer") and not v1.refusal and not legacy.refusal
    for module, name in [*api.DOORS, ("verl.trainer.ppo.ray_trainer", "compute_advantage")]:
        assert v1.reaches(verl, module, name) and legacy.reaches(verl, module, name)
    for owner, other, module, name in (
        (v1, legacy, "verl.trainer.ppo.v1.trainer_base", "PPOTrainer._load_checkpoint"),
        (legacy, v1, "verl.trainer.ppo.ray_trainer", "RayPPOTrainer._load_checkpoint"),
    ):
        assert owner.reaches(verl, module, name) and not other.reaches(verl, module, name)


def test_a_trainer_that_refuses_to_start_reaches_nothing(tmp_path):
    verl = copy_that_refuses(tmp_path / "verl", V1)
    v1, legacy = ways = api.trainers(verl)
    assert v1.refusal == "this trainer is disabled: take the other" and legacy.refusal is None
    assert not v1.reaches(verl, "verl.trainer.ppo.ray_trainer", "compute_advantage")
    assert legacy.reaches(verl, "verl.trainer.ppo.ray_trainer", "compute_advantage")
    assert not list(api.unreached(verl, ways))
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "V1 trainer refuses to start: this trainer is disabled" in done.stdout


def test_names_that_are_there_help_nobody_where_no_trainer_starts(tmp_path):
    verl = copy_that_refuses(tmp_path / "verl", V1, LEGACY)
    missed = {need.what for need in api.unreached(verl, api.trainers(verl))}
    assert {".".join(door) for door in api.DOORS} | {"verl.utils.config.validate_config"} <= missed


def test_the_installed_verl_has_all_that_is_needed_and_is_not_imported():
    code = f"import runpy, sys; sys.argv = ['check', '--all']; runpy.run_path({str(SCRIPT)!r}, run_name='__main__')"
    code = f"import atexit, sys; atexit.register(lambda: print('verl' in sys.modules, 'torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "core_algos.register_adv_est" in done.stdout
    assert f"verl {versions.VERL[0]}: " in done.stdout and " 0 of them not there or changed" in done.stdout
    assert done.stdout.splitlines()[-1] == "False False"


def test_what_krpo_and_kpo_need_decides_the_exit_status(tmp_path):
    (tmp_path / "verl").mkdir()
    (tmp_path / "verl/__init__.py").write_text("")
    done = subprocess.run([sys.executable, SCRIPT, tmp_path], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and "core_algos" in done.stdout
