"""What is missing is named with what mends it; a machine that has all is passed."""

import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from verl_krpo import doctor, preflight

RECIPES = Path(__file__).parents[1] / "recipes/config"


@pytest.fixture
def sums(tmp_path):
    """A data file with verl's columns, and its override."""
    path = tmp_path / "sums.parquet"
    pyarrow.parquet.write_table(
        pyarrow.table({"prompt": [[]], "data_source": ["sums"], "reward_model": [{"a": 1}]}), path
    )
    return path


@pytest.fixture
def model(tmp_path):
    """A folder that looks like a model: 20 parameters in bfloat16."""
    folder = tmp_path / "model"
    folder.mkdir()
    for name in ("config.json", "tokenizer.json"):
        (folder / name).write_text("{}")
    (folder / "model.safetensors").write_bytes(bytes(40))
    return folder


@pytest.fixture
def job(compose, sums, model, tmp_path):
    """job(*overrides) -> the config of a small job that lacks nothing but GPUs."""
    needed = [f"data.train_files={sums}", f"data.val_files=[{sums}]", f"actor_rollout_ref.model.path={model}"]
    return lambda *overrides: compose(
        *needed, f"trainer.default_local_dir={tmp_path}/run", "trainer.save_freq=5", *overrides
    )


def test_nothing_is_missing_of_a_complete_job(job):
    config = job()
    assert preflight.plugin() + preflight.model(config) + preflight.data(config) + preflight.disk(config) == []


def test_gpus(job, monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (lack,) = preflight.gpus(job("trainer.n_gpus_per_node=2"))
    assert "no GPU" in lack.what and "recipes/run_krpo_cpu.sh" in lack.mend
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    (lack,) = preflight.gpus(job("trainer.n_gpus_per_node=4"))
    assert lack == preflight.Lack("4 GPUs asked for, 2 found", "NGPUS_PER_NODE=2")
    assert preflight.gpus(job("trainer.n_gpus_per_node=2")) == []
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert preflight.gpus(job("trainer.n_gpus_per_node=4")) == []


def test_a_vllm_that_cannot_be_imported_shows_why(job, monkeypatch, tmp_path):
    assert preflight.engine(job("actor_rollout_ref.rollout.name=hf")) == []
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (lack,) = preflight.engine(job("actor_rollout_ref.rollout.name=vllm"))
    assert "libcudart.so.12" in lack.what and "verl-krpo[gpu]" in lack.mend
    (tmp_path / "vllm.py").write_text("")
    assert preflight.engine(job("actor_rollout_ref.rollout.name=vllm")) == []


@pytest.mark.parametrize(
    "removed, named",
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "no weights")],
)
def test_an_incomplete_model_folder(job, model, removed, named):
    (model / removed).unlink()
    (lack,) = preflight.model(job())
    assert named in lack.what and "MODEL_PATH" in lack.mend


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "runs/model/absent", "tiny"])
def test_a_model_folder_that_is_not_there(job, path):
    (lack,) = preflight.model(job(f"actor_rollout_ref.model.path={path}"))
    assert f"no model folder {path}" in lack.what


def test_a_model_of_the_hub_while_offline(job, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (lack,) = preflight.model(job("actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B-Instruct"))
    assert "not in the cache" in lack.what and "hf download Qwen/Qwen2.5-1.5B-Instruct" in lack.mend


@pytest.mark.parametrize(
    "error, what, mend",
    [
        ("GatedRepoError", "accept its licence", "hf auth login"),
        ("RepositoryNotFoundError", "no model", "MODEL_PATH"),
        ("ConnectTimeout", "does not answer (ConnectTimeout)", "hf download"),
    ],
)
def test_a_model_of_the_hub_that_cannot_be_had(job, monkeypatch, tmp_path, error, what, mend):
    import httpx
    import huggingface_hub.errors

    answer = httpx.Response(403, request=httpx.Request("GET", "https://hub"))
    errors = {"ConnectTimeout": httpx.ConnectTimeout("no route")}
    raised = errors.get(error) or getattr(huggingface_hub.errors, error)("refused", response=answer)

    def refuse(*args, **kwargs):
        raise raised

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", refuse)
    (lack,) = preflight.model(job("actor_rollout_ref.model.path=owner/model"))
    assert what in lack.what and mend in lack.mend


def test_data_files(job, tmp_path):
    (lack,) = preflight.data(job(f"data.val_files=[{tmp_path}/absent.parquet]"))
    assert "absent.parquet" in lack.what and "verl-krpo data" in lack.mend
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1"]}), tmp_path / "other.parquet")
    (lack,) = preflight.data(job(f"data.train_files={tmp_path}/other.parquet"))
    assert "no column data_source, reward_model" in lack.what


def test_the_reward(job):
    at = "reward.custom_reward_function"
    assert preflight.reward(job()) == []
    assert preflight.reward(job(f"{at}.path=pkg://verl_krpo.reward.answer_tag")) == []
    for path, reason in [("pkg://verl_krpo.reward.nothing", "nothing"), ("/nowhere/reward.py", "/nowhere/reward.py")]:
        (lack,) = preflight.reward(job(f"{at}.path={path}"))
        assert reason in lack.what
    (lack,) = preflight.reward(job(f"{at}.path=pkg://verl_krpo.reward.answer_tag", f"{at}.name=scor"))
    assert "scor" in lack.what


@pytest.mark.parametrize("ranks, fits", [(1, None), (8, None), (24, None), (5, 5), (16, 4), (36, 3), (48, 4)])
def test_a_mini_batch_that_the_ranks_cannot_share(job, ranks, fits):
    sizes = ["actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=12"]
    lacks = preflight.mini_batch(job(*sizes, f"trainer.n_gpus_per_node={ranks}"))
    assert [lack.mend.split(",")[0] for lack in lacks] == [
        f"actor_rollout_ref.actor.ppo_mini_batch_size={fits}" for _ in range(fits is not None)
    ]


def test_disk(job, model, monkeypatch):
    config = job("trainer.max_actor_ckpt_to_keep=2")
    needed = 3 * 12 * 20  # checkpoints at once, bytes a parameter, parameters
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": needed - 1}))
    (lack,) = preflight.disk(config)
    assert "3 checkpoints" in lack.what and "RUN_DIR" in lack.mend
    assert preflight.disk(job("trainer.save_freq=-1")) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": needed}))
    assert preflight.disk(config) == []


def test_several_nodes_need_a_cluster(job, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (lack,) = preflight.cluster(job("trainer.nnodes=2"))
    assert "RAY_ADDRESS is not set" in lack.what and "scripts/ray_head.sh" in lack.mend


def test_a_ray_that_never_answers_is_named(job, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(doctor, "RAY_SECONDS", 15)
        (lack,) = preflight.cluster(job("trainer.nnodes=2"))
    assert "within 15 s" in lack.what and "127.0.0.1:" in lack.what and "ray stop" in lack.mend


def test_everything_that_is_missing_is_named_at_once(model, tmp_path):
    (model / "config.json").unlink()
    arguments = ["trainer.n_gpus_per_node=1000", "actor_rollout_ref.rollout.name=hf", "data.train_files=a.parquet"]
    arguments += ["data.val_files=b.parquet", f"actor_rollout_ref.model.path={model}"]
    command = [sys.executable, "-m", "verl_krpo", "preflight"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    lacks = [line for line in done.stderr.splitlines() if line.startswith("missing: ")]
    words = ["GPU", "config.json", "a.parquet", "b.parquet", "share evenly"]
    assert len(lacks) == 5 and all(word in lack for word, lack in zip(words, lacks, strict=True))
    assert done.stderr.count("\n  -> ") == 5
    done = subprocess.run([*command, "--prepares-data", *arguments], capture_output=True, text=True, timeout=120)
    assert done.stderr.count("missing: ") == 3


def test_a_typo_is_one_message(capfd, tmp_path):
    recipe = ["--config-path", str(RECIPES), "--config-name", "krpo_arithmetic"]
    assert preflight.main([*recipe, "method=kpro"]) == 1
    told = capfd.readouterr().err
    assert "Could not find 'method/kpro'" in told and "krpo_adaptive" in told and "Traceback" not in told
    assert preflight.main([*recipe, "algorithm.krpo.proces_var=1"]) == 1
    assert "proces_var" in capfd.readouterr().err
