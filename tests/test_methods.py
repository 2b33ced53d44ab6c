"""Every METHOD at verl's own call sites: rewards to advantages to a loss with a gradient that goes the right way.

Whole jobs: scripts/try_methods.sh.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

METHODS = sorted(path.stem for path in (Path(__file__).parents[1] / "recipes/config/method").glob("*.yaml"))
PATHS = ["trainer.default_local_dir=/tmp/run", "data.train_files=/tmp/a.parquet", "data.val_files=/tmp/b.parquet"]
ROWS, TOKENS, SIZE = 16, 6, 4


@pytest.mark.parametrize("method", METHODS)
def test_right_answers_become_likelier(compose, monkeypatch, method):
    from verl import DataProto
    from verl.trainer.ppo.core_algos import get_policy_loss_fn
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.utils.config import omega_conf_to_dataclass

    from verl_krpo.plugin import scores

    config = compose(f"method={method}", *PATHS, "actor_rollout_ref.actor.ppo_micro_batch_size_per_gpu=4",
                     name="arithmetic_cpu")  # fmt: skip
    estimator, settings = config.algorithm.adv_estimator, config.algorithm
    if method == "krpo_memory":  # a memory needs a trainer; in the first step the prior is krpo_adaptive's
        estimator, settings = "krpo_adaptive", {"adv_estimator": "krpo_adaptive"}
    monkeypatch.setattr(scores, "_loss_agg_mode", None)
    scores.begin(config)  # as a trainer that starts
    make = torch.Generator().manual_seed(0)
    right = torch.tensor([1.0, 0, 0, 1, 1, 1, 0, 1, 0, 0, 0, 1, 1, 0, 1, 0])  # no group is all of a kind
    rewards = torch.zeros(ROWS, TOKENS)
    rewards[:, -1] = right
    old = -0.5 - torch.rand(ROWS, TOKENS, generator=make)
    mask = torch.ones(ROWS, TOKENS, dtype=torch.long)
    tensors = {"token_level_rewards": rewards, "response_mask": mask, "old_log_probs": old}
    tensors["sum_pi_squared"] = torch.full_like(old, 0.4)
    data = DataProto.from_dict(tensors, {"uid": np.repeat([f"p{i}" for i in range(ROWS // SIZE)], SIZE).astype(object)})
    advantages = compute_advantage(data, estimator, num_repeat=SIZE, config=settings).batch["advantages"]

    actor = omega_conf_to_dataclass(config.actor_rollout_ref.actor)
    actor.global_batch_info.update(
        dp_size=1, batch_num_tokens=mask.sum(), global_batch_size=ROWS, loss_scale_factor=None
    )
    log_prob = (old + 1e-5 * torch.randn(ROWS, TOKENS, generator=make)).requires_grad_()  # within every clip range
    loss, metrics = get_policy_loss_fn(actor.policy_loss.loss_mode)(
        old_log_prob=old, log_prob=log_prob, advantages=advantages, response_mask=mask.bool(),
        loss_agg_mode=actor.loss_agg_mode, config=actor, rollout_is_weights=None,
    )  # fmt: skip
    loss.backward()
    rise = -log_prob.grad.sum(dim=1)
    assert torch.isfinite(loss) and torch.isfinite(rise).all() and all(np.isfinite(float(v)) for v in metrics.values())
    assert rise[right == 1].mean() > 0
    assert rise[right == 1].mean() > rise[right == 0].mean()
    torch.testing.assert_close(rise.sign(), advantages.sum(dim=1).sign())
