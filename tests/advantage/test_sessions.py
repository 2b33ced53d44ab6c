"""Several outputs of one session: verl's own function, on verl's own batches."""

import sys

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

pytest.importorskip("verl")

from verl_krpo import krpo_adaptive, score_weights
from verl_krpo.advantage.weights import length_weights
from verl_krpo.plugin import hooks, scores, sessions
from verl_krpo.plugin.estimator import compute_advantage

CONFIG = OmegaConf.create({"adv_estimator": "krpo", "krpo": {"order": "arrival"}})


@pytest.fixture(scope="module")
def trainer():
    """The V1 trainer's module."""
    import verl  # noqa: F401 (loads the plugin)
    from verl.trainer.ppo.v1 import trainer_base

    return trainer_base


def batch_of(keys, rewards, **tensors):
    from verl import DataProto

    rows = len(keys)
    mask = torch.ones(rows, 3, dtype=torch.int64)
    mask[:, 2] = torch.arange(rows) % 2
    mask[0, 0] = 0
    token_level_rewards = torch.zeros(rows, 3)
    token_level_rewards[:, 1] = torch.as_tensor(rewards)
    return DataProto.from_dict(
        tensors={"token_level_rewards": token_level_rewards, "response_mask": mask, **tensors},
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
    compute = getattr(trainer, sessions.FUNCTION)
    data = batch_of(KEYS, REWARDS)
    found = compute(data, batch_keys=KEYS, adv_estimator="krpo", config=CONFIG).batch
    uids = data.non_tensor_batch["uid"]
    exact = oracle.published([REWARDS[row] for row in FINAL], uids[FINAL])[SESSION]
    np.testing.assert_allclose(found["advantages"], exact[:, None] * found["response_mask"].numpy(), rtol=1e-6)
    assert torch.equal(found["advantages"], found["returns"])


@pytest.mark.parametrize("word", ["score", "length"])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_a_session_weighs_as_much_as_all_of_its_outputs(trainer, monkeypatch, word, mode):
    monkeypatch.setattr(scores, "_loss_agg_mode", mode)
    log_probs = -torch.rand(len(KEYS), 3, generator=torch.Generator().manual_seed(0))
    data = batch_of(KEYS, REWARDS, old_log_probs=log_probs)
    mask = data.batch["response_mask"]
    of_rows = score_weights(log_probs, mask, mode) if word == "score" else length_weights(mask, mode)
    weights = torch.zeros(len(FINAL), dtype=torch.float64).index_add(0, torch.tensor(SESSION), of_rows)
    uids, rewards = data.non_tensor_batch["uid"][FINAL], torch.tensor(REWARDS)[FINAL]
    exact = krpo_adaptive(rewards, uids, weights=weights).advantages()[SESSION].float()
    config = OmegaConf.create({"krpo_adaptive": {"weight": word}})
    compute = getattr(trainer, sessions.FUNCTION)
    found = compute(data, batch_keys=KEYS, adv_estimator="krpo_adaptive", config=config).batch["advantages"]
    torch.testing.assert_close(found, exact[:, None] * mask)


def test_with_one_output_a_session_nothing_changes(trainer):
    keys, rewards = ["a_0_0", "b_0_0", "a_1_0", "pad1_0_0"], [1.0, 0.0, 0.5, 0.0]
    ours = getattr(trainer, sessions.FUNCTION)
    one, two = (
        f(batch_of(keys, rewards), batch_keys=keys, adv_estimator="krpo", config=CONFIG).batch["advantages"]
        for f in (ours, ours.__wrapped__)
    )
    assert torch.equal(one, two)


@pytest.mark.parametrize("estimator", ["grpo", "rloo"])
def test_other_estimators_go_verls_own_way(trainer, estimator):
    ours = getattr(trainer, sessions.FUNCTION)
    one, two = (
        f(batch_of(KEYS, REWARDS), batch_keys=KEYS, adv_estimator=estimator, config=CONFIG).batch["advantages"]
        for f in (ours, ours.__wrapped__)
    )
    assert torch.equal(one, two)


def test_a_function_that_changed_is_refused(trainer, monkeypatch):
    """A later verl's: other parameters."""
    (hook,) = [hook for hook in hooks.HOOKS if hook.name == sessions.FUNCTION]
    monkeypatch.setattr(trainer, sessions.FUNCTION, lambda data, keys, adv_estimator: data)
    hook.attach(trainer)
    with pytest.raises(RuntimeError, match=r"parameters differ in .*'batch_keys'.*verl 0.9.1"):
        getattr(trainer, sessions.FUNCTION)(None, KEYS, "krpo")
    assert getattr(trainer, sessions.FUNCTION)("data", KEYS, "grpo") == "data"


@pytest.fixture
def estimated(oracle):
    def estimate():
        return compute_advantage(**oracle.batch([1.0, 0.0], "aa"))

    return estimate


def test_a_trainer_that_went_elsewhere_is_noticed_by_the_estimator(trainer, monkeypatch, estimated):
    refused = "does not call compute_advantage_for_multi_trajectories"
    estimated()
    with monkeypatch.context() as patched:
        patched.setattr(trainer.PPOTrainer, "_compute_advantage", lambda self, batch, metrics: batch)
        with pytest.raises(RuntimeError, match=refused):
            estimated()
    with monkeypatch.context() as patched:  # not ours: verl's own
        patched.setattr(trainer, sessions.FUNCTION, getattr(trainer, sessions.FUNCTION).__wrapped__)
        with pytest.raises(RuntimeError, match=refused):
            estimated()
    with monkeypatch.context() as patched:
        patched.delattr(trainer, sessions.FUNCTION)
        with pytest.raises(RuntimeError, match=refused):
            estimated()
    monkeypatch.delitem(sys.modules, sessions.TRAINER)
    with pytest.raises(RuntimeError, match=refused):
        estimated()
    monkeypatch.delitem(sys.modules, sessions.PACKAGE)  # an older verl, or its v0 trainer
    estimated()


def test_positional_calls_are_understood(trainer):
    compute = getattr(trainer, sessions.FUNCTION)
    found = compute(batch_of(KEYS, REWARDS), KEYS, "krpo", config=CONFIG)
    again = compute(batch_of(KEYS, REWARDS), batch_keys=KEYS, adv_estimator="krpo", config=CONFIG)
    assert torch.equal(found.batch["advantages"], again.batch["advantages"])
