"""Score weights where verl calls the estimator: its own compute_advantage, its own batches."""

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf

from verl_krpo import KrpoConfig, krpo, krpo_adaptive, score_weights
from verl_krpo.advantage.weights import length_weights
from verl_krpo.plugin import metrics, scores

UIDS = np.repeat(["a", "b", "c", "d"], 3).astype(object)
REWARDS = torch.tensor([1.0, 0, 1, 1, 1, 1, 0, 0, 1, 0.5, 1, 0])


@pytest.fixture(autouse=True)
def token_mean(monkeypatch):
    import verl  # noqa: F401 (loads the plugin)

    monkeypatch.setattr(scores, "_loss_agg_mode", "token-mean")


def batch_of(**tensors):
    from verl import DataProto

    rewards = torch.zeros(12, 5)
    rewards[:, -1] = REWARDS
    mask = (torch.rand(12, 5, generator=torch.Generator().manual_seed(1)) < 0.8).long()
    mask[:, 0] = 1
    return DataProto.from_dict({"token_level_rewards": rewards, "response_mask": mask, **tensors}, {"uid": UIDS})


def log_probs():
    return -2 * torch.rand(12, 5, generator=torch.Generator().manual_seed(0))


def advantages(data, estimator, **config):
    from verl.trainer.ppo.ray_trainer import compute_advantage

    return compute_advantage(data, estimator, config=OmegaConf.create({estimator: config})).batch["advantages"]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"])
@pytest.mark.parametrize("word", ["score", "length"])
def test_the_estimator_finds_the_log_probs_of_its_batch(monkeypatch, word, mode):
    monkeypatch.setattr(scores, "_loss_agg_mode", mode)
    data = batch_of(old_log_probs=log_probs())
    mask = data.batch["response_mask"]
    weights = score_weights(log_probs(), mask, mode) if word == "score" else length_weights(mask, mode)
    found = advantages(data, "krpo_adaptive", weight=word)
    exact = krpo_adaptive(REWARDS, UIDS, weights=weights).advantages().float()
    torch.testing.assert_close(found, exact[:, None] * mask)
    assert not torch.equal(found, advantages(data, "krpo_adaptive"))
    found = advantages(data, "krpo", weight=word, baseline="leave_one_out")
    exact = krpo(REWARDS, UIDS, KrpoConfig(baseline="leave_one_out"), weights).advantages().float()
    torch.testing.assert_close(found, exact[:, None] * mask)


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(
        RuntimeError, match="algorithm.krpo_adaptive.weight=score needs old_log_probs beside the rewards"
    ):
        advantages(batch_of(), "krpo_adaptive", weight="score")
    assert advantages(batch_of(), "krpo_adaptive", weight="length").any()
    monkeypatch.setattr(scores, "_loss_agg_mode", None)
    with pytest.raises(RuntimeError, match="algorithm.krpo.weight=length needs its loss_agg_mode"):
        advantages(batch_of(old_log_probs=log_probs()), "krpo", weight="length")
    assert scores._batch is None  # nothing is left behind by an error


def test_the_log_says_what_the_baseline_saves():
    data = batch_of(old_log_probs=log_probs())
    w, r = score_weights(log_probs(), data.batch["response_mask"]), REWARDS.double()
    rloo = (r.view(4, 3).sum(1).repeat_interleave(3) - r) / 2
    for word in ("none", "score"):
        advantages(data, "krpo_adaptive", weight=word)
        logged = metrics.drain()
        found = krpo_adaptive(r, UIDS, weights=None if word == "none" else w)
        mine = (w * (r - found.groups.scatter(found.baseline)).square()).sum()
        expected = {
            "krpo/gradient_var_over_rloo": mine / (w * (r - rloo).square()).sum(),
            "krpo/gradient_var_over_none": mine / (w * r.square()).sum(),
            "krpo/score_weight_cv": w.std(correction=0) / w.mean(),
            "krpo/reward_mean": r.mean(),
        }
        assert {key: logged[key] for key in expected} == pytest.approx({k: v.item() for k, v in expected.items()})
    advantages(data, "jspo")
    logged = metrics.drain()
    assert logged["krpo/gradient_var_over_rloo"] > 0 and "krpo/nis" not in logged
    advantages(data, "krpo")  # its baseline knows its own reward
    assert {"krpo/gradient_var_over_rloo", "krpo/score_weight_cv"} & set(metrics.drain()) == {"krpo/score_weight_cv"}
    advantages(batch_of(), "krpo_adaptive")
    assert "krpo/score_weight_cv" not in metrics.drain()
