"""Several outputs of one session: verl's own function, on verl's own batches."""

import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_krpo.plugin import sessions

CONFIG = OmegaConf.create({"adv_estimator": "krpo", "krpo": {"order": "arrival"}})


@pytest.fixture(scope="module")
def trainer():
    """The V1 trainer's module; its function is put back afterwards."""
    from verl.trainer.ppo.v1 import trainer_base

    compute = getattr(trainer_base, sessions.FUNCTION)
    setattr(trainer_base, sessions.FUNCTION, getattr(compute, "__wrapped__", compute))
    yield trainer_base
    setattr(trainer_base, sessions.FUNCTION, compute)


def batch_of(keys, rewards):
    from verl import DataProto

    rows = len(keys)
    mask = torch.ones(rows, 3, dtype=torch.int64)
    mask[:, 2] = torch.arange(rows) % 2
    mask[0, 0] = 0
    token_level_rewards = torch.zeros(rows, 3)
    token_level_rewards[:, 1] = torch.as_tensor(rewards)
    return DataProto.from_dict(
        tensors={"token_level_rewards": token_level_rewards, "response_mask": mask},
        non_tensors={"uid": np.array([key.rsplit("_", 2)[0] for key in keys], dtype=object)},
    )


# prompt a: session 0 with three outputs, out of order, and session 1; prompt b_1: two sessions, one with two outputs
KEYS = ["a_0_1", "b_1_0_0", "a_0_2", "a_1_0", "a_0_0", "b_1_1_1", "b_1_1_0"]
REWARDS = [1.0, 0.0, 1.0, 0.5, 1.0, 0.25, 0.25]
FINAL, SESSION = [2, 1, 3, 5], [0, 1, 0, 2, 0, 3, 3]


def test_final_outputs_of_the_sessions():
    assert sessions.final_outputs(KEYS) == (FINAL, SESSION)
    for key in ("a_0", "abc", "a_0_x"):
        with pytest.raises(ValueError, match="row 1 has"):
            sessions.final_outputs(["a_0_0", key])


def test_a_session_counts_once(trainer, oracle):
    compute = sessions.count_sessions_once(getattr(trainer, sessions.FUNCTION))
    data = batch_of(KEYS, REWARDS)
    found = compute(data, batch_keys=KEYS, adv_estimator="krpo", config=CONFIG).batch
    uids = data.non_tensor_batch["uid"]
    exact = oracle.published([REWARDS[row] for row in FINAL], uids[FINAL])[SESSION]
    np.testing.assert_allclose(found["advantages"], exact[:, None] * found["response_mask"].numpy(), rtol=1e-6)
    assert torch.equal(found["advantages"], found["returns"])


def test_with_one_output_a_session_nothing_changes(trainer):
    keys, rewards = ["a_0_0", "b_0_0", "a_1_0", "pad1_0_0"], [1.0, 0.0, 0.5, 0.0]
    compute = getattr(trainer, sessions.FUNCTION)
    one, two = (
        f(batch_of(keys, rewards), batch_keys=keys, adv_estimator="krpo", config=CONFIG).batch["advantages"]
        for f in (compute, sessions.count_sessions_once(compute))
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_other_estimators_go_verls_own_way(trainer, estimator):
    compute = getattr(trainer, sessions.FUNCTION)
    one, two = (
        f(batch_of(KEYS, REWARDS), batch_keys=KEYS, adv_estimator=estimator, config=CONFIG).batch["advantages"]
        for f in (compute, sessions.count_sessions_once(compute))
    )
    assert torch.equal(one, two)


def test_it_is_in_place_once_the_trainer_opens_its_log(trainer, oracle):
    import verl  # noqa: F401 (loads the plugin)
    from verl.utils.tracking import Tracking

    original = getattr(trainer, sessions.FUNCTION)
    Tracking("project", "run", [], config={"algorithm": {"adv_estimator": "grpo"}})
    assert getattr(trainer, sessions.FUNCTION) is original
    for _ in range(2):
        Tracking(project_name="p", experiment_name="e", default_backend=[], config={"algorithm": dict(CONFIG)})
        assert getattr(trainer, sessions.FUNCTION).__wrapped__ is original
    setattr(trainer, sessions.FUNCTION, original)


def test_another_verl_is_refused_loudly(trainer, monkeypatch):
    import verl  # noqa: F401 (loads the plugin)
    from verl.utils.tracking import Tracking

    def opened():
        Tracking("project", "run", [], config={"algorithm": {"adv_estimator": "krpo"}})

    monkeypatch.setattr(trainer, sessions.FUNCTION, lambda data, keys, adv_estimator: data)
    with pytest.raises(RuntimeError, match=r"parameters differ in .*'batch_keys'.*verl 0.9.1"):
        opened()
    monkeypatch.delattr(trainer, sessions.FUNCTION)
    with pytest.raises(RuntimeError, match="does not call compute_advantage_for_multi_trajectories"):
        opened()


def test_a_trainer_that_went_elsewhere_is_noticed(trainer, monkeypatch):
    import verl  # noqa: F401 (loads the plugin)
    from verl.utils.tracking import Tracking

    def opened(*config):
        Tracking("project", "run", [], *config)

    krpo, grpo = ({"algorithm": {"adv_estimator": name}} for name in ("krpo", "grpo"))
    monkeypatch.setattr(trainer.PPOTrainer, "_compute_advantage", lambda self, batch, metrics: batch)
    with pytest.raises(RuntimeError, match="does not call compute_advantage_for_multi_trajectories"):
        opened(krpo)
    monkeypatch.delitem(sys.modules, sessions.TRAINER)
    with pytest.raises(RuntimeError, match="does not call compute_advantage_for_multi_trajectories"):
        opened(krpo)
    opened(grpo)
    opened()
    monkeypatch.delitem(sys.modules, sessions.PACKAGE)  # an older verl, or its v0 trainer
    opened(krpo)


def test_positional_calls_are_understood(trainer):
    compute = sessions.count_sessions_once(getattr(trainer, sessions.FUNCTION))
    found = compute(batch_of(KEYS, REWARDS), KEYS, "krpo", config=CONFIG)
    again = compute(batch_of(KEYS, REWARDS), batch_keys=KEYS, adv_estimator="krpo", config=CONFIG)
    assert torch.equal(found.batch["advantages"], again.batch["advantages"])
