"""Has this machine what a job needs: GPUs, a rollout engine, an attention, room for checkpoints?"""

import importlib.util
import math
import shutil
import subprocess
import sys
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from verl_krpo.backends import on_cpu
from verl_krpo.doctor.finding import Finding, missing
from verl_krpo.doctor.model import folder_of

IMPORT_SECONDS = 300
CHECKPOINT_BYTES = 12  # a parameter in a checkpoint of verl's: float32 weights and Adam's two moments
HOW_TO_INSTALL = "pip install -e '.[gpu]' in the checkout of verl-krpo"
MODEL = "actor_rollout_ref.model"


def gpus(config: DictConfig) -> list[Finding]:
    """GPUs of this node against trainer.n_gpus_per_node; a CPU job has none to look for."""
    import torch

    if on_cpu() or config.trainer.nnodes > 1:  # several nodes: Ray knows them, and the driver's may have no GPU
        return []
    here, wanted = torch.cuda.device_count(), config.trainer.n_gpus_per_node
    if not here:
        fix = (
            "bash recipes/run_krpo_cpu.sh   (the same method on a tiny model; DRY_RUN=1 checks this job without a GPU)"
        )
        return [missing("no GPU found on this machine", fix)]
    if here < wanted:
        return [missing(f"{wanted} GPUs asked for, {here} found", f"NGPUS_PER_NODE={here}")]
    return []


def engine(config: DictConfig) -> list[Finding]:
    """The rollout engine can be imported: tried in a process of its own, as a vLLM can be broken in many ways."""
    if OmegaConf.select(config, "actor_rollout_ref.rollout.name") != "vllm":
        return []
    done = subprocess.run([sys.executable, "-c", "import vllm"], capture_output=True, text=True, timeout=IMPORT_SECONDS)
    if done.returncode == 0:
        return []
    reason = done.stderr.strip().splitlines()[-1:] or ["no message"]
    fix = f"{HOW_TO_INSTALL}, or PYTHON=/path/to/python of your verl environment"
    return [missing(f"{sys.executable} cannot import vllm ({reason[0]})", fix)]


def attention(config: DictConfig) -> list[Finding]:
    """flash-attn, which verl asks transformers for unless another attention is configured; pip does not bring it."""
    model, key = config.actor_rollout_ref.model, f"{MODEL}.override_config.attn_implementation"
    chosen = (model.get("override_config") or {}).get("attn_implementation") or "flash_attention_2"
    if on_cpu() or chosen != "flash_attention_2" or importlib.util.find_spec("flash_attn"):
        return []
    text = f"flash-attn is not installed in {sys.executable}, and {key} is flash_attention_2"
    fix = "pip install flash-attn --no-build-isolation, which builds it against your torch; or without it: "
    return [missing(text, f"{fix}+{key}=sdpa {MODEL}.use_remove_padding=false")]


def mini_batch(config: DictConfig) -> list[Finding]:
    """An update's responses can be shared among the ranks evenly: verl asserts it, but in the first step."""
    actor, n = config.actor_rollout_ref.actor, config.actor_rollout_ref.rollout.n
    ranks = config.trainer.nnodes * config.trainer.n_gpus_per_node // actor.get("ulysses_sequence_parallel_size", 1)
    size = actor.ppo_mini_batch_size
    if config.trainer.val_only or size * n % ranks == 0:
        return []
    step = ranks // math.gcd(ranks, n)
    fits = math.ceil(size / step) * step
    text = f"an update has {size} prompts x {n} = {size * n} responses, which {ranks} ranks cannot share evenly"
    return [missing(text, f"actor_rollout_ref.actor.ppo_mini_batch_size={fits}, or another number of GPUs")]


def disk(config: DictConfig) -> list[Finding]:
    """Room for the checkpoints that will exist at once (two where all are kept), if the model's size is known here."""
    folder = folder_of(config.actor_rollout_ref.model.path)
    if config.trainer.save_freq <= 0 or folder is None:
        return []
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors")) // 2  # in bfloat16
    # verl makes room before it saves, but keeps an only checkpoint until the next is complete. null keeps all of them.
    kept = max(2, config.trainer.max_actor_ckpt_to_keep or 2)
    needed = kept * CHECKPOINT_BYTES * weights
    where = Path(config.trainer.default_local_dir).absolute()
    while not where.exists():
        where = where.parent
    free = shutil.disk_usage(where).free
    if free >= needed:
        return []
    text = f"{where} has {free / 2**30:.0f} GiB free, {kept} checkpoints take about {needed / 2**30:.0f} GiB"
    return [missing(text, "RUN_DIR=FOLDER on a larger disk, or trainer.save_freq=-1 for none")]
