"""The independent side of the KRPO tests: loops and dense linear algebra in float64, on plain lists."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch


def published(rewards, uids, process_var=1e-5, measurement_var=1e-2, init_mean=0.0, init_var=1.0, epsilon=1e-8):
    """The published loop: one filter a prompt, started at its first row, walked in the order of the batch."""
    state, advantages = {}, []
    for reward, uid in zip(rewards, uids, strict=True):
        mean, var = state.get(uid, (init_mean, init_var))
        var = var + process_var
        gain = var / (var + measurement_var)
        mean = mean + gain * (reward - mean)
        var = (1 - gain) * var
        state[uid] = mean, var
        advantages.append((reward - mean) / (math.sqrt(var) + epsilon))
    return np.array(advantages)


def dense(rewards, baseline, process_var, measurement_var, init_mean, init_var):
    """Mean and variance of x_i given the rewards that `baseline` looks at, by conditioning the joint Gaussian.

    Cov(x_i, x_j) = P0 + Q min(i, j), Cov(r_i, r_j) = Cov(x_i, x_j) + R [i = j], with i, j from 1.
    """
    n = len(rewards)
    steps = np.arange(1, n + 1)
    state = init_var + process_var * np.minimum(steps[:, None], steps)
    noisy = state + measurement_var * np.eye(n)
    mean, var = np.empty(n), np.empty(n)
    for i in range(n):
        target, seen = {
            "causal": (i, list(range(i + 1))),
            "predicted": (i, list(range(i))),
            "posterior": (n - 1, list(range(n))),
            "smoothed": (i, list(range(n))),
            "leave_one_out": (i, [j for j in range(n) if j != i]),
        }[baseline]
        weights = np.linalg.solve(noisy[np.ix_(seen, seen)], state[seen, target]) if seen else np.zeros(0)
        mean[i] = init_mean + weights @ (np.asarray(rewards)[seen] - init_mean)
        var[i] = state[target, target] - weights @ state[seen, target]
    return mean, var


def advantage_of_group(rewards, baseline, scale, process_var, measurement_var, init_mean, init_var, epsilon=1e-8):
    """A_i of one group in filter order, by the formulas of the docstring on top of `dense`."""
    mean, var = dense(rewards, baseline, process_var, measurement_var, init_mean, init_var)
    spread = np.std(rewards, ddof=1) if len(set(rewards)) > 1 else None
    divisor = {
        "filter_std": np.sqrt(var) + epsilon,
        "innovation_std": np.sqrt(var + measurement_var) + epsilon,
        "group_std": 1.0 if spread is None else spread + epsilon,
        "none": 1.0,
    }[scale]
    return (np.asarray(rewards) - mean) / divisor


def others_prior(groups, at, init_mean=None):
    """R, m0, P0 for groups[at] from the other groups, by the textbook sums; groups: lists of rewards."""
    others = [np.asarray(g, dtype=float) for k, g in enumerate(groups) if k != at]
    sizes = np.array([len(g) for g in others])
    means = np.array([g.mean() for g in others])
    total = sizes.sum()
    within = sum(((g - g.mean()) ** 2).sum() for g in others) / (total - len(others))
    if init_mean is None:
        grand = (sizes * means).sum() / total
        between = (sizes * (means - grand) ** 2).sum() - (len(others) - 1) * within
        return within, grand, max(0.0, between / (total - (sizes**2).sum() / total))
    between = (sizes * (means - init_mean) ** 2).sum() - len(others) * within
    return within, init_mean, max(0.0, between / total)


def noise_var(groups):
    """R over all groups with eight more rewards that vary as all of them do; groups: lists of rewards."""
    within = sum(((g - np.mean(g)) ** 2).sum() for g in groups)
    return (within + 8 * np.var(np.concatenate(groups), ddof=1)) / (sum(map(len, groups)) - len(groups) + 8)


def krpo_batch(rewards, uids, tokens=3, masked=(), **settings):
    """Keyword arguments of the estimator: the reward on a row's last token, rows in `masked` with an empty mask."""
    token_level_rewards = torch.zeros(len(rewards), tokens, dtype=torch.float64)
    token_level_rewards[:, -1] = torch.as_tensor(rewards, dtype=torch.float64)
    mask = torch.ones(len(rewards), tokens, dtype=torch.int64)
    mask[list(masked)] = 0
    return dict(
        token_level_rewards=token_level_rewards,
        response_mask=mask,
        config={"krpo": settings},
        index=np.array(list(uids), dtype=object),
    )


def advantage_of(rewards, uids, **settings):
    """The estimator's advantage of every row, (rows,) float64."""
    from verl_krpo.plugin.estimator import compute_advantage

    advantages, returns = compute_advantage(**krpo_batch(rewards, uids, **settings))
    assert advantages.dtype == torch.float64 and torch.equal(advantages, returns)
    assert torch.equal(advantages, advantages[:, :1].expand_as(advantages))
    return advantages[:, 0].numpy()


def random_groups(rng, prompts, largest, kind="normal"):
    """Uneven groups with interleaved rows: rewards (rows,), uids (rows,)."""
    sizes = rng.integers(1, largest + 1, prompts)
    uids = rng.permutation(np.repeat([f"uid-{k}" for k in range(prompts)], sizes)).tolist()
    means = {uid: rng.normal() for uid in uids}
    if kind == "binary":
        return rng.integers(0, 2, len(uids)).astype(float), uids
    return np.array([means[uid] + rng.normal() for uid in uids]), uids


@pytest.fixture(scope="session")
def oracle():
    return SimpleNamespace(
        published=published,
        dense=dense,
        advantage_of_group=advantage_of_group,
        others_prior=others_prior,
        noise_var=noise_var,
        batch=krpo_batch,
        advantage_of=advantage_of,
        random_groups=random_groups,
    )
