"""KRPO with a memory: against a dense Gaussian over all visits of a prompt, and what it promises in every batch."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from verl_krpo import MemoryConfig, krpo_adaptive, krpo_memory
from verl_krpo.advantage.memory import FORGET, PromptMemory
from verl_krpo.config import AUTO


def visits(seed: int, steps: int = 12, pool: int = 7, largest: int = 5, skip: float = 0.3):
    """(step, prompts (rows,), rewards (rows,)) of a training run: uneven groups, singletons, skipped steps."""
    rng = np.random.default_rng(seed)
    level = rng.normal(0.3, 0.5, pool)
    for step in range(1, steps + 1):
        level = level + 0.05 + 0.1 * rng.normal(size=pool)
        if rng.random() < skip and step > 1:
            continue
        chosen = rng.permutation(pool)[: rng.integers(3, pool + 1)]
        prompts = np.repeat(chosen, rng.integers(1, largest + 1, size=len(chosen)))
        order = rng.permutation(len(prompts))
        yield step, prompts[order], torch.from_numpy(level[prompts] + 0.4 * rng.normal(size=len(prompts)))[order]


def trained(seed: int, memory_var=AUTO, **kwargs) -> PromptMemory:
    memory = PromptMemory()
    for step, prompts, rewards in visits(seed, **kwargs):
        _, memory = krpo_memory(rewards, prompts, memory, MemoryConfig(memory_var=memory_var), step=step)
    return memory


class DenseGaussian:
    """A prompt's deviations from the level at all its visits, jointly, given all its rewards. No recursion over them.

    x_1 ~ N(0, P0),  x_{j+1} = rho_j (x_j + moved_j) + w_j,  Var w_j = P0_j (1 - rho_j^2),  r_ji = level_j + x_j + v.
    """

    def __init__(self):
        self.steps, self.rho, self.var, self.moved = [], [], [], []
        self.rewards: list[tuple[int, float, float]] = []  # visit, reward less level, R

    def arrive(self, step: int, ratio: float, init_var: float) -> None:
        self.rho.append((1 - ratio) ** ((step - self.steps[-1]) / 2) if self.steps else 0.0)
        self.var.append(init_var * (1 - self.rho[-1] ** 2))
        self.steps.append(step)

    def state(self) -> tuple[float, float]:
        """Mean and variance of the last deviation."""
        count = len(self.steps)
        # x = A (w + B moved), with A the inverse of I - shift(rho)
        chain = np.linalg.inv(np.eye(count) - np.diag(self.rho[1:], -1))
        push = np.array([0.0] + [rho * moved for rho, moved in zip(self.rho[1:], self.moved, strict=False)])
        mean, cov = chain @ push, chain @ np.diag(self.var) @ chain.T
        if not self.rewards:
            return mean[-1], cov[-1, -1]
        at = [visit for visit, _, _ in self.rewards]
        observed = np.array([reward for _, reward, _ in self.rewards])
        noisy = cov[np.ix_(at, at)] + np.diag([noise for _, _, noise in self.rewards])
        weights = np.linalg.solve(noisy, cov[at, -1])
        return mean[-1] + weights @ (observed - mean[at]), cov[-1, -1] - weights @ cov[at, -1]


def beta_law(memory, mean, var, noise_var):
    """Mean and standard deviation of the Beta law on the rewards' range that noise_var / var rewards leave."""
    if not var:
        return mean, 0.0
    width = memory.highest - memory.lowest
    right = min(max((mean - memory.lowest) / width, 0.01), 0.99) * noise_var / var
    law = stats.beta(right, noise_var / var - right, memory.lowest, width)
    return law.mean(), law.std()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("memory_var", [AUTO, 0.0, 3e-3, 10.0])
@pytest.mark.parametrize("seed", range(4))
def test_equals_a_dense_gaussian_over_all_visits(seed, memory_var, weighted):
    options = MemoryConfig(memory_var=memory_var)
    memory, prompts_seen, rng = PromptMemory(), {}, np.random.default_rng(seed)
    level, weight, last = 0.0, 0.0, 0
    for step, prompts, rewards in visits(seed):
        given = rng.exponential(size=len(rewards)) if weighted else np.ones(len(rewards))
        estimate, after_it = krpo_memory(rewards, prompts, memory, options, torch.from_numpy(given), step)
        first = memory.model(memory_var) is None
        model = (after_it if first else memory).model(memory_var)
        noise_var, init_var = model.measurement_var, model.init_var
        ratio = (after_it if first else memory).ratio(memory_var, init_var)
        labels = list(estimate.groups.labels)
        for label in labels:
            prompts_seen.setdefault(label, DenseGaussian()).arrive(step, ratio, init_var)
        predicted = {label: prompts_seen[label].state() for label in labels}
        foretold = np.stack(memory.forecast(labels, step, memory_var)[:2], axis=1)
        states = [(0.0, 0.0) if first else predicted[label] for label in labels]
        assert foretold == pytest.approx(
            np.array([beta_law(memory, level + x, v, noise_var) for x, v in states]), abs=1e-10
        )
        mine = {label: rewards.numpy()[prompts == label] for label in labels}
        unit = given.mean() if first else memory.unit
        noise = {label: noise_var / (given[prompts == label] / unit) for label in labels}  # R / w of every reward
        means = {label: np.average(mine[label], weights=1 / noise[label]) for label in labels}
        total = noise_var + init_var
        weights = {x: total / (predicted[x][1] + 1 / (1 / noise[x]).sum()) for x in labels}
        gains = {x: means[x] - predicted[x][0] - level for x in labels}
        weight = weight * FORGET ** (step - last)

        def level_from(groups, level=level, weight=weight, weights=weights, gains=gains):
            return level + sum(weights[x] * gains[x] for x in groups) / (weight + sum(weights[x] for x in groups))

        after = level_from(labels)
        for g, label in enumerate(labels):
            own, seen = level_from([x for x in labels if x != label]), prompts_seen[label]
            earlier, visit = list(seen.rewards), len(seen.steps) - 1
            for i in range(len(mine[label])) if not first else ():
                others = np.delete(mine[label], i)
                quiet = np.delete(noise[label], i)
                seen.rewards = earlier + [(visit, r - own, n) for r, n in zip(others, quiet, strict=True)]
                mean, var = seen.state()
                assert estimate.rewards[g, i] == mine[label][i]
                assert estimate.baseline[g, i].item() == pytest.approx(own + mean, abs=1e-10)
                assert estimate.baseline_var[g, i].item() == pytest.approx(var, abs=1e-10)
            seen.rewards = earlier + [(visit, r - own, n) for r, n in zip(mine[label], noise[label], strict=True)]
            mean, var = seen.state()
            seen.moved.append(own - after)
            state = after_it.recall(np.array([label]), step)
            assert state.known.item()
            assert after_it.level + state.deviation.item() == pytest.approx(own + mean, abs=1e-10)
            assert state.var.item() == pytest.approx(var, abs=1e-10)
        memory, level, weight, last = after_it, after, weight + sum(weights.values()), step
        assert memory.level == pytest.approx(level, abs=1e-10)


def test_first_step_is_krpo_adaptive():
    for _, prompts, rewards in visits(0, steps=1):
        (estimate, _), adaptive = krpo_memory(rewards, prompts, PromptMemory()), krpo_adaptive(rewards, prompts)
        assert torch.equal(estimate.advantages(), adaptive.advantages())


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(0, 6), st.sampled_from([AUTO, 1e-3]))
def test_no_reward_enters_its_own_baseline_nor_its_group_the_prior(seed, before, memory_var):
    options = MemoryConfig(memory_var=memory_var)
    memory = trained(seed, memory_var, steps=before)
    rng = np.random.default_rng(seed + 1)
    prompts = np.repeat(np.arange(5, 10), rng.integers(1, 4, size=5))
    rewards = torch.from_numpy(rng.normal(size=len(prompts)))
    one, _ = krpo_memory(rewards, prompts, memory, options, step=before + 2)
    changed = rewards.clone()
    row = int(rng.integers(len(rewards)))
    changed[row] += rng.normal(0, 10)
    other, _ = krpo_memory(changed, prompts, memory, options, step=before + 2)
    for field in ("baseline", "baseline_var"):
        mine, theirs = (x.groups.scatter(getattr(x, field))[row] for x in (one, other))
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)
    group = list(one.groups.labels).index(prompts[row])
    for mine, theirs in zip(*(x.model.columns(5, rewards.device) for x in (one, other)), strict=True):
        mine, theirs = mine[group], theirs[group]
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-9)


def test_baseline_errs_less_than_krpo_adaptive_on_prompts_that_recur():
    rng = np.random.default_rng(5)
    chance, memory, squares = rng.beta(1, 1, 16), PromptMemory(), []
    for step in range(1, 41):
        prompts = np.repeat(rng.permutation(16)[:8], 2)
        rewards = torch.from_numpy((rng.random(16) < chance[prompts]).astype(float))
        estimate, memory = krpo_memory(rewards, prompts, memory, step=step)
        expected = torch.from_numpy(chance[estimate.groups.labels])[:, None]
        adaptive = krpo_adaptive(rewards, prompts)
        squares.append([(x.baseline - expected).square().mean().item() for x in (estimate, adaptive)])
    mine, theirs = np.mean(squares[10:], axis=0)
    assert mine < 0.4 * theirs


def test_one_response_a_prompt():
    rng = np.random.default_rng(1)
    chance, memory = np.linspace(0, 1, 16), PromptMemory()
    for step in range(1, 61):
        prompts = rng.permutation(16)[:8]
        rewards = torch.from_numpy((rng.random(8) < chance[prompts]).astype(float))
        estimate, memory = krpo_memory(rewards, prompts, memory, step=step)
    state = memory.recall(np.arange(16), 60)
    assert np.corrcoef(state.deviation, chance)[0, 1] > 0.9
    assert estimate.advantages().abs().min() > 0


def test_a_prompt_whose_state_changes_wholly_at_every_visit_is_a_new_one():
    """memory_var above P0: then only the level and R are remembered."""
    *_, (step, prompts, rewards) = visits(3, steps=8)
    memory = trained(3, 10.0, steps=step - 1)
    known, _ = krpo_memory(rewards, prompts, memory, MemoryConfig(memory_var=10.0), step=step)
    new, _ = krpo_memory(rewards, prompts + 100, memory, MemoryConfig(memory_var=10.0), step=step)
    assert torch.allclose(known.advantages(), new.advantages(), atol=1e-12)


@pytest.mark.parametrize("reward", [0.0, 0.1, 1.0, -3.7])
def test_equal_rewards_have_no_advantage(reward):
    memory = PromptMemory()
    for step, prompts, rewards in visits(0):
        estimate, memory = krpo_memory(torch.full_like(rewards, reward), prompts, memory, step=step)
        assert torch.equal(estimate.advantages(), torch.zeros(len(rewards), dtype=torch.float64))
    assert memory.level == reward


@pytest.mark.parametrize("groups", [1, 2])
def test_few_groups_a_step_are_rloo(groups):
    memory = PromptMemory()
    for step in range(1, 4):
        rewards = torch.tensor([0.0, 1.0, 1.0] * groups, dtype=torch.float64)
        prompts = np.repeat(np.arange(groups), 3)
        estimate, memory = krpo_memory(rewards, prompts, memory, step=step)
        if groups == 1 or step == 1:
            assert torch.allclose(estimate.baseline[0], torch.tensor([1.0, 0.5, 0.5], dtype=torch.float64))
        assert estimate.advantages().isfinite().all()
    assert len(memory) == (0 if groups == 1 else 2)


def test_order_of_rows_does_not_matter():
    memory = trained(2)
    *_, (step, prompts, rewards) = visits(2)
    order = np.random.default_rng(0).permutation(len(prompts))
    one, after_one = krpo_memory(rewards, prompts, memory, step=step)
    other, after_other = krpo_memory(rewards[order], prompts[order], memory, step=step)
    assert torch.allclose(one.advantages()[order], other.advantages(), atol=1e-12)
    assert np.allclose(after_one.deviation, after_other.deviation, atol=1e-12)


def test_a_step_changes_no_memory_but_the_one_it_returns(tmp_path):
    memory = trained(4, steps=6)
    memory.save(tmp_path / "before.npz")
    krpo_memory(torch.tensor([0.0, 1.0, 1.0]), np.array([0, 1, 99]), memory, step=20)
    before = PromptMemory.load(tmp_path / "before.npz")
    for name, value in vars(memory).items():
        assert np.array_equal(value, getattr(before, name))


def test_saved_and_loaded_to_the_bit(tmp_path):
    memory = trained(6)
    memory.save(tmp_path / "memory.npz")
    loaded = PromptMemory.load(tmp_path / "memory.npz")
    assert len(loaded) == len(memory) == 7
    for name, value in vars(memory).items():
        assert type(getattr(loaded, name)) is type(value)
        assert np.array_equal(getattr(loaded, name), value)
    rewards, prompts = torch.tensor([0.0, 1.0, 1.0, 0.0]), ["a", "b", "b", "c"]
    one, other = (krpo_memory(rewards, prompts, m, step=30)[0].advantages() for m in (memory, loaded))
    assert torch.equal(one, other)


def test_the_range_of_rewards_is_remembered():
    memory = PromptMemory()
    for rewards in ([0.0, 0.5], [0.25, 2.0], [-1.0, 0.0]):
        _, memory = krpo_memory(torch.tensor(rewards), ["a", "a"], memory)
    assert (memory.lowest, memory.highest) == (-1.0, 2.0)
    uneven = torch.tensor([3.0, 3.0, 3.0])  # beyond a group's size there is no reward of 0
    _, memory = krpo_memory(uneven, ["a", "a", "b"], PromptMemory())
    assert (memory.lowest, memory.highest) == (3.0, 3.0)


def test_loading_another_archive_is_an_error(tmp_path):
    np.savez(tmp_path / "other.npz", weights=np.zeros(3))
    with pytest.raises(ValueError, match="other.npz holds .*weights"):
        PromptMemory.load(tmp_path / "other.npz")


def test_steps_go_forward():
    with pytest.raises(ValueError, match="observed step 12: it cannot go back to step 3"):
        krpo_memory(torch.tensor([0.0, 1.0]), ["a", "b"], replace(PromptMemory(), step=12), step=3)


def test_a_step_of_several_batches():
    """Nothing is forgotten between two batches of one step, and a prompt in both has age 0."""
    memory = trained(1, steps=5)
    for _ in range(2):
        _, memory = krpo_memory(torch.tensor([0.0, 1.0, 1.0]), [1, 1, 2], memory, step=9)
    assert memory.recall(np.array([1]), 9).age.item() == 0


def test_prompt_ids_of_any_kind_are_one_by_their_text():
    _, memory = krpo_memory(torch.tensor([0.0, 1.0, 0.5]), ["7", "8", "9"], PromptMemory())
    state = memory.recall(np.array([8, 11]), 5)
    assert state.known.tolist() == [True, False]
    assert state.age.tolist() == [4, 0]


def test_an_empty_batch_leaves_the_memory_as_it_is():
    memory = trained(0, steps=3)
    none = torch.zeros(2, dtype=torch.bool)
    assert krpo_memory(torch.zeros(2), ["a", "b"], memory, step=5, counted=none)[1] is memory


def test_a_million_prompts_take_little_memory():
    memory = PromptMemory().store(
        np.arange(10**5), 1, torch.zeros(10**5, dtype=torch.float64), torch.ones(10**5, dtype=torch.float64)
    )
    assert len(memory) == 10**5
    assert 10 * sum(value.nbytes for value in vars(memory).values() if isinstance(value, np.ndarray)) < 40e6


def test_noise_is_learned():
    """R, P0 and Q of a simulated run, to the accuracy that ten steps of 64 groups allow."""
    rng = np.random.default_rng(0)
    spread, drift, noise = 0.5, 0.05, 1.0
    d, memory = rng.normal(0, spread, 128), PromptMemory()
    for step in range(1, 81):
        d = np.sqrt(1 - drift**2 / spread**2) * d + drift * rng.normal(size=128)
        prompts = np.repeat(rng.permutation(128)[:64], 4)
        rewards = torch.from_numpy(2.0 + d[prompts] + noise * rng.normal(size=256))
        _, memory = krpo_memory(rewards, prompts, memory, step=step)
    learned = memory.model()
    assert learned.measurement_var == pytest.approx(noise**2, rel=0.15)
    assert learned.init_var == pytest.approx(spread**2, rel=0.4)
    assert 0.2 < learned.process_var / drift**2 < 5
    assert memory.level == pytest.approx(2.0, abs=0.3)
