import os
import subprocess
import sys

import pytest
import torch
from omegaconf import OmegaConf

from verl_krpo.backends import cpu_platform

JOB = ["algorithm.adv_estimator=grpo", "data.train_batch_size=16", "actor_rollout_ref.actor.ppo_mini_batch_size=8"]


@pytest.fixture
def prepared(compose):
    """prepared(*overrides) -> the config verl would train with on a CPU."""

    def prepare(*overrides):
        config = compose(*JOB, *overrides)
        cpu_platform.prepare(config)
        return config

    return prepare


def run_python(code_or_module, *args, **environment):
    return subprocess.run(
        [sys.executable, *code_or_module, *args],
        env={**os.environ, "VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        timeout=600,
    )


def test_a_plain_command_line_gets_what_a_cpu_needs(prepared):
    config = prepared("actor_rollout_ref.rollout.n=4", "actor_rollout_ref.actor.use_kl_loss=True")
    rollout, actor, ref = (config.actor_rollout_ref[role] for role in ("rollout", "actor", "ref"))
    assert (config.trainer.device, config.trainer.n_gpus_per_node, rollout.name) == ("cpu", 1, "hf")
    assert (actor.strategy, ref.strategy, rollout.tensor_model_parallel_size) == ("fsdp2", "fsdp2", 1)
    for engine in (actor.fsdp_config, ref.fsdp_config):
        assert engine.dtype == "float32" and set(engine.mixed_precision.values()) == {"fp32"}
        assert not engine.use_torch_compile
    assert rollout.dtype == "float32" and config.actor_rollout_ref.model.use_remove_padding is False
    assert config.actor_rollout_ref.model.override_config.attn_implementation == "sdpa"
    assert actor.use_dynamic_bsz and rollout.log_prob_use_dynamic_bsz and ref.log_prob_use_dynamic_bsz
    assert config.ray_kwargs.ray_init.runtime_env.env_vars.VERL_PLATFORM == "cpu"


def test_what_the_user_chose_stays(prepared):
    chosen = {
        "actor_rollout_ref.rollout.agent.num_workers": 3,
        "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu": 4,
        "data.dataloader_num_workers": 3,
        "trainer.n_gpus_per_node": 2,
    }
    config = prepared(*[f"{key}={value}" for key, value in chosen.items()])
    assert {key: OmegaConf.select(config, key) for key in chosen} == chosen


def test_preparing_twice_changes_nothing(prepared, capsys):
    config = prepared()
    before = OmegaConf.to_yaml(config)
    capsys.readouterr()
    cpu_platform.prepare(config)
    assert OmegaConf.to_yaml(config) == before
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "override, message",
    [
        ("actor_rollout_ref.rollout.name=sglang", "rollout.name=sglang .*set .*name=hf or .*name=vllm"),
        ("actor_rollout_ref.actor.strategy=megatron", "actor.strategy=megatron .*set .*strategy=fsdp2"),
        ("trainer.device=npu", "trainer.device=npu .*set trainer.device=cpu"),
    ],
)
def test_what_cannot_run_on_a_cpu_is_refused(prepared, override, message):
    with pytest.raises(ValueError, match=message):
        prepared(override)


@pytest.mark.parametrize("ranks, cpus", [(1, 6), (2, 9)])
def test_ray_gets_the_logical_resources_of_the_job(prepared, ranks, cpus):
    init = prepared(f"trainer.n_gpus_per_node={ranks}").ray_kwargs.ray_init
    assert init.num_gpus == ranks
    assert init.num_cpus == max(cpus, os.cpu_count())


@pytest.mark.parametrize("given", ["ray_kwargs.ray_init.num_cpus=5", "+ray_kwargs.ray_init.num_gpus=0"])
def test_too_few_logical_resources_name_the_key_and_the_value(prepared, given):
    key, _, few = given.strip("+").partition("=")
    with pytest.raises(ValueError, match=rf"{key}={few} is too few.*set {key}="):
        prepared(given)


def test_a_running_ray_that_is_too_small_is_refused(prepared):
    import ray

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        with pytest.raises(RuntimeError, match="has 2 logical CPUs and 0 GPUs.*asks for 6 and 1.*--num-cpus=6"):
            prepared()
    finally:
        ray.shutdown()


def test_servers_of_their_own_get_weights_over_gloo(prepared):
    config = prepared("trainer.v1.trainer_mode=separate_async")
    assert config.actor_rollout_ref.rollout.nnodes == 1
    assert config.actor_rollout_ref.rollout.checkpoint_engine.backend == "gloo"
    assert cpu_platform.logical_resources(config) == (8, 2)


def test_the_legacy_trainer_has_no_buffer(prepared):
    config = prepared("trainer.use_v1=False")
    assert (config.trainer.use_v1, config.trainer.v1.sampler.custom_sampler.name) == (False, None)


def test_verls_own_buffer_stays_where_groups_are_filtered(prepared):
    assert prepared().trainer.v1.sampler.custom_sampler.name == "WatchedReplayBuffer"
    assert prepared("algorithm.filter_groups.enable=True").trainer.v1.sampler.custom_sampler.name is None
    asynchronous = prepared("trainer.v1.trainer_mode=colocate_async")
    assert asynchronous.trainer.v1.sampler.custom_sampler.name == "WatchedReplayBufferAsync"


def test_the_driver_fails_before_ray_starts():
    done = run_python(
        ["-m", "verl.trainer.main_ppo"], *JOB, "ray_kwargs.ray_init.num_cpus=2", "actor_rollout_ref.model.path=none"
    )
    assert done.returncode != 0
    assert "ray_kwargs.ray_init.num_cpus=2 is too few" in done.stderr
    assert "Started a local Ray instance" not in done.stderr


IN_A_PROCESS = """
import sys, torch, verl
from verl.plugin.platform import get_platform
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from verl.utils.distributed import initialize_global_process_group_ray
from verl.utils.fsdp_utils import fsdp2_sharded_load_from_cpu, fsdp2_sharded_save_to_cpu
import verl.workers.engine
from verl.workers.engine.base import EngineRegistry

assert get_platform().device_name == "cpu"
assert "verl_krpo.backends.hf_rollout" not in sys.modules
initialize_global_process_group_ray()
x = torch.ones(2)
torch.distributed.all_reduce(x)
assert x.tolist() == [1.0, 1.0]
assert CPUOffloadPolicy(pin_memory=True).pin_memory is False
for kind, engine in (("language_model", "FSDPEngineWithLMHead"), ("value_model", "FSDPEngineWithValueHead")):
    for backend in ("fsdp", "fsdp2"):
        assert EngineRegistry.get_engine_cls(kind, backend).__name__ == engine

model = torch.nn.Linear(3, 2)  # saved weights are a copy, not the live ones
fully_shard(model)
before = model.weight.full_tensor().clone()
state, spec = fsdp2_sharded_save_to_cpu(model)
with torch.no_grad():
    model.weight.add_(1.0)
fsdp2_sharded_load_from_cpu(model, state, spec)
assert torch.equal(model.weight.full_tensor(), before)
print("fine")
"""


def test_verl_initialises_itself_on_a_cpu():
    done = run_python(["-c", IN_A_PROCESS], MASTER_ADDR="localhost", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
    assert done.stdout.endswith("fine\n"), done.stderr[-3000:]


def test_the_platform_answers_like_a_device():
    platform = cpu_platform.CpuPlatform()
    assert torch.ones(1, device=platform.current_device()).device.type == "cpu"
    assert platform.device_module.max_memory_allocated() > 10**7
    platform.manual_seed_all(5)
    first = torch.rand(1)
    platform.device_module.manual_seed(5)
    assert torch.equal(first, torch.rand(1))
    platform.synchronize()
    with platform.nvtx_range("step"):
        platform.empty_cache()
