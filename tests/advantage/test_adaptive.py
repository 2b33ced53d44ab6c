"""krpo_adaptive against textbook sums, exact expectations on a bandit, and what it must not depend on."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from verl_krpo import krpo_adaptive, krpo_memory
from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.config import AdaptiveConfig, MemoryConfig

UNSCALED = AdaptiveConfig(scale="none")


def by_group(values, uids):
    """{uid: rows} in order of appearance, and the values of every group."""
    rows = {uid: [row for row, other in enumerate(uids) if other == uid] for uid in dict.fromkeys(uids)}
    return rows, [np.asarray(values)[members] for members in rows.values()]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("kind", ["normal", "binary"])
def test_is_its_formula_with_the_other_groups_moments(oracle, kind, weighted):
    rng = np.random.default_rng(3)
    for prompts in (3, 4, 16):
        rewards, uids = oracle.random_groups(rng, prompts, 9, kind)
        weights = rng.exponential(size=len(rewards)) if weighted else np.ones(len(rewards))
        found = krpo_adaptive(rewards, uids, weights=torch.from_numpy(weights)).advantages().numpy()
        rows, groups = by_group(rewards, uids)
        _, scores = by_group(weights / weights.mean(), uids)
        scale_var = oracle.noise_var(groups)
        for at, members in enumerate(rows.values()):
            noise_var, mean, var = oracle.others_prior(groups, at, scores)
            if len(members) == 1 and noise_var == 0:
                continue
            mean, var = oracle.dense(groups[at], "leave_one_out", 0.0, (noise_var or 1e-2) / scores[at], mean, var)
            exact = (groups[at] - mean) / np.sqrt(var + scale_var)
            np.testing.assert_allclose(found[members], exact, rtol=1e-6, atol=1e-9)


def test_the_first_success_of_a_batch_is_not_blown_up():
    """One reward of 1 in 128: the others' rewards have no spread to divide by, the batch's have."""
    rewards, uids = np.zeros(128), np.repeat(np.arange(16), 8)
    rewards[5] = 1.0
    found = krpo_adaptive(rewards, uids).advantages().numpy()
    assert found[5] == pytest.approx(np.sqrt(112 / 0.875), rel=1e-6) and np.abs(np.delete(found, 5)).max() < 0.2


# What a gradient is made of

ARMS = torch.tensor([[0.9, -0.4, 0.2], [0.1, 1.2, -1.0], [-0.3, 0.0, 2.0]], dtype=torch.float64)  # logits by prompt
REWARD = torch.tensor([[0.0, 1.0, 0.3], [1.0, 0.0, 0.0], [0.0, 0.5, 1.0]], dtype=torch.float64)


def outcomes(sizes):
    """Every outcome of a batch with sizes[g] answers to prompt g: its chance, prompts, rewards, scores and squares."""
    prompts = np.repeat(np.arange(len(sizes)), sizes)
    chance = ARMS.softmax(1)
    for arms in itertools.product(range(ARMS.shape[1]), repeat=len(prompts)):
        score = torch.eye(ARMS.shape[1], dtype=torch.float64)[list(arms)] - chance[prompts]  # grad of log pi by logits
        probability = chance[prompts, list(arms)].prod().item()
        yield probability, prompts, REWARD[prompts, list(arms)], score, score.square().sum(1)


def gradient(prompts, advantage, score):
    """sum A grad log pi, (prompts, arms)."""
    return torch.zeros_like(ARMS).index_add(0, torch.from_numpy(prompts), advantage[:, None] * score)


def moments(sizes, advantages):
    """Exact mean (prompts, arms) and variance (the trace) of the gradient under advantages(r, prompts, weights)."""
    mean, square = torch.zeros_like(ARMS), 0.0
    for probability, prompts, rewards, score, weights in outcomes(sizes):
        found = gradient(prompts, advantages(rewards, prompts, weights), score)
        mean, square = mean + probability * found, square + probability * found.square().sum()
    return mean, float(square - mean.square().sum())


def visited() -> PromptMemory:
    memory, rng = PromptMemory(), np.random.default_rng(0)
    for _ in range(4):
        _, memory = krpo_memory(torch.from_numpy(rng.random(6)), [0, 0, 1, 1, 2, 2], memory)
    return memory


@pytest.mark.parametrize(("sizes", "arms"), [((2, 2, 1), 3), ((2, 2, 2), 2), ((1, 2, 3), 2), ((3, 1, 1), 2)])
def test_the_gradient_is_unbiased_to_the_last_digit(monkeypatch, sizes, arms):
    """The sum over every outcome of a batch, not a sample: own reward and own weight enter no baseline."""
    monkeypatch.setitem(globals(), "ARMS", ARMS[:, :arms])
    monkeypatch.setitem(globals(), "REWARD", REWARD[:, :arms])
    exact = ARMS.softmax(1) * (REWARD - (ARMS.softmax(1) * REWARD).sum(1, keepdim=True))  # of the expected reward
    exact = exact * torch.tensor(sizes)[:, None]
    memory = visited()
    for advantages in (
        lambda r, p, w: krpo_adaptive(r, p, UNSCALED).advantages(),
        lambda r, p, w: krpo_adaptive(r, p, UNSCALED, w).advantages(),
        lambda r, p, w: krpo_memory(r, p, memory, MemoryConfig(scale="none"), w)[0].advantages(),
    ):
        mean, _ = moments(sizes, advantages)
        torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-12)


def test_the_variance_of_the_gradient_falls_with_the_weighted_error():
    """docs/which_variance.md: with a fixed baseline it is E w (r - b)^2 less the signal, smallest at E w r / E w."""
    chance = ARMS.softmax(1)
    mean_reward = (chance * REWARD).sum(1)
    weight = (torch.eye(3, dtype=torch.float64)[None] - chance[:, None]).square().sum(2)  # of prompt g's arm k
    best = (chance * weight * REWARD).sum(1) / (chance * weight).sum(1)
    signal = (chance * (REWARD - mean_reward[:, None])).square().sum(1)
    variances = []
    for baseline in (best, mean_reward, 0 * best):
        _, var = moments((2, 2, 2), lambda r, p, w, baseline=baseline: r - baseline[p])
        exact = 2 * ((chance * weight * (REWARD - baseline[:, None]).square()).sum(1) - signal).sum()
        assert var == pytest.approx(exact.item(), rel=1e-9)
        variances.append(var)
    assert variances[0] < min(variances[1:])


@pytest.mark.parametrize("prompts", [3, 4])
def test_score_weights_make_the_variance_of_the_gradient_smaller(monkeypatch, prompts):
    """Exactly, for pairs of a few prompts that are mostly answered right: beside no weights, and RLOO."""
    right = torch.linspace(0.55, 0.85, prompts, dtype=torch.float64)
    monkeypatch.setitem(globals(), "ARMS", torch.stack([right, 1 - right], dim=1).log())
    monkeypatch.setitem(globals(), "REWARD", torch.tensor([[1.0, 0.0]] * prompts, dtype=torch.float64))
    sizes = (2,) * prompts
    var = {
        "weighted": lambda r, p, w: krpo_adaptive(r, p, UNSCALED, w).advantages(),
        "unweighted": lambda r, p, w: krpo_adaptive(r, p, UNSCALED).advantages(),
        "rloo": lambda r, p, w: r - (r.view(-1, 2).sum(1).repeat_interleave(2) - r),
    }
    var = {name: moments(sizes, advantages)[1] for name, advantages in var.items()}
    assert var["weighted"] < 0.92 * var["unweighted"] < 0.5 * var["rloo"], var


def test_two_answers_have_their_best_baseline_at_one_minus_p():
    """docs/which_variance.md: at b = 1 - p every sample has the same gradient."""
    p = 0.8
    score = torch.tensor([[1 - p, p - 1], [-p, p]])  # of the right and of the wrong answer
    weights = score.square().sum(1)
    best = p * weights[0] / (p * weights[0] + (1 - p) * weights[1])
    assert best.item() == pytest.approx(1 - p)
    torch.testing.assert_close((1 - best) * score[0], (0 - best) * score[1])


# What it must not depend on

small_reward = st.sampled_from([0.0, 0.01, 0.5, 1.0]) | st.integers(-64, 64).map(lambda k: k / 16)
groups_of_rewards = st.lists(st.lists(small_reward, min_size=1, max_size=7), min_size=1, max_size=6)
weight = st.sampled_from([0.0, 1e-3, 0.1, 1.0, 7.5])


def flat(groups):
    return [reward for rewards in groups for reward in rewards], [
        k for k, rewards in enumerate(groups) for _ in rewards
    ]


@settings(max_examples=80)
@given(groups_of_rewards, st.sampled_from([1e-6, 0.3, 1.0, 4e5]))
def test_equal_weights_are_no_weights(groups, factor):
    rewards, uids = flat(groups)
    plain = krpo_adaptive(rewards, uids).advantages()
    equal = krpo_adaptive(rewards, uids, weights=torch.full((len(rewards),), factor, dtype=torch.float64)).advantages()
    torch.testing.assert_close(equal, plain, rtol=1e-10, atol=1e-10)


@settings(max_examples=80)
@given(groups_of_rewards, st.data(), st.sampled_from([1e-3, 3.0, 2.0**20]))
def test_a_common_factor_of_the_weights_changes_nothing(groups, data, factor):
    rewards, uids = flat(groups)
    weights = torch.tensor(data.draw(st.lists(weight, min_size=len(uids), max_size=len(uids))), dtype=torch.float64)
    one, other = (krpo_adaptive(rewards, uids, weights=w) for w in (weights, factor * weights))
    torch.testing.assert_close(one.advantages(), other.advantages(), rtol=1e-9, atol=1e-9)


@settings(max_examples=120)
@given(groups_of_rewards, st.data(), st.booleans())
def test_no_baseline_reads_its_own_reward_or_weight(groups, data, remembered):
    rewards, uids = flat(groups)
    draw = st.lists(st.sampled_from([1e-2, 0.1, 1.0, 7.5]), min_size=len(uids), max_size=len(uids))
    weights = torch.tensor(data.draw(draw), dtype=torch.float64)
    row = data.draw(st.integers(0, len(uids) - 1))
    changed, reweighted = torch.tensor(rewards, dtype=torch.float64), weights.clone()
    changed[row] += 3.0
    reweighted[row] *= 5.0
    memory = visited() if remembered else None

    def baseline(rewards, weights):
        if memory is None:
            estimate = krpo_adaptive(rewards, uids, UNSCALED, weights)
        else:
            estimate, _ = krpo_memory(rewards, uids, memory, MemoryConfig(scale="none"), weights)
        return estimate.groups.scatter(torch.where(estimate.baseline_var.isinf(), 0.0, estimate.baseline))[row]

    exact = baseline(torch.tensor(rewards, dtype=torch.float64), weights)
    torch.testing.assert_close(baseline(changed, weights), exact, rtol=1e-7, atol=1e-7)
    if memory is None:  # its R and P0 are kept in units of the mean weight of a step
        torch.testing.assert_close(
            baseline(torch.tensor(rewards, dtype=torch.float64), reweighted), exact, rtol=1e-7, atol=1e-7
        )


@settings(max_examples=60)
@given(groups_of_rewards, st.data(), st.integers(-40, 40).map(lambda k: k / 8))
def test_a_shift_of_all_rewards_changes_nothing(groups, data, shift):
    rewards, uids = flat(groups)
    weights = torch.tensor(data.draw(st.lists(weight, min_size=len(uids), max_size=len(uids))), dtype=torch.float64)
    plain, moved = (krpo_adaptive([r + by for r in rewards], uids, weights=weights).advantages() for by in (0.0, shift))
    torch.testing.assert_close(moved, plain, rtol=1e-6, atol=1e-6)


@settings(max_examples=60)
@given(
    st.lists(st.lists(small_reward, min_size=2, max_size=7).filter(lambda g: len(set(g)) > 1), min_size=2, max_size=6),
    st.sampled_from(["model", "none"]),
    st.integers(-3, 3).map(lambda k: 2.0**k),
)
def test_units_of_the_reward_do_not_matter(groups, scale, factor):
    """Scaled rewards have the same advantages, or scaled ones without a scale."""
    rewards, uids = flat(groups)
    plain, scaled = (
        krpo_adaptive([by * r for r in rewards], uids, AdaptiveConfig(scale=scale)).advantages() for by in (1.0, factor)
    )
    torch.testing.assert_close(scaled, plain * (factor if scale == "none" else 1.0), rtol=1e-6, atol=1e-9)


@settings(max_examples=40)
@given(st.lists(st.integers(1, 6), min_size=1, max_size=6), st.floats(-1e3, 1e3, width=32), st.data())
def test_equal_rewards_have_no_advantage(sizes, reward, data):
    uids = [f"uid-{k}" for k, size in enumerate(sizes) for _ in range(size)]
    weights = torch.tensor(data.draw(st.lists(weight, min_size=len(uids), max_size=len(uids))), dtype=torch.float64)
    assert (krpo_adaptive([reward] * len(uids), uids).advantages() == 0).all()
    torch.testing.assert_close(
        krpo_adaptive([reward] * len(uids), uids, weights=weights).advantages(),
        torch.zeros(len(uids), dtype=torch.float64),
        rtol=0,
        atol=1e-9 * max(1.0, abs(reward)),
    )


# Odd batches


def test_a_prompt_without_a_score_has_the_prior_mean_and_tells_the_others_nothing():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0, 0.0, 0.0, 0.5, 0.0], dtype=torch.float64)
    uids = np.repeat(np.arange(4), 2)
    weights = torch.tensor([0.0, 0.0, 1.0, 2.0, 0.5, 1.0, 1.0, 3.0], dtype=torch.float64)
    found = krpo_adaptive(rewards, uids, UNSCALED, weights)
    assert found.baseline[0].tolist() == pytest.approx([found.model.init_mean[0].item()] * 2)
    without = krpo_adaptive(rewards[2:], uids[2:], UNSCALED, weights[2:])
    torch.testing.assert_close(found.advantages()[2:], without.advantages(), rtol=1e-10, atol=1e-12)


def test_where_no_response_has_a_score_all_count_alike():
    rewards, uids = [1.0, 0.0, 0.5, 1.0, 0.0, 0.0], [0, 0, 1, 1, 2, 2]
    none = krpo_adaptive(rewards, uids, weights=torch.zeros(6))
    assert torch.equal(none.advantages(), krpo_adaptive(rewards, uids).advantages())


def test_a_response_alone_has_nothing_to_be_compared_with():
    assert krpo_adaptive([1.0], ["a"]).advantages().tolist() == [0.0]
    assert krpo_adaptive([], []).advantages().shape == (0,)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -1.0])
def test_a_wrong_weight_is_named(bad):
    with pytest.raises(ValueError, match=r"weights .* in rows \[2\] of prompts .*b"):
        krpo_adaptive([1.0, 0.0, 1.0], list("aab"), weights=torch.tensor([1.0, 1.0, bad]))
    with pytest.raises(ValueError, match=r"weights have shape \(2,\), rewards \(3,\)"):
        krpo_adaptive([1.0, 0.0, 1.0], list("aab"), weights=torch.ones(2))


def test_one_response_a_prompt_is_compared_with_the_other_prompts():
    """verl's rloo_vectorized has nothing left there, its rloo and grpo no baseline."""
    pytest.importorskip("verl")
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rewards = torch.tensor([1.0, 0, 1, 0, 0, 1, 0, 0])
    prompts = np.array([f"p{i}" for i in range(8)], dtype=object)
    batch = {"token_level_rewards": rewards[:, None], "response_mask": torch.ones(8, 1), "index": prompts}
    found = {name: get_adv_estimator_fn(name)(**batch)[0][:, 0] for name in ("rloo_vectorized", "rloo", "grpo")}
    assert not found["rloo_vectorized"].any() and found["rloo"].equal(rewards)
    torch.testing.assert_close(found["grpo"], rewards, rtol=1e-5, atol=0)
    estimate = krpo_adaptive(rewards, prompts)
    torch.testing.assert_close(estimate.baseline[:, 0], (rewards.sum() - rewards).double() / 7)
    assert estimate.advantages().sign().equal(2 * rewards.double() - 1)


def test_its_group_selects_it(compose):
    algorithm = compose("+algorithm=krpo_adaptive", "algorithm.krpo_adaptive.scale=none").algorithm
    assert algorithm.adv_estimator == "krpo_adaptive" and algorithm.krpo_adaptive.scale.value == "none"
