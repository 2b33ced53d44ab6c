"""Every recipe under every method composes and passes verl's own validation; a typo in any YAML does not."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig, OmegaConf, open_dict

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "recipes/config"
METHODS = sorted(path.stem for path in (CONFIG / "method").glob("*.yaml"))
RECIPES = sorted(path.stem for path in CONFIG.glob("*.yaml") if "- method:" in path.read_text())
YAMLS = sorted(str(path.relative_to(CONFIG)) for path in CONFIG.rglob("*.yaml"))
PATHS = ["data.train_files=train.parquet", "data.val_files=test.parquet", "trainer.default_local_dir=run"]
# Free-form in verl, so no key of its config stands for it.
FREE = ("data.apply_chat_template_kwargs.", "reward.reward_kwargs.")

# what each method sets: estimator, loss, aggregation (None: the recipe's), clip range (None: the recipe's)
TABLE = {
    "grpo": ("grpo", "vanilla", None, None),
    "drgrpo": ("grpo", "vanilla", "seq-mean-token-sum-norm", None),
    "rloo": ("rloo", "vanilla", None, None),
    "reinforce_plus_plus_baseline": ("reinforce_plus_plus_baseline", "vanilla", None, None),
    "opo": ("opo", "vanilla", None, None),
    "optimal_token_baseline": ("optimal_token_baseline", "vanilla", None, None),
    "jspo": ("jspo", "vanilla", None, None),
    "dapo": ("grpo", "vanilla", "token-mean", (0.2, 0.28)),
    "cispo": ("grpo", "cispo", "token-mean", (10.0, 0.2)),
    "sapo": ("grpo", "sapo", "seq-mean-token-mean", None),
    "geo_mean": ("grpo", "geo_mean", None, (0.4, 0.4)),
    "dppo_tv": ("grpo", "dppo_tv", None, (0.15, 0.15)),
    "dppo_kl": ("grpo", "dppo_kl", None, (0.05, 0.05)),
    "gspo": ("grpo", "gspo", "seq-mean-token-mean", (3e-4, 4e-4)),
    "krpo": ("krpo", "vanilla", None, None),
    "krpo_adaptive": ("krpo_adaptive", "vanilla", None, None),
    "krpo_adaptive_score": ("krpo_adaptive", "vanilla", None, None),
    "krpo_memory": ("krpo_memory", "vanilla", None, None),
    "kpo": ("grpo", "kpo", "seq-mean-token-mean", (3e-4, 4e-4)),
    "kpo_unclipped": ("grpo", "kpo", "seq-mean-token-mean", (3e-4, 4e-4)),
    "krpo_kpo": ("krpo", "kpo", "seq-mean-token-mean", (3e-4, 4e-4)),
}
SCRIPTS = {
    "run_krpo_qwen": ("krpo_arithmetic", "Qwen/Qwen2.5-1.5B-Instruct"),
    "run_krpo_llama": ("krpo_arithmetic", "meta-llama/Llama-3.2-1B-Instruct"),
    "run_kpo_qwen": ("kpo_math", "Qwen/Qwen3-4B"),
    "run_kpo_llama": ("kpo_math", "meta-llama/Llama-3.2-3B-Instruct"),
}


def test_the_table_knows_every_method():
    assert set(METHODS) == set(TABLE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_recipe_and_method_compose_and_validate(compose, recipe, method):
    from verl.trainer.ppo.utils import need_reference_policy
    from verl.utils.config import validate_config

    from verl_krpo.backends import cpu_platform

    config = compose(f"method={method}", *PATHS, name=recipe)
    if recipe.endswith("_cpu"):  # as the plugin does on the driver where VERL_PLATFORM=cpu
        cpu_platform.prepare(config)
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=False)
    actor = config.actor_rollout_ref.actor
    estimator, loss, aggregation, clip = TABLE[method]
    assert (config.algorithm.adv_estimator, actor.policy_loss.loss_mode) == (estimator, loss)
    assert aggregation in (None, actor.loss_agg_mode)
    assert clip in (None, (actor.clip_ratio_low, actor.clip_ratio_high))


def leaves(node: dict, at: str = "") -> list[str]:
    """Dotted keys of every value in nested dicts."""
    keys = []
    for key, value in node.items():
        keys += leaves(value, f"{at}{key}.") if isinstance(value, dict) else [at + str(key)]
    return keys


def unknown(keys: list[str], known: DictConfig) -> list[str]:
    """Which of the keys verl's own config, or the plugin's, does not have."""
    return [key for key in keys if not key.startswith(FREE) and not _has(known, key)]


def _has(node: DictConfig, dotted: str) -> bool:
    for key in dotted.split("."):
        if not isinstance(node, DictConfig) or key not in list(node.keys()):  # `in` does not see what is ???
            return False
        node = node._get_node(key)
    return True


def test_every_key_of_every_yaml_is_one_of_verls_and_a_typo_is_none(compose):
    known = compose("+algorithm=krpo", "+actor@actor_rollout_ref.actor.policy_loss=kpo")
    with open_dict(known):
        known.algorithm.krpo_adaptive = compose("+algorithm=krpo_adaptive").algorithm.krpo_adaptive
    for path in YAMLS:
        content = yaml.safe_load((CONFIG / path).read_text())
        keys = leaves({key: value for key, value in content.items() if key not in ("hydra", "defaults")})
        assert (path, unknown(keys, known)) == (path, [])
        typos = [f"{key}_" for key in keys if not key.startswith(FREE)]
        assert unknown(typos, known) == typos


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_typo_on_the_command_line_is_refused(compose, recipe):
    with pytest.raises(ConfigCompositionException, match="algorithm.krpo.proces_var"):
        compose(*PATHS, "method=krpo", "algorithm.krpo.proces_var=1e-5", name=recipe)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if recipe != "arithmetic_cpu"])
def test_vllm_gets_room_for_a_prompt_and_its_response_and_no_more(compose, recipe):
    config = compose(*PATHS, name=recipe)
    length = config.data.max_prompt_length + config.data.max_response_length
    assert config.actor_rollout_ref.rollout.max_model_len == length


def documented() -> list[tuple[str, str, str]]:
    """(recipe, key, value) of the table of values in docs/recipes.md."""
    lines = (ROOT / "docs/recipes.md").read_text().splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    (header,) = [row for row in rows if row[0] == "key"]
    table = rows[rows.index(header) + 2 :]
    table = [row for row in table[: next((i for i, row in enumerate(table) if len(row) != len(header)), None)]]
    return [
        (recipe, row[0], value)
        for row in table
        for recipe, value in zip(header[1:], row[1:], strict=True)
        if recipe in RECIPES and value != "-"
    ]


@pytest.mark.parametrize("recipe", ["krpo_arithmetic", "krpo_openmath", "kpo_math"])
def test_the_values_are_those_of_the_docs(compose, recipe):
    config = compose(*PATHS, name=recipe)
    expected = {key: value for name, key, value in documented() if name == recipe}
    assert len(expected) > 15
    found = {key: str(OmegaConf.select(config, key)) for key in expected}
    assert found == {key: str(yaml.safe_load(_number(value))) for key, value in expected.items()}


def _number(text: str) -> str:
    """YAML reads 1e-6 as a word, 1.0e-6 as a number."""
    return text.replace("e-", ".0e-") if "e-" in text and "." not in text else text


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_composes_its_recipe_with_its_knobs(tmp_path, script):
    from verl_krpo.doctor.job import compose

    python = tmp_path / "python"  # writes down what it is called with: what it would run is tested above
    python.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/arguments\n')
    python.chmod(0o755)
    knobs = {"DRY_RUN": "1", "PYTHON": str(python), "RUN_DIR": str(tmp_path), "METHOD": "rloo", "NGPUS_PER_NODE": "4"}
    done = subprocess.run(
        ["bash", ROOT / f"recipes/{script}.sh", "actor_rollout_ref.rollout.n=5"],
        env=os.environ | knobs,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    *module, command = (arguments := (tmp_path / "arguments").read_text().splitlines())[:3]
    assert (module, command) == (["-m", "verl_krpo"], "check")
    assert arguments[arguments.index("--config-name") + 1] == SCRIPTS[script][0]
    config = compose(arguments[3:])
    assert config.algorithm.adv_estimator == "rloo"
    assert config.actor_rollout_ref.rollout.n == 5
    assert config.actor_rollout_ref.model.path == SCRIPTS[script][1]
    assert config.trainer.n_gpus_per_node == 4
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH == f"{tmp_path}/metrics.jsonl"


@pytest.mark.parametrize(
    "script, knobs, datasets",
    [
        ("run_krpo_qwen", {"LEVEL": "easy"}, ["arithmetic --level easy --seed 1 --train 64000 --test 1000 --out D"]),
        (
            "run_krpo_llama",
            {"TASK": "openmath", "TOPIC": "geometry", "SOURCE": "S"},
            ["openmath_instruct --out D --source S/openmath_instruct --topic geometry"],
        ),
        (
            "run_kpo_qwen",
            {"SOURCE": "S", "BENCHMARKS": "aime24 amc23"},
            [f"{name} --out D/{name} --source S/{name}" for name in ("dapo_math", "aime24", "amc23")],
        ),
        ("run_kpo_llama", {}, [f"{name} --out D/{name}" for name in ("dapo_math", "math500", "aime24", "aime25")]),
        ("eval_math", {"BENCHMARKS": "minerva"}, ["minerva --out D/minerva"]),
    ],
)
def test_a_script_looks_prepares_and_starts_in_that_order(tmp_path, script, knobs, datasets):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/bash\n[ "$1" != -m ] || echo "$*" >> {tmp_path}/calls\n')
    python.chmod(0o755)
    knobs = {"PYTHON": str(python), "RUN_DIR": str(tmp_path / "run"), "DATA_DIR": "D", "NGPUS_PER_NODE": "1", **knobs}
    model = ["owner/model"] if script == "eval_math" else []
    command = ["bash", ROOT / f"recipes/{script}.sh", *model, "trainer.total_epochs=3"]
    done = subprocess.run(command, env=os.environ | knobs, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    calls = [call.removeprefix("-m verl_krpo ") for call in (tmp_path / "calls").read_text().splitlines()]
    looked, *prepared, trained = [call for call in calls if not call.startswith("evaluate")]
    assert looked.startswith("preflight --prepares-data --config-path")
    assert prepared == [f"data {dataset}" for dataset in datasets]
    assert trained.startswith(f"run {tmp_path}/run {python} -m verl.trainer.main_ppo --config-path")
    assert looked.endswith("trainer.total_epochs=3") and trained.endswith("trainer.total_epochs=3")
    assert (calls[-1] == f"evaluate {tmp_path}/run/samples") == (script == "eval_math")


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="is about machines without a GPU")
def test_a_recipe_without_a_gpu_says_so_and_names_the_cpu_recipe(tmp_path):
    env = os.environ | {"PYTHON": sys.executable, "HF_HUB_OFFLINE": "1", "RUN_DIR": str(tmp_path / "run")}
    done = subprocess.run(
        ["bash", ROOT / "recipes/run_krpo_qwen.sh"], env=env, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 1
    assert "no GPU found" in done.stderr and "bash recipes/run_krpo_cpu.sh" in done.stderr
    assert not (tmp_path / "run").exists()  # nothing was started


def test_scripts_are_valid_bash_and_recipes_pass_overrides_on():
    recipes = [path for path in ROOT.glob("recipes/*.sh") if path.name != "launch.sh"]
    assert len(recipes) == 7
    for script in [*ROOT.glob("recipes/*.sh"), *ROOT.glob("scripts/*.sh"), ROOT / "scripts/slurm/train.slurm"]:
        subprocess.run(["bash", "-n", script], check=True)
    assert all('"$@"' in script.read_text() for script in recipes)
