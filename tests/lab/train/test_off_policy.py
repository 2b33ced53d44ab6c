"""The laboratory of the policy losses in small."""

import pytest
import torch

from verl_krpo.lab.train import off_policy
from verl_krpo.lab.train.off_policy import METHODS, Condition


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that has seen a few answers of three digits."""
    path = tmp_path_factory.mktemp("off_policy") / "model"
    off_policy.build(path, 3, steps=60, batch_size=32)
    return path


def test_only_the_whole_answer_is_right():
    answers = torch.tensor([[5, 6, 9]] * 4)
    responses = torch.tensor([[5, 6, 9, 1], [5, 6, 1, 9], [5, 7, 9, 0], [5, 6, 9, 9]])
    assert off_policy.rewards(responses, answers).tolist() == [1, 0, 0, 1]
    assert not off_policy.rewards(responses[:, :2], answers).any()


def test_answers_are_the_digits_plus_one():
    from verl_krpo import tiny_model

    tokenizer = tiny_model.tokenizer()
    prompts, answers = off_policy.questions(tokenizer, 4, 5, torch.Generator().manual_seed(0))
    for prompt, answer in zip(tokenizer.batch_decode(prompts), tokenizer.batch_decode(answers), strict=True):
        shown, equals = prompt[:-1], prompt[-1]
        assert equals == "=" and answer == "".join(str((int(d) + 1) % 10) for d in shown) + tokenizer.eos_token


@pytest.mark.parametrize("name", METHODS)
def test_every_loss_begins_as_reinforce(name):
    """On policy every ratio is 1: the gradient is the policy gradient, whatever the loss."""
    generator = torch.Generator().manual_seed(0)
    old = -torch.rand(6, 5, generator=generator)
    advantages = torch.randn(6, 1, generator=generator).expand(6, 5)
    mask = (torch.arange(5) < torch.tensor([5, 4, 3, 5, 2, 1])[:, None]).float()
    gradients = []
    for loss in (METHODS["reinforce"], METHODS[name]):
        log_prob = old.clone().requires_grad_()
        total, _ = off_policy.objective(loss)(old, log_prob, advantages, mask)
        gradients += torch.autograd.grad(total, log_prob)
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-7)


def test_a_run_learns_and_is_repeatable(model, monkeypatch):
    condition = Condition("small", length=3, learning_rate=1e-3, steps=4, updates=4, prompts=8, size=4, every=2)
    monkeypatch.setitem(off_policy.CONDITIONS, "small", condition)
    runs = [off_policy.run(model, "small", method, 1) for method in ("reinforce", "reinforce", "kpo")]
    assert runs[0]["curve"] == runs[1]["curve"] and len(runs[0]["curve"].split()) == 3
    assert runs[0]["curve"].split()[0] == runs[2]["curve"].split()[0] and runs[2]["ratio_std"] > 0
