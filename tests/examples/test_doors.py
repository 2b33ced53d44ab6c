"""The examples of docs/examples: what a framework would call, on tensors of its shapes; by its own door where it is."""

import re
from pathlib import Path
from types import ModuleType

import numpy as np
import prime_rl_kpo
import pytest
import rllm_krpo
import skyrl_krpo
import slime_krpo
import torch

from verl_krpo import AdaptiveConfig, KpoConfig, kpo, krpo_adaptive, score_weights

EXAMPLES = Path(__file__).parents[2] / "docs/examples"
CLIP = {"clip_low": 0.02, "clip_high": 0.03}


def log_probs(rows=4, tokens=7, seed=0):
    """New and old log-probs, advantages and a mask with padding, (rows, tokens)."""
    make = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, tokens, generator=make)
    new = old + 0.2 * torch.randn(rows, tokens, generator=make)
    mask = torch.arange(tokens) < torch.randint(1, tokens + 1, (rows, 1), generator=make)
    return new.requires_grad_(), old, torch.randn(rows, 1, generator=make).expand(rows, tokens), mask


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_short(path):
    assert len(path.read_text().splitlines()) <= 60


def test_the_page_runs():
    page = (EXAMPLES.parent / "without_verl.md").read_text()
    first, included = re.findall(r"^```python\n(.*?)^```", page, re.DOTALL | re.MULTILINE)
    exec(compile(first, "without_verl.md", "exec"), {})
    assert (EXAMPLES.parents[1] / included.split('"')[1]).is_file()


# SkyRL


def skyrl_batch():
    rewards = torch.zeros(6, 3)
    rewards[:, -1] = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])  # the last two are copies of the first row
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 0], [1, 1, 0]])
    return rewards, mask, ["a", "a", "b", "b", "pad0", "pad1"]


def test_skyrl_padding_is_no_prompt():
    rewards, mask, index = skyrl_batch()
    advantages, returns = skyrl_krpo.krpo_estimator(rewards, mask, index, values=None, config=None, gamma=1.0)
    exact = krpo_adaptive([1.0, 0.0, 1.0, 1.0], list("aabb")).advantages().float()
    assert advantages is returns and advantages.dtype == torch.float32
    torch.testing.assert_close(advantages[:4], exact[:, None] * mask[:4])
    assert not advantages[4:].any()


def test_skyrl_reaches_both_by_its_registries():
    utils = pytest.importorskip("skyrl.backends.skyrl_train.utils.ppo_utils")
    config = pytest.importorskip("skyrl.train.config").AlgorithmConfig(eps_clip_low=0.02, eps_clip_high=0.03)
    skyrl_krpo.register()
    rewards, mask, index = skyrl_batch()
    found, _ = utils.compute_advantages_and_returns(rewards, mask, index, adv_estimator="krpo_adaptive", config=config)
    assert torch.equal(found, skyrl_krpo.krpo_estimator(rewards, mask, index)[0])
    new, old, advantages, mask = log_probs()
    loss_of = utils.PolicyLossRegistry.get("kpo")
    loss, metrics = loss_of(new, old, advantages, config=config, loss_mask=mask.float(), rollout_logprobs=old)
    torch.testing.assert_close(loss, kpo(new, old, advantages, mask, **CLIP)[0].sum())
    assert all(isinstance(value, float) for value in metrics.values())


# rLLM

STEPS = [
    [[-0.1, -0.7], [-0.2]],
    [[-1.0]],
    [[-0.3, -0.3, -0.3]],
    [[-0.5], [-0.5]],
]  # trajectories, their steps, log-probs
REWARDS = [np.array([1.0, 0.0]), np.array([1.0, 1.0])]


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_rllm_a_trajectory_weighs_what_its_steps_do(mode):
    found = rllm_krpo.trajectory_weights(STEPS, mode)
    each = [[score_weights(torch.tensor([step]), torch.ones(1, len(step)), mode) for step in steps] for steps in STEPS]
    torch.testing.assert_close(found, torch.cat([torch.stack(steps).sum(dim=0) for steps in each]))


def test_rllm_reaches_the_estimator_by_its_registry():
    advantage = pytest.importorskip("rllm.trainer.algorithms.advantage")
    types = pytest.importorskip("rllm.types")
    config = pytest.importorskip("rllm.trainer.algorithms.config").AlgorithmConfig
    config = config(estimator_map={"solver": "krpo_adaptive"})
    groups = [
        types.TrajectoryGroup(
            group_id=f"task{i}:solver",
            trajectories=[
                types.Trajectory(reward=reward, steps=[types.Step(logprobs=step) for step in steps])
                for reward, steps in zip(rewards, STEPS[2 * i :], strict=False)
            ],
        )
        for i, rewards in enumerate(REWARDS)
    ]
    advantage.collect_reward_and_advantage_from_trajectory_groups(groups, config)
    found = [each.steps[0].advantage for group in groups for each in group.trajectories]
    weights = rllm_krpo.trajectory_weights(STEPS, "token-mean")
    assert found == pytest.approx(
        krpo_adaptive([1.0, 0.0, 1.0, 1.0], list("aabb"), weights=weights).advantages().tolist()
    )
    groups[0].trajectories[0].steps[0].logprobs = []
    with pytest.raises(ValueError, match="logprobs"):
        advantage.collect_reward_and_advantage_from_trajectory_groups(groups, config)


def test_rllm_reaches_the_loss_by_its_registry():
    loss = pytest.importorskip("rllm.trainer.algorithms.loss")
    new, old, advantages, mask = log_probs()
    for row in (slice(None), 0):  # (rows, tokens), and the (tokens,) of one sequence
        tensors = (tensor[row] for tensor in (new, old, advantages, mask.float(), 1 - mask.float()))
        ctx = loss.LossContext(*tensors, aggregate=lambda losses, mask: (losses * mask).sum(), params=CLIP)
        found, _ = loss.get_loss("kpo")(ctx)
        torch.testing.assert_close(found, kpo(new, old, advantages, mask, **CLIP)[0][row].sum())


# slime


def test_slime_losses_are_those_of_each_response():
    new, old, advantages, mask = log_probs()
    ragged = [[row[: int(seen.sum())] for row, seen in zip(each, mask, strict=True)] for each in (new, old, advantages)]
    masks = [torch.ones(int(seen.sum()), dtype=torch.int) for seen in mask]
    found, clipped = slime_krpo.token_losses(*ragged, masks, **CLIP)
    exact, diagnostics = kpo(new, old, advantages, mask, **CLIP)
    torch.testing.assert_close(found, exact[mask])
    assert clipped == diagnostics["pg_clipfrac"]


def test_slime_rewards_are_advantages():
    Sample = pytest.importorskip("slime.utils.types").Sample
    args = ModuleType("args")
    args.reward_key, args.calculate_per_token_loss = None, True
    log_prob = torch.tensor([[-0.1, -0.7, -1.0], [-0.2, -0.4, 0.0], [-0.3, 0.0, 0.0]])
    mask = torch.tensor([[1, 0, 1], [1, 1, 0], [1, 0, 0]])
    samples = [
        Sample(group_index=0, reward=1.0, rollout_log_probs=[-0.1, -0.7, -1.0], loss_mask=[1, 0, 1]),
        Sample(group_index=0, reward=0.0, rollout_log_probs=[-0.2, -0.4]),
        Sample(group_index=1, reward=1.0, rollout_log_probs=[-0.3]),
        Sample(group_index=1, reward=0.0, rollout_log_probs=[-0.3], remove_sample=True),
    ]
    rewards, found = slime_krpo.post_process_rewards(args, samples)
    exact = krpo_adaptive(rewards[:3], [0, 0, 1], AdaptiveConfig(), score_weights(log_prob, mask)).advantages()
    assert rewards == [1.0, 0.0, 1.0, 0.0] and found == pytest.approx([*exact.tolist(), 0.0])


# prime-rl


def test_prime_rl_loss_of_a_sequence():
    new, old, advantages, mask = (tensor[0] for tensor in log_probs(rows=1))
    mask[1] = False
    weights = torch.linspace(0.5, 2, len(mask))
    settings = {"process_var": 1e-2, "clip": False}
    found, metrics = prime_rl_kpo.sequence_loss(new, old, advantages, mask, weights, **CLIP, **settings)
    losses, _ = kpo(new[None], old[None], advantages[None], mask[None], KpoConfig(**settings), **CLIP)
    torch.testing.assert_close(found, (losses[0] * weights).sum())
    assert metrics["pg_clipfrac"] == 0
    with pytest.raises(TypeError, match="process_variance"):
        prime_rl_kpo.sequence_loss(new, old, advantages, mask, process_variance=1.0)


def test_prime_rl_reaches_it_by_its_config():
    loss = pytest.importorskip("prime_rl.trainer.rl.loss")
    config = pytest.importorskip("prime_rl.configs.trainer").CustomLossConfig
    loss_of = loss.setup_rl_loss_fn(config(import_path="prime_rl_kpo.kpo_loss", kwargs=CLIP | {"process_var": 1e-2}))
    new, old, advantages, mask = (tensor[0] for tensor in log_probs(rows=1))
    inputs = loss.LossInputs(new, old, None, advantages, mask)
    found = loss_of(inputs)
    exact, _ = prime_rl_kpo.sequence_loss(new, old, advantages, mask, **CLIP, process_var=1e-2)
    torch.testing.assert_close(found.loss, exact)
    assert all(value.shape == () for value in found.metrics.values())
