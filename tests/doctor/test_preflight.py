"""What is missing is named with what mends it; a machine that has all is passed."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from verl_krpo.doctor import data, machine, nodes, preflight
from verl_krpo.doctor import model as models
from verl_krpo.doctor.finding import missing

RECIPES = Path(__file__).parents[2] / "recipes/config"


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
    """job(*overrides) -> the config of a small job that misses nothing but GPUs."""
    needed = [f"data.train_files={sums}", f"data.val_files=[{sums}]", f"actor_rollout_ref.model.path={model}"]
    return lambda *overrides: compose(
        *needed, f"trainer.default_local_dir={tmp_path}/run", "trainer.save_freq=5", *overrides
    )


def test_nothing_is_missing_of_a_complete_job(job):
    config = job()
    assert preflight.plugin() + models.present(config) + data.columns(config) + machine.disk(config) == []


def test_gpus(job, monkeypatch):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    (finding,) = machine.gpus(job("trainer.n_gpus_per_node=2"))
    assert "no GPU" in finding.text and "recipes/run_krpo_cpu.sh" in finding.fix
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    (finding,) = machine.gpus(job("trainer.n_gpus_per_node=4"))
    assert finding == missing("4 GPUs asked for, 2 found", "NGPUS_PER_NODE=2")
    assert machine.gpus(job("trainer.n_gpus_per_node=2")) == []
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    assert machine.gpus(job("trainer.n_gpus_per_node=4")) == []


def test_a_vllm_that_cannot_be_imported_shows_why(job, monkeypatch, tmp_path):
    assert machine.engine(job("actor_rollout_ref.rollout.name=hf")) == []
    (tmp_path / "vllm.py").write_text("raise ImportError('libcudart.so.12: cannot open shared object file')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (finding,) = machine.engine(job("actor_rollout_ref.rollout.name=vllm"))
    assert "libcudart.so.12" in finding.text and ".[gpu]" in finding.fix
    (tmp_path / "vllm.py").write_text("")
    assert machine.engine(job("actor_rollout_ref.rollout.name=vllm")) == []


@pytest.mark.parametrize(
    "removed, named",
    [("config.json", "no config.json"), ("tokenizer.json", "no tokenizer"), ("model.safetensors", "no weights")],
)
def test_an_incomplete_model_folder(job, model, removed, named):
    (model / removed).unlink()
    (finding,) = models.present(job())
    assert named in finding.text and "MODEL_PATH" in finding.fix


@pytest.mark.parametrize("path", ["/nowhere/model", "./nowhere", "runs/model/absent", "tiny"])
def test_a_model_folder_that_is_not_there(job, path):
    (finding,) = models.present(job(f"actor_rollout_ref.model.path={path}"))
    assert f"no model folder {path}" in finding.text


def test_a_model_of_the_hub_while_offline(job, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    (finding,) = models.present(job("actor_rollout_ref.model.path=Qwen/Qwen2.5-1.5B-Instruct"))
    assert "not in the cache" in finding.text and "hf download Qwen/Qwen2.5-1.5B-Instruct" in finding.fix


@pytest.mark.parametrize(
    "error, what, mend",
    [
        ("GatedRepoError", "accept its license", "hf auth login"),
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
    (finding,) = models.present(job("actor_rollout_ref.model.path=owner/model"))
    assert what in finding.text and mend in finding.fix


def test_data_files(job, tmp_path):
    (finding,) = data.columns(job(f"data.val_files=[{tmp_path}/absent.parquet]"))
    assert "absent.parquet" in finding.text and "verl-krpo data" in finding.fix
    pyarrow.parquet.write_table(pyarrow.table({"prompt": ["1+1"]}), tmp_path / "other.parquet")
    (finding,) = data.columns(job(f"data.train_files={tmp_path}/other.parquet"))
    assert "no column data_source, reward_model" in finding.text


MESSAGES = [[{"role": "user", "content": "1+1"}]] * 3
COLUMNS = {"prompt": MESSAGES, "data_source": ["sums"] * 3, "reward_model": [{"ground_truth": "2"}] * 3}


def write(path, columns):
    """The columns as a file of the path's kind, and the overrides that name it."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.table(columns), path)
    else:
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        path.write_text("\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows))
    return f"data.train_files={path}", f"data.val_files={path}"


@pytest.mark.parametrize("kind", ["parquet", "jsonl", "json"])
def test_what_is_wrong_with_a_data_file_is_named(job, tmp_path, kind, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    path = tmp_path / f"train.{kind}"

    def findings(columns, *overrides):
        return data.columns(job(*write(path, columns), *overrides))

    assert findings(COLUMNS) == []
    renamed = {"question" if name == "prompt" else name: column for name, column in COLUMNS.items()}
    assert findings(renamed, "data.prompt_key=question") == []
    (finding,) = findings(renamed)
    assert finding.text.endswith("has no column prompt") and "data.prompt_key=NAME" in finding.fix
    assert "question" in finding.fix
    (finding,) = findings(COLUMNS, "data.prompt_key=question")
    assert finding.text.endswith("has no column question") and "data.prompt_key=prompt " in finding.fix
    (finding,) = findings(COLUMNS | {"prompt": ["1+1"] * 3})
    assert "the column prompt of" in finding.text and "holds strings" in finding.text
    assert '[{"role": "user", "content": TEXT}]' in finding.fix
    (finding,) = findings(COLUMNS | {"agent_name": ["tool_agent", None, None]})
    assert "has no agent_name on 2 of 3 rows (the first: row 1)" in finding.text
    assert findings(COLUMNS | {"extra_info": [{"index": 1}, None, None]}) == []  # verl fills these in


def test_a_data_file_that_verl_cannot_read(job, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    for name, said in (("train.csv", "does not read"), ("train.jsonl", "cannot be read"), ("t.parquet", "cannot be")):
        (tmp_path / name).write_text('{"prompt": [\n')
        (finding,) = data.columns(job(f"data.train_files={tmp_path}/{name}"))
        assert said in finding.text and name in finding.text


def test_a_tokenizer_without_chat_template(job, model):
    (finding,) = models.chat_template(job())
    assert "no chat template" in finding.text and "custom_chat_template" in finding.fix
    assert models.chat_template(job("actor_rollout_ref.model.custom_chat_template=x")) == []
    assert models.chat_template(job("actor_rollout_ref.model.tokenizer_path=owner/elsewhere")) == []
    (model / "tokenizer_config.json").write_text('{"chat_template": "{{ messages }}"}')
    assert models.chat_template(job()) == []
    (model / "tokenizer_config.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert models.chat_template(job()) == []


def test_flash_attn(job, monkeypatch, tmp_path):
    monkeypatch.delenv("VERL_PLATFORM", raising=False)
    (finding,) = machine.attention(job())
    assert "flash-attn is not installed" in finding.text and "--no-build-isolation" in finding.fix
    override, padding = finding.fix.split()[-2:]
    assert machine.attention(job(override, padding)) == []  # the way out that is named
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "flash_attn.py").write_text("")
    assert machine.attention(job()) == []
    monkeypatch.setenv("VERL_PLATFORM", "cpu")
    (tmp_path / "flash_attn.py").unlink()
    assert machine.attention(job()) == []


@pytest.mark.parametrize(
    "limit, positions, status, said",
    [
        (None, 1024, None, ""),
        (None, 1000, "failure", "data.max_response_length=744"),
        (1024, 4096, None, ""),
        (1000, 4096, "failure", "max_model_len=1024"),
        (8192, 4096, "failure", "max_model_len=1024"),
        (None, 131072, "warning", "max_model_len=1024"),
        (None, None, None, ""),
    ],
)
def test_prompt_and_response_fit(job, model, limit, positions, status, said):
    # Llama-3.2-3B: 28 layers, 8 heads of keys and values of 128 each
    shape = {"num_hidden_layers": 28, "num_attention_heads": 24, "num_key_value_heads": 8, "hidden_size": 3072}
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": positions} | shape))
    lengths = ["data.max_prompt_length=256", "data.max_response_length=768", "actor_rollout_ref.rollout.name=vllm"]
    findings = models.lengths(job(*lengths, f"actor_rollout_ref.rollout.max_model_len={limit or 'null'}"))
    assert [finding.status for finding in findings] == ([status] if status else [])
    assert all(said in finding.fix and "256 + 768" in finding.text or limit == 8192 for finding in findings)
    if status == "warning":
        assert "14.0 GiB" in findings[0].text and findings[0].code == 0


def test_lengths_before_an_engine_is_named(job, model):
    (model / "config.json").write_text(json.dumps({"max_position_embeddings": 131072}))
    assert models.lengths(job("data.max_prompt_length=256", "actor_rollout_ref.rollout.name='???'")) == []


def test_the_reward(job):
    at = "reward.custom_reward_function"
    assert data.reward(job()) == []
    assert data.reward(job(f"{at}.path=pkg://verl_krpo.reward.answer_tag")) == []
    for path, reason in [("pkg://verl_krpo.reward.nothing", "nothing"), ("/nowhere/reward.py", "/nowhere/reward.py")]:
        (finding,) = data.reward(job(f"{at}.path={path}"))
        assert reason in finding.text
    (finding,) = data.reward(job(f"{at}.path=pkg://verl_krpo.reward.answer_tag", f"{at}.name=scor"))
    assert "scor" in finding.text


@pytest.mark.parametrize("ranks, fits", [(1, None), (8, None), (24, None), (5, 5), (16, 4), (36, 3), (48, 4)])
def test_a_mini_batch_that_the_ranks_cannot_share(job, ranks, fits):
    sizes = ["actor_rollout_ref.actor.ppo_mini_batch_size=2", "actor_rollout_ref.rollout.n=12"]
    findings = machine.mini_batch(job(*sizes, f"trainer.n_gpus_per_node={ranks}"))
    assert [finding.fix.split(",")[0] for finding in findings] == [
        f"actor_rollout_ref.actor.ppo_mini_batch_size={fits}" for _ in range(fits is not None)
    ]


def test_disk(job, model, monkeypatch):
    config = job("trainer.max_actor_ckpt_to_keep=2")
    needed = 2 * 12 * 20  # checkpoints at once, bytes a parameter, parameters
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": needed - 1}))
    (finding,) = machine.disk(config)
    assert "2 checkpoints" in finding.text and "RUN_DIR" in finding.fix
    assert machine.disk(job("trainer.save_freq=-1")) == []
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": needed}))
    assert machine.disk(config) == []


def test_several_nodes_need_a_cluster(job, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    (finding,) = preflight.cluster(job("trainer.nnodes=2"))
    assert "RAY_ADDRESS is not set" in finding.text and "scripts/ray_head.sh" in finding.fix


def test_a_ray_that_never_answers_is_named(job, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(nodes, "RAY_SECONDS", 3)
        (finding,) = preflight.cluster(job("trainer.nnodes=2"))
    assert "within 3 s" in finding.text and "127.0.0.1:" in finding.text and "ray stop" in finding.fix


def test_everything_that_is_missing_is_named_at_once(model, tmp_path, capfd):
    (model / "config.json").unlink()
    arguments = ["trainer.n_gpus_per_node=1000", "actor_rollout_ref.rollout.name=hf", "data.train_files=a.parquet"]
    arguments += ["data.val_files=b.parquet", f"actor_rollout_ref.model.path={model}"]
    command = [sys.executable, "-m", "verl_krpo", "preflight"]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=600)
    assert done.returncode == 1
    named = [line for line in done.stderr.splitlines() if line.startswith("missing: ")]
    words = ["GPU", "config.json", "a.parquet", "b.parquet", "share evenly"]
    assert len(named) == 5 and all(word in line for word, line in zip(words, named, strict=True))
    assert done.stderr.count("\n  -> ") == 5
    assert preflight.main(["--prepares-data", *arguments]) == 1
    assert capfd.readouterr().err.count("missing: ") == 3


def test_a_typo_is_one_message(capfd, tmp_path):
    recipe = ["--config-path", str(RECIPES), "--config-name", "krpo_arithmetic"]
    assert preflight.main([*recipe, "method=kpro"]) == 1
    told = capfd.readouterr().err
    assert "Could not find 'method/kpro'" in told and "krpo_adaptive" in told and "Traceback" not in told
    assert preflight.main([*recipe, "algorithm.krpo.proces_var=1"]) == 1
    assert "proces_var" in capfd.readouterr().err
