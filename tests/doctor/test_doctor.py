"""doctor in real processes and environments: each way a plugin fails to be in force has its message and exit status."""

import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import pytest
import ray

from verl_krpo import versions
from verl_krpo.doctor import finding as codes
from verl_krpo.doctor import job, nodes

PACKAGE = Path(versions.__file__).parent
BATCH = [
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.name=vllm",
]
KPO_GROUP = "+actor@actor_rollout_ref.actor.policy_loss=kpo"
SELECT = ["+algorithm=krpo_memory", "algorithm.krpo_memory.select=signal"]


def run_doctor(*arguments, python=sys.executable, **env):
    # The checkout must not be the working directory: its package and its egg-info would be found first.
    cleared = {key: value for key, value in os.environ.items() if not key.startswith("VERL_USE_EXTERNAL")}
    return subprocess.run(
        [python, "-m", "verl_krpo", "doctor", *arguments],
        env=cleared | {"COLUMNS": "80", "OMP_NUM_THREADS": "1", "VERL_PLATFORM": ""} | env,
        cwd="/",
        capture_output=True,
        text=True,
        timeout=600,  # a loaded machine takes its time
    )


def metadata_of(folder, version):
    """A folder for PYTHONPATH that makes verl look like another version."""
    info = folder / f"verl-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: verl\nVersion: {version}\n")
    return str(folder)


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter with everything that this one has but verl-krpo."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    command = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    site = Path(subprocess.check_output(command, text=True).strip())
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if "verl_krpo" not in entry.name and not (site / entry.name).exists():
            (site / entry.name).symlink_to(entry)
    return str(python)


@pytest.fixture
def copied(tmp_path):
    """A copy of the package's source, to run it without installing it."""
    shutil.copytree(PACKAGE, tmp_path / "source" / "verl_krpo", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path / "source"


def test_in_force_with_the_settings_of_a_job_and_one_line_for_an_untested_verl(tmp_path):
    done = run_doctor(
        "--no-ray", "--json", "--", *BATCH, "+algorithm=krpo", "algorithm.krpo.process_var=3e-5",
        PYTHONPATH=metadata_of(tmp_path, "0.9.99"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["exit_status"] == 0
    findings = {finding["check"]: finding for finding in report["findings"]}
    assert findings["verl"]["status"] == "warning"
    assert findings["verl"]["text"].startswith("0.9.99 is not tested") and "\n" not in findings["verl"]["text"]
    for place in ("this process", "a fresh process"):
        assert findings[f"plugin in {place}"]["text"] == "krpo and kpo are registered"
    assert findings["Tracking.log"]["status"] == "ok" and "krpo/* metrics" in findings["Tracking.log"]["text"]
    assert findings["algorithm.krpo.process_var"]["text"] == "3e-05"
    assert findings["algorithm.krpo.measurement_var"]["text"] == "0.01"


def test_without_installation(bare_python, copied):
    done = run_doctor(python=bare_python, PYTHONPATH=str(copied))
    assert done.returncode == codes.NOT_INSTALLED
    assert "verl-krpo is not installed" in done.stdout and "pip install ." in done.stdout


def test_a_broken_import_shows_its_traceback(copied):
    (copied / "verl_krpo" / "kalman" / "filter.py").write_text("raise RuntimeError('half an upgrade')\n")
    done = run_doctor("--no-ray", PYTHONPATH=str(copied))
    assert done.returncode == codes.BROKEN
    assert "the plugin cannot be imported" in done.stdout
    assert "Traceback" in done.stdout and "RuntimeError: half an upgrade" in done.stdout


def test_a_policy_that_hides_plugins():
    done = run_doctor(VERL_USE_EXTERNAL_PLUGINS="none")
    assert done.returncode == codes.HIDDEN
    assert "VERL_USE_EXTERNAL_PLUGINS=none" in done.stdout


def test_where_verls_estimators_are_never_called(tmp_path):
    (tmp_path / "rllm").mkdir()
    (tmp_path / "rllm/__init__.py").write_text("raise RuntimeError('not to be imported')\n")
    table = run_doctor("--no-ray", "--json", PYTHONPATH=str(tmp_path))  # another package of that name
    (tmp_path / "rllm/trainer").mkdir()
    trainer = run_doctor("--no-ray", "--json", PYTHONPATH=str(tmp_path))
    before, after = ({f["check"]: f for f in json.loads(done.stdout)["findings"]} for done in (table, trainer))
    assert "rllm" not in before and after["rllm"]["status"] == "warning" and trainer.returncode == 0
    assert "no effect" in after["rllm"]["text"] and "rllm_krpo.py" in after["rllm"]["fix"]


@pytest.mark.parametrize(
    ("version", "said"), [("0.8.0", "VERL_USE_EXTERNAL_MODULES=verl_krpo.plugin"), ("0.6.1", "too old")]
)
def test_a_verl_that_will_not_do(tmp_path, version, said):
    done = run_doctor(PYTHONPATH=metadata_of(tmp_path, version))
    assert done.returncode == codes.WRONG_VERL
    assert version in done.stdout and said in "".join(done.stdout.split()) + done.stdout


def test_a_typo_in_a_key():
    done = run_doctor("--no-ray", "--", *BATCH, "algorithm.adv_estimator=krpo", "+algorithm.krpo.proces_var=1")
    assert done.returncode == codes.WRONG_JOB
    assert "algorithm.krpo.proces_var" in "".join(done.stdout.split())


def test_a_ray_worker_without_the_package(bare_python, free_ports):
    (port,) = free_ports(1)
    host = ray.util.get_node_ip_address()
    short = tempfile.mkdtemp(prefix="ray")  # its own folder, so that no other driver joins; sockets need a short path
    head = subprocess.Popen(
        [bare_python, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        + [f"--port={port}", "--include-dashboard=false", "--num-cpus=1", "--object-store-memory=100000000"]
        + ["--disable-usage-stats", "--min-worker-port=0", "--max-worker-port=0", f"--temp-dir={short}"],
        env=os.environ | {"RAY_AUTH_MODE": "disabled", "PYTHONPATH": ""},
        cwd="/",
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        wait_for(port)
        done = run_doctor("--json", RAY_ADDRESS=f"{host}:{port}", RAY_AUTH_MODE="disabled")
    finally:
        head.terminate()
        head.wait(300)
        shutil.rmtree(short, ignore_errors=True)
    assert done.returncode == codes.NOT_IN_WORKER, done.stdout + done.stderr
    report = json.loads(done.stdout)
    finding = report["findings"][-1]
    assert finding["check"] == f"plugin in a Ray worker on {host}"
    assert "No module named 'verl_krpo'" in finding["text"]
    assert "install verl-krpo in the environment" in finding["fix"]


def test_a_ray_that_never_answers_is_no_hang(monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(nodes, "RAY_SECONDS", 3)
        (finding,) = nodes.ask()
    assert finding.code == codes.NOT_IN_WORKER
    assert "within 3 s (RAY_ADDRESS=127.0.0.1:" in finding.text and "ray stop" in finding.fix


def wait_for(port, seconds=300):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                time.sleep(3)  # the node registers a moment after the port opens
                return
        time.sleep(0.2)
    pytest.fail(f"no Ray at port {port} after {seconds} s")


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        ([], {"algorithm.adv_estimator": "warning"}),
        (["+algorithm=krpo"], {"actor_rollout_ref.rollout.n": "warning", "trainer.balance_batch": "note"}),
        (["+algorithm=krpo_adaptive"], {"actor_rollout_ref.rollout.n": "note"}),
        (["+algorithm=krpo", "algorithm.krpo.baseline=leave_one_out"], {"actor_rollout_ref.rollout.n": "warning"}),
        (["+algorithm=krpo", "algorithm.krpo.order=arrival"], {"algorithm.krpo.order": "warning"}),
        (["+algorithm=krpo", "algorithm.use_kl_in_reward=true"], {"algorithm.use_kl_in_reward": "warning"}),
        (["+algorithm=krpo", "actor_rollout_ref.rollout.multi_turn.enable=true"],
         {"actor_rollout_ref.rollout.multi_turn": "note"}),
        (["+algorithm=krpo", "algorithm.filter_groups.enable=true"], {"algorithm.filter_groups": "note"}),
        (["algorithm.adv_estimator=jspo"], {"actor_rollout_ref.rollout.n": "note"}),
        (["+algorithm=krpo_adaptive", "algorithm.krpo_adaptive.weight=score",
          "algorithm.rollout_correction.bypass_mode=true"], {"algorithm.rollout_correction.bypass_mode": "note"}),
        (["+algorithm=krpo_adaptive", "algorithm.filter_groups.enable=true"],
         {"algorithm.filter_groups.enable": "warning"}),
        ([*SELECT], {"algorithm.krpo_memory.select": "note"}),
        ([*SELECT, "algorithm.krpo_memory.objective=same"], {"algorithm.krpo_memory.objective": "note"}),
        (["+algorithm=krpo_memory", "algorithm.krpo_memory.allocate=signal", "algorithm.use_kl_in_reward=true"],
         {"algorithm.krpo_memory.allocate": "note", "algorithm.use_kl_in_reward": "warning"}),
        ([KPO_GROUP, "actor_rollout_ref.actor.ppo_mini_batch_size=1024"],
         {"actor_rollout_ref.actor.ppo_mini_batch_size": "warning"}),
        ([KPO_GROUP], {"actor_rollout_ref.actor.clip_ratio_low": "warning"}),
        ([KPO_GROUP, "data.max_response_length=16"], {"data.max_response_length": "warning"}),
        ([KPO_GROUP, "algorithm.rollout_correction.bypass_mode=true"],
         {"algorithm.rollout_correction.bypass_mode": "note"}),
        ([KPO_GROUP, "distillation.enabled=true"], {"distillation.enabled": "warning"}),
    ],
)  # fmt: skip
def test_what_a_job_meets(compose, overrides, named):
    met = {finding.check: finding.status for finding in job.caveats(compose(*BATCH, *overrides))}
    assert named.items() <= met.items()


def test_a_steady_gain_is_no_small_one(compose):
    steady = [KPO_GROUP, "data.max_response_length=16", "actor_rollout_ref.actor.policy_loss.kpo.gain=steady"]
    assert "data.max_response_length" not in {finding.check for finding in job.caveats(compose(*BATCH, *steady))}


def test_how_often_prompts_come_back(compose, tmp_path):
    import pandas as pd

    pd.DataFrame({"prompt": range(100)}).to_parquet(tmp_path / "train.parquet")
    often = [f"data.train_files={tmp_path}/train.parquet", "data.train_batch_size=20", "trainer.total_epochs=15"]

    def line(*overrides):
        found = job.caveats(compose(*BATCH, *often, *overrides))
        return [(finding.status, finding.text) for finding in found if finding.check == "data.train_files"]

    text = "100 prompts, 20 a step, 75 steps: a prompt comes 15 times"
    assert line("+algorithm=krpo_memory") == [("note", f"{text}, every 5 steps")]
    assert line("+algorithm=krpo_adaptive") == [("note", f"{text}; +algorithm=krpo_memory remembers it")]
    assert line("+algorithm=krpo") == []
    text = "100 prompts, 20 a step, 6 steps: a prompt comes 1.2 times; a memory helps from the second time on"
    assert line("algorithm.adv_estimator=krpo_memory", "trainer.total_training_steps=6") == [("warning", text)]
    assert line("+algorithm=krpo_memory", "data.train_max_samples=40")[0][1].startswith("40 prompts")
    text = "100 prompts, 20 a step, 75 steps: a prompt comes 15 times, and into the candidates 60 times, every 5 steps"
    assert line(*SELECT) == [("note", text)]
    ((status, text),) = line(*SELECT, "data.train_batch_size=30")
    assert status == "failure" and "from 120 candidates, more than the data's 100 prompts" in text
    ((status, text),) = line(*SELECT, "trainer.total_training_steps=1")
    assert status == "failure" and "none of the data's 100 prompts comes twice" in text
    assert line("+algorithm=krpo_memory", "data.train_files=/nowhere.parquet") == []


def test_a_published_kpo_job_has_no_warning(compose):
    overrides = ["data.max_response_length=4096", "data.train_batch_size=32"]
    actor = [
        "ppo_mini_batch_size=8",
        "clip_ratio_low=3e-4",
        "clip_ratio_high=4e-4",
        "loss_agg_mode=seq-mean-token-mean",
    ]
    overrides += [f"actor_rollout_ref.actor.{item}" for item in actor]
    assert job.caveats(compose(*BATCH, KPO_GROUP, *overrides)) == []


def test_the_newest_tested_version_is_the_one_the_suite_runs_on():
    assert versions.installed("verl") == versions.VERL[0] == versions.PACKAGES["verl"]
    assert versions.untested() is None
