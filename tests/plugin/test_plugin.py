"""The plugin inside verl: registered in every process, checked on the driver, loud when it breaks."""

import functools
import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
from hydra.errors import ConfigCompositionException, MissingConfigException

from verl_krpo.advantage import ESTIMATORS, settings_of

KPO_GROUP = "+actor@actor_rollout_ref.actor.policy_loss=kpo"
BATCH = [
    "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
    "actor_rollout_ref.rollout.log_prob_micro_batch_size_per_gpu=4",
]


def validate(config):
    from verl.utils.config import validate_config

    validate_config(config, use_reference_policy=False, use_critic=False)


def run(*command, **env):
    return subprocess.run(command, env=os.environ | env, capture_output=True, text=True, timeout=600)


IMPORTED = """
import json, sys, verl
loaded = sorted(sys.modules)
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, POLICY_LOSS_REGISTRY
found = ADV_ESTIMATOR_REGISTRY.get("krpo"), POLICY_LOSS_REGISTRY.get("kpo")
print(json.dumps([loaded, [method and method.__module__ for method in found]]))
"""


@pytest.fixture(scope="module")
def imported():
    """imported(**env) -> the modules that `import verl` loads in a fresh process, and where krpo and kpo come from."""

    @functools.cache
    def answer(**env):
        done = run(sys.executable, "-c", IMPORTED, VERL_PLATFORM="", **env)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    return answer


def test_the_entry_point_names_the_plugin():
    (entry,) = importlib.metadata.entry_points(group="verl.plugins", name="verl_krpo")
    assert entry.value == "verl_krpo.plugin"


@pytest.mark.parametrize(
    "env",
    [{}, {"VERL_USE_EXTERNAL_PLUGINS": "none", "VERL_USE_EXTERNAL_MODULES": "verl_krpo.plugin"}],
    ids=["entry point", "external module"],
)
def test_importing_verl_registers_both(imported, env):
    assert imported(**env)[1] == ["verl_krpo.plugin.estimator", "verl_krpo.plugin.loss"]


def test_nothing_of_the_backends_is_loaded_unasked(imported):
    assert not {"verl_krpo.backends.cpu_platform", "verl_krpo.backends.hf_rollout"} & set(imported()[0])


def test_a_failing_plugin_is_seen_and_raised():
    broken = "import sys; sys.modules['verl_krpo.plugin.hooks'] = None; "
    raised = run(sys.executable, "-c", broken + "import verl; print('then', file=sys.stderr); import verl_krpo.plugin")
    seen, then = raised.stderr.split("then\n")
    assert "verl-krpo could not be loaded" in seen and "Traceback" in seen
    assert raised.returncode != 0 and "verl_krpo.plugin.hooks" in then
    broken = "import sys, verl; sys.modules['verl_krpo.kalman'] = None; import verl.trainer.ppo.core_algos"
    raised = run(sys.executable, "-c", broken)
    assert raised.returncode != 0 and "verl_krpo.kalman" in raised.stderr


def test_importing_verl_costs_a_few_modules_more(imported):
    """786 before: verl's registries alone import transformers' model code, a second in each of a job's processes."""
    assert imported(VERL_USE_EXTERNAL_PLUGINS="none")[1] == [None, None]
    assert 0 < len(imported()[0]) - len(imported(VERL_USE_EXTERNAL_PLUGINS="none")[0]) < 40


@pytest.mark.parametrize(
    "overrides",
    [
        ["algorithm.adv_estimator=krpo"],
        ["actor_rollout_ref.actor.policy_loss.loss_mode=kpo"],
        ["+algorithm=krpo", "algorithm.krpo.process_var=3e-5", "algorithm.krpo.measurement_var=0.1"],
        ["+algorithm=krpo_adaptive", "algorithm.krpo_adaptive.weight=score"],
        ["+algorithm=krpo_memory", "algorithm.krpo_memory.memory_var=1e-3", "algorithm.krpo_memory.scale=none"],
        ["algorithm.adv_estimator=jspo"],
        ["+algorithm=jspo"],
        ["algorithm.adv_estimator=krpo", "+algorithm.krpo.order=arrival"],
        [KPO_GROUP, "actor_rollout_ref.actor.policy_loss.kpo.process_var=2e-6"],
        ["+algorithm=krpo", KPO_GROUP, "actor_rollout_ref.actor.policy_loss.kpo.innovation_clip=3"],
    ],
)
def test_the_documented_command_lines_pass(compose, overrides):
    validate(compose(*BATCH, *overrides))


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["+algorithm=krpo", "algorithm.krpo.typo=1"], "algorithm.krpo.typo"),
        (["+algorithm=krpo", "algorithm.krpo.order=sorted"], "algorithm.krpo.order"),
        (["+algorithm=krpo", "algorithm.krpo.process_var=much"], "algorithm.krpo.process_var"),
        ([KPO_GROUP, "actor_rollout_ref.actor.policy_loss.kpo.typo=1"], "kpo.typo"),
        ([KPO_GROUP, "actor_rollout_ref.actor.policy_loss.kpo.clip=maybe"], "kpo.clip"),
    ],
)
def test_a_wrong_key_or_type_fails_when_the_config_is_composed(compose, overrides, named):
    with pytest.raises(ConfigCompositionException, match=named):
        compose(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.adv_estimator=krpo", "+algorithm.krpo.typo=1"], "algorithm.krpo.typo"),
        (["+algorithm=krpo", "algorithm.krpo.measurement_var=0"], "algorithm.krpo.measurement_var=0"),
        (["+algorithm=krpo", "algorithm.adv_estimator=grpo"], "adv_estimator=grpo"),
        (["+actor_rollout_ref.actor.policy_loss.kpo.process_var=1e-6"], "loss_mode=vanilla"),
        (
            [
                "actor_rollout_ref.actor.policy_loss.loss_mode=kpo",
                "+actor_rollout_ref.actor.policy_loss.kpo.clip=false",
            ],
            r"add \+actor@actor_rollout_ref.actor.policy_loss=kpo",
        ),
        ([KPO_GROUP, "actor_rollout_ref.actor.policy_loss.kpo.measurement_var=-1"], "kpo.measurement_var=-1"),
    ],
)
def test_what_composes_but_is_wrong_fails_in_verls_own_validation(compose, overrides, message):
    with pytest.raises(ValueError, match=message):
        validate(compose(*BATCH, *overrides))


LOSS_MODE = "actor_rollout_ref.actor.policy_loss.loss_mode"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.adv_estimator=krpo", "algorithm.krpo.process_var=0"], r"needs \+algorithm=krpo beside it"),
        (["algorithm.adv_estimator=krpo_adaptive", "algorithm.krpo.scale=none"], "its own are algorithm.krpo_adaptive"),
        (["+algorithm=krpo_adaptive", "algorithm.krpo.scale=none"], r"algorithm.krpo.scale=none is no key of"),
        (["+algorithm=krpo", "algorithm.krpo.memory=prompt"], r"since 0.3 .* \+algorithm=krpo_memory"),
        (["+algorithm=krpo", "algorithm.krpo.memory_var=1e-3"], r"since 0.3 .* \+algorithm=krpo_memory"),
        (["+algorithm=krpo", "algorithm.krpo.baseline=jspo"], "since 0.3 .* algorithm.adv_estimator=jspo"),
        (["+algorithm=krpo", "algorithm.krpo.init_var=batch"], "since 0.3 .* algorithm.adv_estimator=krpo_adaptive"),
        (["actor_rollout_ref.actor.policy_loss.kpo.clip=false"], r"needs \+actor@actor_rollout_ref.actor.policy_loss="),
        (["+algorithm=krpo", "algorithm.adv_estimator=krpo_adaptive"], r"write \+algorithm=krpo_adaptive in place"),
    ],
)
def test_hydra_says_what_to_write(compose, overrides, message):
    with pytest.raises(ConfigCompositionException, match=message):
        compose(*overrides)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algorithm.adv_estimator=kpo"], f"kpo is a policy loss; write {LOSS_MODE}=kpo"),
        ([f"{LOSS_MODE}=krpo"], "krpo is an advantage estimator; write algorithm.adv_estimator=krpo"),
        ([f"{LOSS_MODE}=krpo_adaptive"], "write algorithm.adv_estimator=krpo_adaptive"),
        (["algorithm.adv_estimator=krpo_adaptve"], "is not one of krpo, krpo_adaptive"),
    ],
)
def test_a_name_in_the_wrong_place_is_refused_before_ray(compose, overrides, message):
    with pytest.raises(ValueError, match=message):
        validate(compose(*BATCH, *overrides))


@pytest.mark.parametrize("name", ESTIMATORS)
def test_an_estimator_is_one_key_and_its_group_opens_its_own(compose, name):
    one_key = compose(*BATCH, f"algorithm.adv_estimator={name}")
    validate(one_key)
    grouped = compose(*BATCH, f"+algorithm={name}", f"algorithm.adv_estimator={name}")
    validate(grouped)
    alone = compose(*BATCH, f"+algorithm={name}")
    assert alone.algorithm.adv_estimator == name
    keys = ESTIMATORS[name].keys
    assert all(settings_of(name, job.algorithm) == keys() for job in (one_key, grouped, alone))
    if "weight" in keys.__dataclass_fields__:
        changed = compose(f"algorithm.adv_estimator={name}", f"+algorithm.{name}.weight=length").algorithm
        assert settings_of(name, changed) == replace(keys(), weight="length")


def test_without_the_plugin_the_groups_are_missing(compose):
    from hydra.core.config_store import ConfigStore

    algorithm = ConfigStore.instance().repo["algorithm"]
    krpo = algorithm.pop("krpo.yaml")
    try:
        with pytest.raises(MissingConfigException, match="algorithm/krpo"):
            compose("+algorithm=krpo")
    finally:
        algorithm["krpo.yaml"] = krpo


def test_a_typo_stops_the_job_before_ray_starts():
    done = run(
        sys.executable, "-m", "verl.trainer.main_ppo", *BATCH, "algorithm.adv_estimator=krpo", "+algorithm.krpo.typo=1"
    )
    assert done.returncode != 0
    assert "algorithm.krpo.typo" in done.stderr
    assert "ray init kwargs" not in done.stdout + done.stderr


def test_both_are_in_the_registry_of_a_ray_worker():
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR")
    try:

        @ray.remote
        def in_worker():
            import numpy as np
            import torch
            import verl  # noqa: F401
            from verl.trainer.ppo.core_algos import get_adv_estimator_fn, get_policy_loss_fn
            from verl.workers.config import FSDPActorConfig

            mask = torch.ones(2, 3)
            advantages, _ = get_adv_estimator_fn("krpo")(
                token_level_rewards=torch.tensor([[0.0, 0, 1], [0, 0, 0]]),
                response_mask=mask,
                config=None,
                index=np.array(["a", "b"], dtype=object),
            )
            actor = FSDPActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
            loss, metrics = get_policy_loss_fn("kpo")(
                old_log_prob=-mask, log_prob=-mask, advantages=advantages, response_mask=mask, config=actor
            )
            return advantages.tolist(), loss.item(), sorted(metrics)

        advantages, loss, metrics = ray.get(in_worker.remote(), timeout=600)
    finally:
        ray.shutdown()
    # A group of one: P = 1 + 1e-5, K = P / (P + 1e-2), A = (1 - K) / sqrt(R K) for reward 1, and 0 for reward 0.
    gain = 1.00001 / 1.01001
    expected = (1 - gain) / (0.01 * gain) ** 0.5
    assert advantages == [pytest.approx([expected] * 3, rel=1e-5), [0.0] * 3]
    assert loss == pytest.approx(-expected / 2, rel=1e-5)
    assert "actor/pg_clipfrac" in metrics
