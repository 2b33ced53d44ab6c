"""verl on a machine without a GPU: `VERL_PLATFORM=cpu`.

Three things make verl's trainers run there, V1 and the legacy one: a platform that answers verl's questions about the
device (`CpuPlatform`), three repairs of calls that take a GPU for granted (hooks.py), and the settings a CPU run
needs (`prepare`, on the driver, before Ray starts). Ray has no word for a CPU rank, so a rank holds a *logical* GPU:
`n_gpus_per_node` counts ranks.
"""

import contextlib
import os
import resource
import types

import ray
import torch
import wrapt
from omegaconf import DictConfig, OmegaConf, open_dict
from verl.plugin.platform import PlatformBase, PlatformRegistry

from verl_krpo.backends import ram, vllm_cpu

FLOAT32 = {"param_dtype": "fp32", "reduce_dtype": "fp32", "buffer_dtype": "fp32"}


def _nothing(*args, **kwargs) -> None:
    """The answer to every order that has no meaning on a CPU."""


def _peak_memory(*args) -> int:
    """Peak resident memory of this process in bytes: what verl logs as perf/max_memory_*."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# What verl calls on `torch.cuda`. is_available is False: it guards calls that free or measure GPU memory.
_device_module = types.ModuleType("verl_krpo.backends.cpu_platform.device")
_device_module.__dict__.update(
    is_available=lambda: False,
    device_count=lambda: 1,
    current_device=lambda: "cpu",
    get_device_name=lambda *args: "CPU",
    set_device=_nothing,
    synchronize=_nothing,
    empty_cache=_nothing,
    max_memory_allocated=_peak_memory,
    max_memory_reserved=_peak_memory,
    memory_allocated=_peak_memory,
    memory_reserved=_peak_memory,
    mem_get_info=lambda *args: (0, 0),
    get_rng_state=torch.get_rng_state,
    set_rng_state=torch.set_rng_state,
    manual_seed=torch.manual_seed,
    manual_seed_all=torch.manual_seed,
)


class CpuPlatform(PlatformBase):
    """verl's questions about the device, answered for a CPU."""

    device_name = "cpu"
    vendor_name = "cpu"
    device_module = _device_module

    def is_available(self) -> bool:
        return True

    def is_platform_available(self, use_smi_check=False) -> bool:
        return False  # asked only where VERL_PLATFORM is unset: a CPU is never guessed

    def current_device(self) -> str:
        return "cpu"  # verl moves tensors to it: an index would mean a GPU

    def device_count(self) -> int:
        return 1

    def manual_seed(self, seed: int) -> None:
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_device_capability(self, device_index: int = 0) -> tuple[None, None]:
        return None, None

    def communication_backend_name(self) -> str:
        return "gloo"

    def visible_devices_envvar(self) -> str:
        return "CUDA_VISIBLE_DEVICES"

    def ray_resource_name(self) -> str:
        return "GPU"  # verl's resource check counts GPU and NPU only

    def ray_noset_envvars(self) -> list[str]:
        return []

    def is_ipc_supported(self) -> bool:
        return False

    @contextlib.contextmanager
    def nvtx_range(self, msg: str):
        yield

    set_device = synchronize = set_allocator_settings = empty_cache = _nothing
    profiler_start = profiler_stop = cudart = _nothing


def install() -> None:
    """Register the platform. Called in every process that imports verl."""
    PlatformRegistry.register("cpu")(CpuPlatform)
    wrapt.register_post_import_hook(_register_engines, "verl.workers.engine.fsdp.transformer_impl")


def _register_engines(fsdp: types.ModuleType) -> None:
    """verl's FSDP engines ask the platform for their device, but are registered for cuda and npu only."""
    for model_type, engine in (
        ("language_model", fsdp.FSDPEngineWithLMHead),
        ("value_model", fsdp.FSDPEngineWithValueHead),
    ):
        fsdp.EngineRegistry.register(model_type, backend=["fsdp", "fsdp2"], device="cpu")(engine)


class _Settings:
    """Edits a verl config in place and remembers what it changed."""

    def __init__(self, config: DictConfig):
        self.config = config
        self.changed: dict[str, object] = {}

    def default(self, key: str, gpu: object, cpu: object) -> None:
        """Set `key` to `cpu` where it still has verl's default for GPUs; None stands for a key that is not there."""
        section, _, name = key.rpartition(".")
        parent = OmegaConf.select(self.config, section)
        if parent is None or (None if OmegaConf.is_missing(parent, name) else parent.get(name)) != gpu:
            return
        with open_dict(self.config):
            OmegaConf.update(self.config, key, cpu, force_add=True)
        self.changed[key] = cpu

    def require(self, key: str, *values: object) -> None:
        """ValueError where `key` is there with none of these values."""
        given = OmegaConf.select(self.config, key)
        if given not in (None, *values):
            ways = " or ".join(f"{key}={value}" for value in values)
            raise ValueError(f"{key}={given} does not run with VERL_PLATFORM=cpu: set {ways}")


def prepare(config: DictConfig) -> None:
    """Turn a composed verl config into one that runs on CPUs, in place, and say what changed.

    A key that still has verl's GPU default gets the value a CPU needs; other values of the user's stay. Where a
    value cannot run on a CPU, ValueError with the key and the value to set.
    """
    settings = _Settings(config)
    default, require = settings.default, settings.require
    rollout = "actor_rollout_ref.rollout"
    default("trainer.device", "cuda", "cpu")
    default("trainer.n_gpus_per_node", 8, 1)
    default(f"{rollout}.name", None, "hf")
    default(f"{rollout}.tensor_model_parallel_size", 2, 1)
    default(f"{rollout}.dtype", "bfloat16", "float32")
    default(f"{rollout}.free_cache_engine", True, False)
    default(f"{rollout}.agent.num_workers", 8, 2)  # they are half of a small model's step: a core each
    default("reward.num_workers", 8, 1)
    default("data.dataloader_num_workers", 8, 0)
    default("transfer_queue.backend.SimpleStorage.num_data_storage_units", 8, 1)
    models = [("actor_rollout_ref.actor", "actor_rollout_ref.actor.fsdp_config", "actor_rollout_ref.model")]
    models += [("actor_rollout_ref.ref", "actor_rollout_ref.ref.fsdp_config", "actor_rollout_ref.model")]
    models += [("critic", "critic.fsdp", "critic.model")]
    for role, engine, model in models:
        default(f"{role}.strategy", "fsdp", "fsdp2")
        default(f"{role}.use_torch_compile", True, False)
        default(f"{engine}.use_torch_compile", True, False)
        default(f"{engine}.dtype", "bfloat16", "float32")
        default(f"{engine}.mixed_precision", None, FLOAT32)  # bf16 autocast is slow here and rounds log-probs
        default(f"{model}.use_remove_padding", True, False)
        default(f"{model}.override_config.attn_implementation", None, "sdpa")
        require(f"{role}.strategy", "fsdp2")
        require(f"{model}.use_remove_padding", False)
    require("trainer.device", "cpu")
    require(f"{rollout}.name", "hf", "vllm")
    if config.actor_rollout_ref.rollout.name == "vllm":
        vllm_cpu.require_installed()
        for key, gpu, cpu in vllm_cpu.DEFAULTS:
            default(f"{rollout}.{key}", gpu, cpu)
    if config.trainer.use_v1 and config.trainer.v1.trainer_mode == "separate_async":
        # Servers with ranks of their own, which get their weights over gloo.
        default(f"{rollout}.nnodes", 0, 1)
        default(f"{rollout}.checkpoint_engine.backend", "naive", "gloo")
        default(f"{rollout}.checkpoint_engine.custom_backend_module", None, "verl_krpo.backends.gloo_checkpoint")
    _micro_batches(config, default)
    if config.trainer.use_v1:
        _watched_sampler(config, default)
    _ray_resources(config, default)
    if settings.changed:
        print("VERL_PLATFORM=cpu sets", " ".join(f"{key}={value}" for key, value in settings.changed.items()))
        print(ram.needed(config) or "memory: unknown, the model's config has not been read")


def _micro_batches(config: DictConfig, default) -> None:
    """Where the user chose no size: micro-batches of as many tokens as ram.MICRO_BATCH_BYTES holds."""
    actor = config.actor_rollout_ref.actor
    if actor.use_dynamic_bsz:
        return
    if actor.ppo_micro_batch_size is None and actor.ppo_micro_batch_size_per_gpu is None:
        longest = config.data.max_prompt_length + config.data.max_response_length
        model = ram.model_config(config.actor_rollout_ref.model.path)
        tokens = ram.MICRO_BATCH_BYTES // ram.token_bytes(model) if model else longest
        default("actor_rollout_ref.actor.use_dynamic_bsz", False, True)  # ref and rollout follow
        default("actor_rollout_ref.actor.ppo_max_token_len_per_gpu", 16384, max(tokens, longest))
        return
    for role in ("rollout", "ref"):
        if config.actor_rollout_ref[role].log_prob_micro_batch_size is None:
            size = actor.ppo_micro_batch_size_per_gpu or 1
            default(f"actor_rollout_ref.{role}.log_prob_micro_batch_size_per_gpu", None, size)


def _watched_sampler(config: DictConfig, default) -> None:
    """verl's own buffer stays where it filters or refills groups: it passes those settings to no other class."""
    filters = config.algorithm.get("filter_groups")
    if (filters and filters.enable) or config.trainer.v1.sampler.get("sync_refill_failed_groups"):
        return
    if config.trainer.v1.sampler.custom_sampler.path is None:
        name = "WatchedReplayBuffer" if config.trainer.v1.trainer_mode == "sync" else "WatchedReplayBufferAsync"
        default("trainer.v1.sampler.custom_sampler.path", None, "pkg://verl_krpo.backends.replay_buffer")
        default("trainer.v1.sampler.custom_sampler.name", None, name)


def logical_resources(config: DictConfig) -> tuple[int, int]:
    """Logical (CPUs, GPUs) verl asks of Ray for this config. Ray waits for ever for what it does not have.

    A trainer rank reserves 3 CPUs and a standalone rollout rank 2 (verl's max_colocate_count), TransferQueue 1 for
    each storage unit and 1 for its controller; every other actor needs 1 free CPU to be placed, and none to run.
    """
    trainer, rollout = config.trainer, config.actor_rollout_ref.rollout
    ranks = trainer.n_gpus_per_node * trainer.nnodes
    servers = rollout.n_gpus_per_node * rollout.nnodes if trainer.v1.trainer_mode == "separate_async" else 0
    storage = config.transfer_queue.backend.SimpleStorage.num_data_storage_units
    return 3 * ranks + 2 * servers + storage + 2, ranks + servers


def _ray_resources(config: DictConfig, default) -> None:
    """Give Ray the logical CPUs and GPUs the job asks for, or refuse what is too few."""
    cpus, gpus = logical_resources(config)
    init = config.ray_kwargs.ray_init
    # TransferQueue sets torch's number of threads at every call: to more than the cores, unless told.
    wanted = {"OMP_NUM_THREADS": "1", "TQ_NUM_THREADS": "1"}
    if config.actor_rollout_ref.rollout.name == "vllm":
        wanted |= vllm_cpu.ENVIRONMENT
    environment = {key: os.environ.get(key, value) for key, value in wanted.items()}
    environment |= {"VERL_PLATFORM": "cpu"} | dict(OmegaConf.select(init, "runtime_env.env_vars") or {})
    with open_dict(config):
        OmegaConf.update(init, "runtime_env.env_vars", environment, force_add=True)
    address = init.get("address") or os.environ.get("RAY_ADDRESS") or "local"
    if address != "local" or ray.is_initialized():
        return _check_cluster(address, cpus, gpus)
    default("ray_kwargs.ray_init.address", None, "local")  # else Ray joins any job that runs on this machine
    for key, needed in (("num_cpus", cpus), ("num_gpus", gpus)):
        given = init.get(key)
        if given is not None and given < needed:
            raise ValueError(
                f"ray_kwargs.ray_init.{key}={given} is too few: this job asks Ray for {needed} and would wait for "
                f"ever. They are logical, more than the machine has is fine: set ray_kwargs.ray_init.{key}={needed}"
            )
    default("ray_kwargs.ray_init.num_cpus", None, max(cpus, os.cpu_count() or 1))
    default("ray_kwargs.ray_init.num_gpus", None, gpus)
    default("ray_kwargs.ray_init.include_dashboard", None, False)


def _check_cluster(address: str, cpus: int, gpus: int) -> None:
    """RuntimeError if the Ray that is to be joined could never place this job."""
    joined = not ray.is_initialized()
    if joined:
        ray.init(address=address, log_to_driver=False)
    has = ray.cluster_resources()
    if joined:
        ray.shutdown()
    if has.get("CPU", 0) < cpus or has.get("GPU", 0) < gpus:
        raise RuntimeError(
            f"the Ray cluster ({address}) has {has.get('CPU', 0):g} logical CPUs and {has.get('GPU', 0):g} GPUs, this "
            f"job asks for {cpus} and {gpus} and would wait for ever: start it with `ray start --head "
            f"--num-cpus={cpus} --num-gpus={gpus}`, or unset RAY_ADDRESS for a Ray of the job's own"
        )
