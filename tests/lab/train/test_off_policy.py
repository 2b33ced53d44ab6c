"""Policy losses with many updates a batch, on long answers, in small."""

import random

import pytest
import torch

from verl_krpo import tiny_model
from verl_krpo.lab.train import conditions, loop, losses, tasks
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


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_rows_without_advantage_only_count(mode):
    generator = torch.Generator().manual_seed(0)
    log_prob, mask = torch.randn(4, 3, generator=generator), torch.arange(3) < torch.tensor([3, 1, 2, 3])[:, None]
    advantages = torch.tensor([[1.0], [0.0], [-2.0], [0.0]])
    kept = torch.tensor([0, 2])
    found = losses.reinforce(log_prob[kept], advantages[kept], mask[kept], mask, mode)
    torch.testing.assert_close(found, losses.reinforce(log_prob, advantages, mask, mask, mode))


def test_a_run_learns_and_is_repeatable(models, monkeypatch):
    condition = Condition("small", 8, 4, "digits_32", learning_rate=1e-3, steps=4, every=2, updates=4, clip=1.0)
    monkeypatch.setitem(conditions.CONDITIONS, "small", condition)
    runs = [loop.run(models, "small", method, 1) for method in ("reinforce", "reinforce", "kpo")]
    assert runs[0]["curve"] == runs[1]["curve"] and len(runs[0]["curve"].split()) == 3
    assert runs[0]["entropy"].split()[0] == runs[2]["entropy"].split()[0] and runs[2]["ratio_std"] > 0
