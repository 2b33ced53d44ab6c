"""verl's features that change what an estimator sees, in real jobs on the CPU; docs/compatibility.md has them all."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.nightly]

HERE = Path(__file__).parent
ACTOR, ROLLOUT = "actor_rollout_ref.actor", "actor_rollout_ref.rollout"
WEIGHT = "algorithm.krpo_adaptive.weight"
JOB = [
    "+algorithm=krpo_adaptive",
    f"{WEIGHT}=score",
    "data.train_batch_size=8",
    "data.max_prompt_length=32",
    "data.max_response_length=16",
    f"{ACTOR}.ppo_mini_batch_size=8",
    f"{ROLLOUT}.n=4",
    "trainer.logger=[console,file]",
    "trainer.total_training_steps=3",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
]
COIN = f"reward.custom_reward_function.path={HERE}/unruly.py"


def check(job, steps=3, **same):
    """A job that trained: finite losses, a gradient where there are advantages, and these krpo/* in every step."""
    assert len(job.steps()) == steps
    for metrics in job.steps():
        assert math.isfinite(metrics["actor/pg_loss"])
        assert (metrics["actor/grad_norm"] > 0) == (metrics["krpo/advantage_std"] > 0)
        assert {name: metrics[f"krpo/{name}"] for name in same} == same
        assert metrics["krpo/score_weight_cv"] > 0
        if metrics["krpo/advantage_std"] > 0:
            assert 0 < metrics["krpo/gradient_var_over_none"] < 10
    return job.steps()


def test_pairs_that_were_filtered(verl_job):
    """One 1 and one 0 in every group that is left: nothing to tell prompts apart by, R = 1/2, and RLOO's baseline."""
    job = verl_job(
        *JOB,
        COIN,
        f"{ROLLOUT}.n=2",
        f"{WEIGHT}=none",
        "algorithm.filter_groups.enable=True",
        "algorithm.filter_groups.metric=reward",
    )
    for metrics in check(job, groups=8, group_size_min=2, prior_mean=0.5, prior_var=0.0):
        assert metrics["critic/score/mean"] == 0.5
    assert any(metrics.get("training/filter_groups/evicted_samples", 0) > 0 for metrics in job.steps())


def test_kl_in_the_reward(verl_job):
    """The penalty sits on every token; the estimator takes the sum of a row, and so its noise grows with length."""
    job = verl_job(
        *JOB, COIN, "algorithm.use_kl_in_reward=True", "algorithm.kl_ctrl.kl_coef=1", f"{ACTOR}.optim.lr=1e-3"
    )
    first, *later = check(job, groups=8)
    assert first["critic/rewards/mean"] == pytest.approx(first["critic/score/mean"], abs=1e-5)  # no KL before an update
    for metrics in later:
        assert metrics["critic/rewards/mean"] < metrics["critic/score/mean"] - 1e-3
        # What is filtered is the reward with its penalty.
        assert metrics["krpo/reward_mean"] == pytest.approx(metrics["critic/rewards/mean"], abs=1e-5)


def test_overlong_penalty_and_lora(verl_job):
    penalty = "reward.reward_kwargs.overlong_buffer_cfg"
    job = verl_job(
        *JOB,
        COIN,
        "reward.reward_manager.name=dapo",
        "+reward.reward_kwargs.max_resp_len=16",
        f"+{penalty}.enable=True",
        f"+{penalty}.len=15",
        f"+{penalty}.penalty_factor=1.0",
        f"+{penalty}.log=False",
        "actor_rollout_ref.model.lora_rank=8",
        "actor_rollout_ref.model.lora_alpha=16",
        "actor_rollout_ref.model.lora.merge=True",
    )
    for metrics in check(job, groups=8, group_size_min=4):
        assert metrics["critic/score/min"] < 0 and metrics["krpo/measurement_var"] > 0


def test_one_response_a_prompt(verl_job):
    """RLOO has nothing to compare with; here the other prompts are the prior."""
    job = verl_job(*JOB, COIN, f"{ROLLOUT}.n=1", f"{WEIGHT}=none")
    for metrics in check(job, groups=8, singletons=8):
        assert metrics["krpo/prior_mean"] == pytest.approx(metrics["critic/score/mean"])


@pytest.fixture
def agent_loop(tmp_path):
    """agent_loop(name) -> overrides for that class of unruly.py."""

    def overrides(name: str) -> list[str]:
        (tmp_path / "loops.yaml").write_text(f"- name: {name}\n  _target_: unruly.{name}\n")
        agent = f"{ROLLOUT}.agent"
        return [f"{agent}.agent_loop_config_path={tmp_path}/loops.yaml", f"{agent}.default_agent_loop={name}"]

    return overrides


def test_uneven_groups_of_sessions_that_fail_or_end_in_nothing(verl_job, agent_loop):
    """Of four sessions two count: one has failed, one ends in an output whose mask is empty."""
    job = verl_job(*JOB, COIN, *agent_loop("Unruly"), PYTHONPATH=f"{HERE}:{os.environ.get('PYTHONPATH', '')}")
    check(job, groups=8, group_size_min=2, singletons=0)


def test_an_output_without_a_token(start_job, agent_loop):
    job = start_job(*JOB, COIN, *agent_loop("EndsEmpty"), PYTHONPATH=f"{HERE}:{os.environ.get('PYTHONPATH', '')}")
    check(job.wait(600), groups=8, group_size_min=3)


def test_two_rays_in_one_process(job_inputs, tmp_path):
    """verl's main twice: in a Ray of its own, then in one that was started before."""
    script = """
import os
import ray
from verl.trainer import main_ppo

for attempt in ("first", "second"):
    os.environ["VERL_FILE_LOGGER_PATH"] = os.path.abspath(attempt + ".jsonl")
    if attempt == "second":
        ray.init(address="local", num_cpus=16, num_gpus=1, include_dashboard=False)
    main_ppo.main()
    ray.shutdown()
"""
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    once = ["trainer.total_training_steps=1", f"trainer.default_local_dir={tmp_path}/checkpoints"]
    done = subprocess.run(
        [sys.executable, "-c", script, *job_inputs, *JOB, *once],
        env=environment | {"VERL_PLATFORM": "cpu", "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=800,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    for attempt in ("first", "second"):
        (line,) = (tmp_path / f"{attempt}.jsonl").read_text().splitlines()
        assert '"krpo/groups":8' in line.replace(" ", "")
