"""What a recipe needs, looked at before Ray starts: `verl-krpo preflight` takes main_ppo's own arguments.

Everything that is missing is named at once, each with what mends it; the exit status is then 1.

    --prepares-data    the recipe writes the data files itself, later
"""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

IMPORT_SECONDS, JOIN_SECONDS, NODE_SECONDS, HUB_SECONDS = 300, 60, 180, 10
# Bytes a parameter in a checkpoint of verl's: float32 weights and Adam's two moments.
CHECKPOINT_BYTES = 12
START_RAY = "bash scripts/ray_head.sh on one node, bash scripts/ray_worker.sh HEAD_IP on the others; RAY_ADDRESS=auto"
COLUMNS = ("prompt", "data_source", "reward_model")


@dataclass
class Lack:
    """What is missing, and what mends it."""

    what: str
    mend: str


def examine(overrides: list[str], prepares_data: bool = False) -> list[Lack]:
    """Everything that the job with these arguments of main_ppo would miss on this machine, [] when it can start."""
    lacks = plugin()
    if lacks:
        return lacks  # the job's own config does not compose without it
    from verl_krpo.doctor import compose

    config = compose(overrides)
    lacks = gpus(config) or engine(config)
    lacks += model(config)
    lacks += [] if prepares_data else data(config)
    lacks += reward(config) + mini_batch(config)
    lacks += disk(config)
    if not lacks and config.trainer.nnodes > 1:
        lacks += cluster(config)
    return lacks


def plugin() -> list[Lack]:
    """krpo and kpo in verl's registries, once verl is imported."""
    from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY

    if "krpo" in ADV_ESTIMATOR_REGISTRY and "kpo" in POLICY_LOSS_REGISTRY:
        return []
    mend = f"{sys.executable} -m pip install -e .   (then: verl-krpo doctor)"
    return [Lack(f"verl in {sys.executable} does not load verl-krpo", mend)]


def gpus(config: DictConfig) -> list[Lack]:
    """GPUs of this node against trainer.n_gpus_per_node; a CPU job has none to look for."""
    import torch

    if _on_cpu() or config.trainer.nnodes > 1:  # several nodes: Ray knows them, and the driver's may have no GPU
        return []
    found, wanted = torch.cuda.device_count(), config.trainer.n_gpus_per_node
    if not found:
        cpu = (
            "bash recipes/run_krpo_cpu.sh   (the same method on a tiny model; DRY_RUN=1 checks this job without a GPU)"
        )
        return [Lack("no GPU found on this machine", cpu)]
    if found < wanted:
        return [Lack(f"{wanted} GPUs asked for, {found} found", f"NGPUS_PER_NODE={found}")]
    return []


def engine(config: DictConfig) -> list[Lack]:
    """The rollout engine can be imported: tried in a process of its own, as a vLLM can be broken in many ways."""
    if OmegaConf.select(config, "actor_rollout_ref.rollout.name") != "vllm":
        return []
    done = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    if done.returncode == 0:
        return []
    reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
    mend = "pip install 'verl-krpo[gpu]', or PYTHON=/path/to/python of your verl environment"
    return [Lack(f"{sys.executable} cannot import vllm ({reason[0]})", mend)]


def model(config: DictConfig) -> list[Lack]:
    """A folder that transformers can load, or a model of the Hugging Face hub that is here or can be fetched."""
    path = config.actor_rollout_ref.model.path
    folder = Path(path).expanduser()
    if folder.is_dir():
        wanted = {"config.json": ["config.json"], "tokenizer": ["tokenizer.json", "tokenizer.model", "vocab.json"]}
        wanted["weights"] = ["*.safetensors", "*.bin"]
        missing = [name for name, globs in wanted.items() if not any(any(folder.glob(g)) for g in globs)]
        mend = "MODEL_PATH=FOLDER with a model as transformers saves it, or the hub's name of one"
        return [Lack(f"the model folder {path} has no {', no '.join(missing)}", mend)] if missing else []
    if path.startswith(("/", ".", "~")) or path.count("/") != 1:
        return [Lack(f"there is no model folder {path}", "MODEL_PATH=FOLDER, or the hub's name OWNER/MODEL")]
    return _on_hub(path)


def _on_hub(name: str) -> list[Lack]:
    from huggingface_hub import HfApi, constants, try_to_load_from_cache
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(try_to_load_from_cache(name, "config.json"), str):
        return []
    elsewhere = f"where there is a network: hf download {name} --local-dir FOLDER; then MODEL_PATH=FOLDER"
    if constants.HF_HUB_OFFLINE:
        return [Lack(f"the model {name} is not in the cache, and HF_HUB_OFFLINE is set", elsewhere)]
    try:
        HfApi().model_info(name, timeout=HUB_SECONDS)
    except GatedRepoError:
        mend = f"accept its licence at https://huggingface.co/{name}, then: hf auth login"
        return [Lack(f"the model {name} is given to those who accept its licence", mend)]
    except RepositoryNotFoundError:
        return [Lack(f"the hub has no model {name}, or does not show it to you", "MODEL_PATH, or: hf auth login")]
    except Exception as error:  # no network has many names: connection, proxy, certificate, timeout
        return [Lack(f"the model {name} is not here and the hub does not answer ({type(error).__name__})", elsewhere)]
    return []


def data(config: DictConfig) -> list[Lack]:
    """The data files exist and have the columns that verl reads."""
    import pyarrow.parquet

    lacks = []
    for path in _data_files(config):
        if not Path(path).exists():
            lacks.append(
                Lack(f"there is no data file {path}", "verl-krpo data --help   (writes it), or DATA_DIR=FOLDER")
            )
            continue
        missing = [name for name in COLUMNS if name not in pyarrow.parquet.read_schema(path).names]
        if missing:
            mend = "verl-krpo data --help   (writes what verl reads)"
            lacks.append(Lack(f"the data file {path} has no column {', '.join(missing)}", mend))
    return lacks


def reward(config: DictConfig) -> list[Lack]:
    """The job's own reward function can be loaded."""
    from verl.utils.import_utils import load_extern_object

    function = config.reward.custom_reward_function
    if not function.path:
        return []
    try:
        load_extern_object(function.path, function.name)
    except (ImportError, FileNotFoundError, AttributeError) as error:
        mend = "pip install 'verl-krpo[gpu]', or mend reward.custom_reward_function.path and .name"
        return [Lack(f"the reward {function.name} of {function.path} cannot be loaded ({error})", mend)]
    return []


def mini_batch(config: DictConfig) -> list[Lack]:
    """An update's responses can be shared among the ranks evenly: verl asserts it, but in the first step."""
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node // actor.get("ulysses_sequence_parallel_size", 1)
    size = actor.ppo_mini_batch_size
    if config.trainer.val_only or size * n % ranks == 0:
        return []
    step = ranks // math.gcd(ranks, n)
    fits = math.ceil(size / step) * step
    what = f"an update has {size} prompts x {n} = {size * n} responses, which {ranks} ranks cannot share evenly"
    return [Lack(what, f"actor_rollout_ref.actor.ppo_mini_batch_size={fits}, or another number of GPUs")]


def disk(config: DictConfig) -> list[Lack]:
    """Room for the checkpoints that will exist at once, where the model's size is known here."""
    import shutil

    weights = _weights(config.actor_rollout_ref.model.path)
    if config.trainer.save_freq <= 0 or not weights:
        return []
    kept = (config.trainer.max_actor_ckpt_to_keep or 1) + 1  # the oldest goes when the newest is complete
    needed = kept * CHECKPOINT_BYTES * weights
    where = Path(config.trainer.default_local_dir).absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free >= needed:
        return []
    what = f"{where} has {free / 2**30:.0f} GiB free, {kept} checkpoints take about {needed / 2**30:.0f} GiB"
    return [Lack(what, "RUN_DIR=FOLDER on a larger disk, or trainer.save_freq=-1 for none")]


def _weights(path: str) -> int:
    """Parameters of a local or cached model, by the size of its safetensors in bfloat16; 0 where it is not here."""
    folder = Path(path).expanduser()
    if not folder.is_dir():
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(path, "config.json") if path.count("/") == 1 else None
        if not isinstance(cached, str):
            return 0
        folder = Path(cached).parent
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2


def cluster(config: DictConfig) -> list[Lack]:
    """A running Ray cluster with enough nodes and GPUs; on each node the plugin, the local model and the data."""
    from verl_krpo import doctor

    trainer = config.trainer
    address = config.ray_kwargs.ray_init.get("address") or os.environ.get("RAY_ADDRESS")
    if not address:
        return [Lack(f"NNODES={trainer.nnodes} needs a Ray cluster, and RAY_ADDRESS is not set", START_RAY)]
    paths = [path for path in (*_data_files(config), config.actor_rollout_ref.model.path) if Path(path).exists()]
    paths = [str(Path(path).absolute()) for path in paths]
    asked = address, trainer.nnodes, trainer.n_gpus_per_node, paths
    done = doctor.ask_ray("verl_krpo.preflight", "cluster_lacks", *asked)
    if done is None:
        what = f"no answer from Ray at RAY_ADDRESS={address} within {doctor.RAY_SECONDS} s"
        return [Lack(what, f"end what is left of it (`ray stop --force` on every node), then {START_RAY}")]
    if done.returncode:
        return [Lack(f"asking Ray at RAY_ADDRESS={address} fails, as told above", START_RAY)]
    return [Lack(**lack) for lack in json.loads(done.stdout.splitlines()[-1])]


def cluster_lacks(address: str, nnodes: int, gpus: int, paths: list[str]) -> list[Lack]:
    """What the Ray cluster at this address lacks: nodes with as many GPUs, and on each the plugin and these paths."""
    import inspect

    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    from verl.trainer.constants_ppo import get_ppo_ray_runtime_env

    from verl_krpo import doctor

    environment = get_ppo_ray_runtime_env()
    try:
        ray.init(address=address, log_to_driver=False, logging_level="ERROR", runtime_env=environment)
    except ConnectionError as error:
        mend = f"{START_RAY}; where Ray asks for a token: RAY_AUTH_MODE=token and the head's ~/.ray/auth_token"
        return [Lack(f"no answer from Ray at RAY_ADDRESS={address} ({str(error).splitlines()[0]})", mend)]
    try:
        nodes, able = _nodes(gpus)
        until = time.monotonic() + JOIN_SECONDS
        while len(able) < nnodes and time.monotonic() < until:
            print(f"waiting for Ray nodes: {len(able)} of {nnodes}", file=sys.stderr)
            time.sleep(5)
            nodes, able = _nodes(gpus)
        lacks = []
        if len(able) < nnodes:
            wanted = f"{nnodes} nodes with {gpus} GPUs each asked for"
            lacks.append(Lack(f"{wanted}; Ray at {address} has {len(able)} (of {len(nodes)} nodes)", START_RAY))
        shipped = {"__name__": "__main__"}  # pickled by value: a node without the package can still run it
        exec(inspect.getsource(doctor.probe) + inspect.getsource(_absent), shipped)
        answers = []
        for node in nodes:
            there = {"num_cpus": 0, "max_retries": 0}
            there["scheduling_strategy"] = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            probed = ray.remote(shipped["probe"]).options(**there).remote()
            absent = ray.remote(shipped["_absent"]).options(**there).remote(paths)
            answers.append((node["NodeManagerAddress"], probed, absent))
        for host, probed, absent in answers:
            found, missing = ray.get([probed, absent], timeout=NODE_SECONDS)
            finding = doctor.judge(found, f"a Ray worker on {host}")
            if finding.code:
                mend = f"on {host}: pip install the checkout (pip install .) in that environment"
                lacks.append(Lack(f"node {host}: {finding.text}", mend))
            for path in missing:
                lacks.append(Lack(f"node {host} does not see {path}", "put it on a file system that every node mounts"))
        return lacks
    finally:
        ray.shutdown()


def _nodes(gpus: int) -> tuple[list[dict], list[dict]]:
    """The living nodes of Ray's cluster, and those among them with as many GPUs."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return nodes, [node for node in nodes if node["Resources"].get("GPU", 0) >= gpus]


def _absent(paths):
    import os

    return [path for path in paths if not os.path.exists(path)]


def _data_files(config: DictConfig) -> list[str]:
    files = [config.data.train_files, config.data.val_files]
    return [path for entry in files for path in ([entry] if isinstance(entry, str) else list(entry or []))]


def _on_cpu() -> bool:
    return os.environ.get("VERL_PLATFORM", "").strip().lower() == "cpu"


def main(arguments: list[str]) -> int:
    prepares_data = "--prepares-data" in arguments
    overrides = [argument for argument in arguments if argument != "--prepares-data"]
    try:
        lacks = examine(overrides, prepares_data)
    except HydraException as error:  # a typo in a key or a METHOD: its message, without Hydra's inner calls
        print(f"this job does not compose: {error}", file=sys.stderr)
        return 1
    for lack in lacks:
        print(f"missing: {lack.what}\n  -> {lack.mend}", file=sys.stderr)
    return 1 if lacks else 0
