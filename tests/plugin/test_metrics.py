"""krpo/* against sums over lists, and in the log that verl writes."""

import json

import numpy as np
import pytest
import torch
from reference import metrics as names

from verl_krpo import krpo, krpo_adaptive
from verl_krpo.config import AdaptiveConfig, KrpoConfig
from verl_krpo.plugin import metrics
from verl_krpo.plugin.estimator import compute_advantage


def rewards_and_uids(sizes=(5, 1, 7, 2), seed=0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=sum(sizes)), [f"uid-{k}" for k, size in enumerate(sizes) for _ in range(size)]


def estimated(rewards, uids, **settings):
    settings = KrpoConfig(**settings)
    found = krpo(torch.as_tensor(rewards), np.array(uids, dtype=object), settings)
    return found, metrics.scalars(found, settings)


def test_every_metric_is_its_definition():
    rewards, uids = rewards_and_uids()
    noise = dict(process_var=0.1, measurement_var=0.5, init_mean=0.2, init_var=2.0)
    found, scalars = estimated(rewards, uids, order="arrival", **noise)
    gains, nis, groups = [], [], {}
    for row, (reward, uid) in enumerate(zip(rewards, uids, strict=True)):
        mean, var, rows = groups.get(uid, (0.2, 2.0, []))
        var += 0.1
        nis.append((reward - mean) ** 2 / (var + 0.5))
        gain = var / (var + 0.5)
        gains.append(gain)
        groups[uid] = mean + gain * (reward - mean), (1 - gain) * var, rows + [row]
    advantage = found.advantages().numpy()
    first, last = [r[0] for _, _, r in groups.values()], [r[-1] for _, _, r in groups.values()]
    several = [k for k, row in enumerate(first) if row != last[k]]
    exact = {
        "krpo/reward_mean": rewards.mean(),
        "krpo/baseline_mean": found.groups.scatter(found.baseline).mean().item(),
        "krpo/gain_first": np.mean([gains[row] for row in first]),
        "krpo/gain_last": np.mean([gains[row] for row in last]),
        "krpo/advantage_std": advantage.std(),
        "krpo/advantage_abs_first_over_last": np.abs(advantage[[first[k] for k in several]]).mean()
        / np.abs(advantage[[last[k] for k in several]]).mean(),
        "krpo/measurement_var": 0.5,
        "krpo/prior_mean": 0.2,
        "krpo/prior_var": 2.0,
        "krpo/nis": np.mean(nis),
        "krpo/groups": 4,
        "krpo/group_size_min": 1,
        "krpo/singletons": 1,
    }
    assert set(exact) == names.KRPO
    assert scalars == pytest.approx(exact, rel=1e-9)


def test_nis_is_one_where_the_model_made_the_rewards():
    rng = np.random.default_rng(1)
    prompts, size, noise = 4000, 6, dict(process_var=0.04, measurement_var=0.3, init_mean=0.5, init_var=0.8)
    state = 0.5 + rng.normal(size=(prompts, 1)) * 0.8**0.5 + (rng.normal(size=(prompts, size)) * 0.2).cumsum(axis=1)
    rewards = (state + rng.normal(size=(prompts, size)) * 0.3**0.5).ravel()
    _, scalars = estimated(rewards, np.repeat(np.arange(prompts), size), order="arrival", **noise)
    # The mean of 24000 chi-squared variables of one degree of freedom: standard deviation 0.009.
    assert scalars["krpo/nis"] == pytest.approx(1.0, abs=4 * 0.0092)


def test_what_is_estimated_is_reported():
    rewards, uids = rewards_and_uids(sizes=(4,) * 8)
    found = krpo_adaptive(rewards, uids)
    scalars = metrics.scalars(found, AdaptiveConfig())
    for name, value in (
        ("measurement_var", found.scale_var),
        ("prior_mean", found.model.init_mean.mean().item()),
        ("prior_var", found.model.init_var.mean().item()),
    ):
        assert scalars[f"krpo/{name}"] == pytest.approx(value)
    assert scalars["krpo/group_size_min"] == 4 and scalars["krpo/singletons"] == 0


def test_padding_is_no_group():
    counted = torch.tensor([True, True, False])
    found = krpo(torch.tensor([1.0, 0.0, 0.0]), np.array(["a", "a", "pad"]), KrpoConfig(), counted=counted)
    assert metrics.scalars(found, KrpoConfig())["krpo/groups"] == 1
    found = krpo(torch.zeros(3), np.array(["pad"] * 3), KrpoConfig(), counted=torch.zeros(3, dtype=torch.bool))
    assert metrics.scalars(found, KrpoConfig()) == {"krpo/groups": 0}


def test_estimates_of_one_step_are_merged():
    one, two = (estimated(*rewards_and_uids(sizes, seed)) for sizes, seed in (((3, 1), 0), ((2, 2, 2), 1)))
    for found, _ in (one, two):
        metrics.record(found, KrpoConfig())
    merged = metrics.drain()
    assert (merged["krpo/groups"], merged["krpo/singletons"], merged["krpo/group_size_min"]) == (5, 1, 1)
    assert merged["krpo/nis"] == pytest.approx((one[1]["krpo/nis"] + two[1]["krpo/nis"]) / 2)
    assert metrics.drain() == {}


def test_verls_log_carries_them_once(tmp_path, monkeypatch):
    import verl  # noqa: F401 (loads the plugin)
    from verl.utils.tracking import Tracking

    monkeypatch.setenv("VERL_FILE_LOGGER_ROOT", str(tmp_path))
    log = Tracking("project", "run", ["file", "console"])
    rewards, uids = rewards_and_uids()
    rows = torch.as_tensor(rewards)[:, None]
    compute_advantage("krpo", rows, torch.ones_like(rows), None, np.array(uids, dtype=object))
    own = {"actor/loss": 1.0}
    log.log(data=own, step=1)
    log.log(data=own, step=2)
    log.finish()
    (path,) = tmp_path.rglob("*.jsonl")
    first, second = (json.loads(line)["data"] for line in path.read_text().splitlines())
    assert set(first) == names.KRPO | {"actor/loss"} and second == own == {"actor/loss": 1.0}
    assert all(np.isfinite(value) for value in first.values())
