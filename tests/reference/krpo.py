"""KRPO by loops and dense linear algebra in float64, on plain lists."""

import numpy as np
import torch

from reference import local_level
from reference.local_level import conditions, sequential


def published(rewards, uids, process_var=1e-5, measurement_var=1e-2, init_mean=0.0, init_var=1.0, epsilon=1e-8):
    """(r_i - x_{i|i}) / (sqrt(P_{i|i}) + eps): one filter a prompt, in the order of the batch."""
    rewards, uids = np.asarray(rewards, dtype=float), list(uids)
    advantages = np.zeros(len(rewards))
    for uid in set(uids):
        rows = [row for row, other in enumerate(uids) if other == uid]
        z = torch.from_numpy(rewards[rows])[None]
        mean, var, _ = sequential(z, None, process_var, measurement_var, init_mean, init_var)
        advantages[rows] = (rewards[rows] - mean[0].numpy()) / (np.sqrt(var[0].numpy()) + epsilon)
    return advantages


def dense(rewards, baseline, process_var, measurement_var, init_mean, init_var):
    """Mean and variance of x_i given the rewards that `baseline` looks at, (n,) each."""
    which = conditions("filtered" if baseline == "causal" else baseline, len(rewards))
    beliefs = local_level.dense(rewards, which, process_var, measurement_var, init_mean, init_var)
    return np.broadcast_to(beliefs, (len(rewards), 2)).T


def jspo_baseline(groups):
    """arXiv 2511.03710 for groups of one size: b_gj by loops over rewards (groups, n)."""
    count, n = groups.shape
    baseline = np.empty(groups.shape)
    for g in range(count):
        others = np.delete(groups, g, axis=0)
        v = (others.var(axis=1, ddof=1) / n).mean()
        shrink = v / (v + others.mean(axis=1).var(ddof=1))
        for j in range(n):
            baseline[g, j] = (1 - shrink) * np.delete(groups[g], j).mean() + shrink * others.mean()
    return baseline


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


def others_prior(groups, at, weights=None):
    """R, m0, P0 for groups[at] from the other groups, by the textbook sums; groups, weights: lists of lists."""
    weights = weights or [np.ones(len(g)) for g in groups]
    others = [(np.asarray(g, dtype=float), w) for k, (g, w) in enumerate(zip(groups, weights, strict=True)) if k != at]
    weight = np.array([w.sum() for _, w in others])
    means = np.array([(w * g).sum() / w.sum() for g, w in others])
    total, members = weight.sum(), sum(len(g) for g, _ in others)
    within = sum((w * (g - (w * g).sum() / w.sum()) ** 2).sum() for g, w in others) / (members - len(others))
    grand = (weight * means).sum() / total
    between = (weight * (means - grand) ** 2).sum() - (len(others) - 1) * within
    return within, grand, max(0.0, between / (total - (weight**2).sum() / total))


def noise_var(groups, weights=None):
    """R over all groups with eight more rewards that vary as all of them do; groups, weights: lists of lists."""
    weights = weights or [np.ones(len(g)) for g in groups]
    pairs = [(np.asarray(g, dtype=float), w) for g, w in zip(groups, weights, strict=True)]
    within = sum((w * (g - (w * g).sum() / w.sum()) ** 2).sum() for g, w in pairs)
    r, w = (np.concatenate(x) for x in zip(*pairs, strict=True))
    var = (w * (r - (w * r).sum() / w.sum()) ** 2).sum() / (len(r) - 1)
    return (within + 8 * var) / (len(r) - len(groups) + 8)


def batch(rewards, uids, tokens=3, masked=(), name="krpo", **settings):
    """Arguments of the estimator `name`: the reward on a row's last token, rows in `masked` with an empty mask."""
    token_level_rewards = torch.zeros(len(rewards), tokens, dtype=torch.float64)
    token_level_rewards[:, -1] = torch.as_tensor(rewards, dtype=torch.float64)
    mask = torch.ones(len(rewards), tokens, dtype=torch.int64)
    mask[list(masked)] = 0
    return dict(
        name=name,
        token_level_rewards=token_level_rewards,
        response_mask=mask,
        config={name: settings},
        index=np.array(list(uids), dtype=object),
    )


def advantage_of(rewards, uids, **settings):
    """The advantage of every row, (rows,) float64, by verl's door; settings: `name` and its keys."""
    from verl_krpo.plugin.estimator import compute_advantage

    advantages, returns = compute_advantage(**batch(rewards, uids, **settings))
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
