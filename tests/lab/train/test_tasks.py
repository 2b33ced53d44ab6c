"""What is asked and what is right, and rivals by hand."""

import random

import pytest
import torch

from verl_krpo.lab.train import tasks
from verl_krpo.lab.train.methods import METHODS, Batch
from verl_krpo.lab.train.tasks import GYM, TASKS


@pytest.mark.parametrize("name", ["sharpen", "learn"])
def test_right_sums_are_rewarded_in_full_and_held_out_ones_never_shown(name):
    task = TASKS[name]
    held_out, seen = task.draw(random.Random(0), 50, True), task.draw(random.Random(0), 500, False)
    assert not {problem.question for problem in held_out} & {problem.question for problem in seen}
    for question, answer in held_out:
        assert sum(map(int, question.strip().removesuffix("=").split("+"))) == int(answer)
        assert task.reward(task.response(answer), answer) == 1 > task.reward(answer, answer)


def test_demonstrations_to_learn_from_are_right():
    for question, shown in TASKS["learn"].build.keywords["demonstrations"](random.Random(1), 20):
        assert shown == f"<answer>{sum(map(int, question.strip().removesuffix('=').split('+')))}</answer>"


def by_hand(question):
    a, b = int(question[:2]), int(question[3:5])
    return {"+": a + b, "-": a - b, "*": a * b % 100}[question[2]]


def test_the_mixed_pool_is_right_and_its_demonstrations_are_as_careless_as_said():
    task, shown = TASKS["mixed"], TASKS["mixed"].build.keywords["demonstrations"](random.Random(1), 6000)
    signs = {problem.question[2] for problem in task.draw(random.Random(0), 50, True)}
    assert signs == set(tasks.OPERATIONS)
    for sign, operation in tasks.OPERATIONS.items():
        own = [(question, response) for question, response in shown if question[2] == sign]
        assert len(own) / len(shown) == pytest.approx(operation.shown / 10, abs=0.03)
        right = [int(response.strip("?")) == by_hand(question) and "?" not in response for question, response in own]
        assert sum(right) / len(own) == pytest.approx(operation.right, abs=0.06)


@pytest.mark.parametrize(
    ("held_out", "ends"),
    [
        ([("1=", "2"), ("3=", "4"), ("5=", "6"), ("7=", "8")], True),  # the first two are shown
        ([("1=", "2"), ("9=", "2"), ("5=", "6"), ("7=", "8")], False),  # the most frequent answer alone is no knowledge
    ],
)
def test_a_warm_start_ends_when_enough_is_learned(tmp_path, held_out, ends):
    batches = []

    def demonstrations(rng, count):
        batches.append(count)
        return [("1=", "2"), ("3=", "4")] if ends else [("1=", "2"), ("9=", "2")]

    tasks.warm_start(tmp_path / "model", demonstrations, steps=80, held_out=lambda: held_out)
    assert (len(batches) < 80) == ends and (tmp_path / "model" / "config.json").exists()
    tasks.warm_start(tmp_path / "model", demonstrations, steps=80)  # it is there
    assert len(batches) <= 80


def filtered(asked):
    order, _, shown = asked.partition(":")
    passes = (float.__gt__ if (order[0] == "k") == (order[1] == "l") else float.__lt__, float(order[2:]))
    return ",".join(
        n for n in shown.split(",") if passes[0](float(n), passes[1]) or order[0] == "r" and float(n) == passes[1]
    )


RIGHT = {
    "chain_sum": lambda asked: str(eval(asked)),
    "number_filtering": filtered,
    "number_sorting": lambda asked: ",".join(sorted(asked[2:].split(","), key=int, reverse=asked[0] == "d")),
    "count_bits": lambda asked: str(int(asked).bit_count()),
    "spell_backward": lambda asked: asked[::-1],
}


@pytest.mark.parametrize("name", GYM)
def test_exercises_are_right_and_held_out_ones_never_shown(name):
    pytest.importorskip("reasoning_gym", reason="pip install verl-krpo[bench]")
    task = TASKS[name]
    held_out, seen = task.draw(random.Random(0), 20, True), tasks.gym_problems(name)[0]
    assert not set(held_out) & set(seen) and len(seen) > 500
    assert len({len(question.encode()) for question, _ in held_out + seen}) == 1  # a token a byte
    for question, answer in held_out:
        assert task.reward(answer, answer) == 1 and len(answer) + 1 < task.max_tokens
        if name in RIGHT:
            assert RIGHT[name](question.strip().removesuffix("=")) == answer


def batch(rewards, lengths, log_probs=-1.0):
    """Rewards (prompts, size) of responses of these lengths, with one log-prob for all tokens."""
    rewards, lengths = torch.tensor(rewards, dtype=torch.float64), torch.tensor(lengths)
    mask = torch.arange(lengths.max()) < lengths.view(-1, 1)
    log_probs = torch.full(mask.shape, log_probs)
    keys, none = [str(k) for k in range(len(rewards))], torch.zeros(len(rewards), 1)
    return Batch(rewards, keys, 0, none, none, mask.long(), mask, log_probs, (2 * log_probs).exp())


def test_opo_weighs_by_length_in_the_group():
    found = METHODS["opo"](batch([[1, 0], [1, 1]], [[1, 3], [2, 2]]))
    expected = torch.tensor([[1 - 0.25, -0.25], [0, 0]])[..., None].expand(2, 2, 3)
    for advantage, wanted, length in zip(found.flatten(0, 1), expected.flatten(0, 1), (1, 3, 2, 2), strict=True):
        assert advantage[:length].tolist() == pytest.approx(wanted[:length].tolist(), abs=1e-6)


def test_otb_weighs_by_the_score_up_to_the_token():
    """Of equal weights a token: at token t the rewards of the responses that last so long weigh alike, as all w do."""
    found = METHODS["otb"](batch([[1, 0]], [[2, 2]]))
    assert found.flatten().tolist() == pytest.approx([0.5, 0.5, -0.5, -0.5], abs=1e-6)


def test_a_discounted_beta_by_hand():
    method = METHODS["dbb"].make()
    first = batch([[1, 0], [1, 1]], [[1, 1], [1, 1]])
    p = torch.tensor([[1.5 / 3], [2.5 / 3]])  # prior 1 and 1, half of it kept
    torch.testing.assert_close(method(first), (first.rewards - p) / (p * (1 - p)).sqrt())
    p = torch.tensor([[(0.75 + 1) / 3.5], [(1.25 + 2) / 3.5]])
    torch.testing.assert_close(method(first), (first.rewards - p) / (p * (1 - p)).sqrt())


def test_without_a_baseline_the_advantage_is_the_reward():
    rewards = [[1.0, 0.0], [0.5, 0.01]]
    assert METHODS["none"](batch(rewards, [[1, 1], [1, 1]])).tolist() == rewards
