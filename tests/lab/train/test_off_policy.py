"""Policy losses with many updates a batch, on long answers, in small."""

import math
import random

import pytest
import torch

from verl_krpo import tiny_model
from verl_krpo.lab.train import clipped, conditions, loop, losses, rounds, tasks
from verl_krpo.lab.train.conditions import Condition
from verl_krpo.lab.train.losses import LOSSES


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A tiny model that has seen a few answers of 32 digits."""
    path = tmp_path_factory.mktemp("models")
    task = tasks.TASKS["digits_32"]
    tasks.warm_start(path / task.folder, task.build.keywords["demonstrations"], steps=60, batch_size=32)
    return path


def test_only_the_whole_answer_is_right():
    reward = tasks.TASKS["digits_32"].reward
    assert [reward(text, "569") for text in ("569", "56", "579", "5699", "")] == [1, 0, 0, 0, 0]


def test_answers_are_the_digits_plus_one():
    tokenizer, task = tiny_model.tokenizer(), tasks.TASKS["digits_32"]
    for question, answer in task.draw(random.Random(0), 4, False):
        assert len(question) == 33 and question[-1] == "="
        assert answer == "".join(str((int(digit) + 1) % 10) for digit in question[:-1])
        response = tokenizer(task.response(answer))["input_ids"]
        assert len(response) == task.max_tokens - 1 and response[-1] == tokenizer.eos_token_id


def test_three_demonstrations_of_ten_are_right():
    demonstrations = tasks.TASKS["digits_32"].build.keywords["demonstrations"](random.Random(0), 2000)
    right = sum(shown == "".join(str((int(d) + 1) % 10) for d in question[:-1]) for question, shown in demonstrations)
    assert abs(right / 2000 - tasks.RIGHT_DIGITS) < 5 * (0.3 * 0.7 / 2000) ** 0.5


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_begins_as_reinforce(name):
    """On policy every ratio is 1: the gradient is the policy gradient, whatever the loss."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 5, generator=generator)
    advantages = torch.randn(6, 1, generator=generator)
    mask = torch.arange(5) < torch.tensor([5, 4, 3, 5, 2, 1])[:, None]
    log_prob, mode = old.clone().requires_grad_(), "seq-mean-token-mean"
    expected = torch.autograd.grad(losses.reinforce(log_prob, advantages, mask, mask, mode), log_prob)
    if loss := LOSSES[name]:
        found = torch.autograd.grad(losses.of_verl(loss, mode)(old, log_prob, advantages, mask), log_prob)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def off_policy(seed: int):
    """old_log_prob, log_prob, advantages and mask of 6 responses, some with holes; a certain token among them."""
    generator = torch.Generator().manual_seed(seed)
    old = -(torch.rand(6, 9, generator=generator) ** 4)
    old[0, 3] = 0.0
    log_prob = old + 0.3 * torch.randn(6, 9, generator=generator)
    mask = torch.rand(6, 9, generator=generator) < 0.8
    mask[:, 4] = True
    return old, log_prob.requires_grad_(), torch.randn(6, 1, generator=generator), mask


def by_hand(loss, weight, ratio, advantages, log_prob, mask):
    """Mean over rows of the mean over tokens of max(-A m ratio, -A m clip(ratio)), and its gradient, token by token.

    weight, ratio: numbers of a token, (rows, tokens). As in verl, a negative A bounds the ratio at 3.
    """
    value, gradient = 0.0, torch.zeros_like(log_prob)
    for row in range(len(mask)):
        for t in mask[row].nonzero()[:, 0].tolist():
            a, r = float(advantages[row, 0]) * weight[row][t], ratio[row][t]
            bounded = min(max(r, 1 - loss.low), 1 + loss.high)
            share = 1 / len(mask) / int(mask[row].sum())
            token = max(-a * r, -a * bounded)
            flat = token > -a * r or (a < 0 and r > 3)
            value += share * (min(token, -3 * a) if a < 0 else token)
            gradient[row, t] = 0.0 if flat else share * -a * r
    return value, gradient


@pytest.mark.parametrize("seed", range(5))
def test_minpro_by_hand(seed):
    loss, mode = LOSSES["minpro"], "seq-mean-token-mean"
    old, log_prob, advantages, mask = off_policy(seed)
    ratio, weight = (log_prob - old).detach().exp().tolist(), []
    for row, seen in zip(ratio, mask.tolist(), strict=True):
        before = [[row[s] for s in range(t) if seen[s]] for t in range(len(row))]
        weight.append([min(prefix, default=1.0) for prefix in before])
    value, gradient = by_hand(loss, weight, ratio, advantages, log_prob, mask)
    found = losses.of_verl(loss, mode)(old, log_prob, advantages, mask)
    torch.testing.assert_close(found.item(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, log_prob)[0], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["kpo_token", "kpo_token_Q0.001_clip0.004"])
@pytest.mark.parametrize("seed", range(5))
def test_a_filter_whose_noise_follows_the_token_by_hand(name, seed):
    loss, mode = LOSSES[name], "seq-mean-token-mean"
    old, log_prob, advantages, mask = off_policy(seed)
    z, ratio = (log_prob - old).tolist(), [[1.0] * mask.shape[1] for _ in mask]
    for row in range(len(mask)):
        x, variance = 0.0, 0.0
        for t in mask[row].nonzero()[:, 0].tolist():
            variance += 1e-3 if "Q0.001" in name else 1e-6
            noise = max(-math.expm1(float(old[row, t])), 1e-8) ** 2
            gain = variance / (variance + noise)
            x, variance = x + gain * (z[row][t] - x), (1 - gain) * variance
            ratio[row][t] = math.exp(x)
    value, gradient = by_hand(loss, [[1.0] * mask.shape[1]] * len(mask), ratio, advantages, log_prob, mask)
    found = losses.of_verl(loss, mode)(old, log_prob, advantages, mask)
    torch.testing.assert_close(found.item(), value, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(found, log_prob)[0], gradient, rtol=1e-4, atol=1e-6)


def test_noise_of_one_size_for_all_tokens_is_the_published_filter():
    """Tokens of old probability 1e-9: R_t is R, and the loss that of KPO."""
    _, log_prob, advantages, mask = off_policy(0)
    old, mode = torch.full_like(log_prob, math.log(1e-9)), "seq-mean-token-mean"
    log_prob = (old + log_prob.detach()).requires_grad_()
    both = [
        torch.autograd.grad(losses.of_verl(LOSSES[name], mode)(old, log_prob, advantages, mask), log_prob)[0]
        for name in ("kpo_token_Q0.001_clip0.004", "kpo_Q0.001_clip0.004")
    ]
    torch.testing.assert_close(*both, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_rows_without_advantage_only_count(mode):
    generator = torch.Generator().manual_seed(0)
    log_prob, mask = torch.randn(4, 3, generator=generator), torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    advantages = torch.tensor([[1.0], [0.0], [-2.0], [0.0]])
    kept = torch.tensor([0, 2])
    found = losses.reinforce(log_prob[kept], advantages[kept], mask[kept], mask, mode)
    torch.testing.assert_close(found, losses.reinforce(log_prob, advantages, mask, mask, mode))


@pytest.mark.parametrize("length", [256, 512, 1024])
def test_longer_answers_go_round_and_three_demonstrations_of_ten_would_be_right(length):
    task = tasks.TASKS[f"digits_{length}"]
    for question, answer in task.draw(random.Random(0), 4, False):
        assert len(question) == 8 and len(answer) == length == task.max_tokens
        digits = list(map(int, question + answer))
        assert all(digit == (before + 1) % 10 for before, digit in zip(digits[:-8], digits[8:], strict=True))
        assert task.reward(task.response(answer), answer) == 1 > task.reward(answer[:-1], answer)
    shown = [q + a for q, a in task.build.keywords["demonstrations"](random.Random(0), 3000)]
    wrong = sum(int(b) != (int(a) + 1) % 10 for text in shown for a, b in zip(text[:-8], text[8:], strict=True))
    expected = (1 - 0.3 ** (1 / length)) * 128 * len(shown)
    assert abs(wrong - expected) < 5 * expected**0.5


def test_a_model_of_rounds_sees_no_further_than_its_window():
    tokenizer, model = rounds.blank(0)
    tokens = torch.randint(10, (2, 60), generator=torch.Generator().manual_seed(0))
    other = tokens.clone()
    other[:, 20] = (other[:, 20] + 1) % 10
    assert tokenizer("0123456789")["input_ids"] == list(range(10))
    with torch.no_grad():
        moved = (model(tokens).logits - model(other).logits).abs().amax((0, 2)) > 0
    assert moved.nonzero()[:, 0].tolist() == list(range(20, 20 + rounds.WINDOW))


def test_stale_batches_are_sampled_by_an_earlier_model(models, monkeypatch):
    """With two steps between, the first three batches are the first model's."""
    sampled = []
    roll = loop.roll

    def recorded(first, model, *rest):
        sampled.append(next(model.parameters()).detach().clone())
        return roll(first, model, *rest)

    monkeypatch.setattr(loop, "roll", recorded)
    condition = Condition("small", 4, 2, "digits_32", steps=5, updates=2, stale=2)
    steps = loop.train(loop.start(models, "digits_32"), condition, "kpo", 0)
    made = [next(step.model.parameters()).detach().clone() for step in steps]
    first = next(loop.start(models, "digits_32").model.parameters()).detach()
    for found, expected in zip(sampled, [first, first, first, made[0], made[1]], strict=True):
        assert torch.equal(found, expected)


def test_clipped_tokens_are_those_beyond_the_range_on_the_side_that_the_advantage_pulls():
    old, log_prob, advantages, mask = off_policy(3)
    ratio = (log_prob - old).detach().exp()
    found = clipped.without_gradient("vanilla", old, log_prob, advantages, mask)
    beyond = torch.where(advantages > 0, ratio > 1.2, (ratio < 0.8) | (ratio > 3))
    assert torch.equal(found, mask & beyond) and found.any()


def test_stretches_of_a_run(models, monkeypatch):
    monkeypatch.setitem(
        conditions.CONDITIONS, "small", Condition("small", 8, 4, "digits_32", learning_rate=1e-3, steps=2, updates=4)
    )
    monkeypatch.setattr(clipped, "ENDS", (0, 16, 64))
    monkeypatch.setattr(clipped, "SHOWN", ("vanilla_tight", "kpo"))
    # The model has seen few answers, so that hardly one is right: every second one is rewarded.
    monkeypatch.setattr(
        loop, "scores", lambda first, responses, problems, size: torch.arange(8 * size).view(8, -1) % 2.0
    )
    moved, tight, kpo = clipped.of_run(models, "small")
    assert list(moved) == ["condition", "of", "1 to 16", "17 to 64"]
    assert moved["1 to 16"] > 0 and tight["1 to 16"] > 0.1 and kpo["1 to 16"] == 0


def test_a_run_learns_and_is_repeatable(models, monkeypatch):
    condition = Condition("small", 8, 4, "digits_32", learning_rate=1e-3, steps=4, every=2, updates=4, clip=1.0)
    monkeypatch.setitem(conditions.CONDITIONS, "small", condition)
    runs = [loop.run(models, "small", method, 1) for method in ("reinforce", "reinforce", "kpo")]
    assert runs[0]["curve"] == runs[1]["curve"] and len(runs[0]["curve"].split()) == 3
    assert runs[0]["entropy"].split()[0] == runs[2]["entropy"].split()[0] and runs[2]["ratio_std"] > 0
