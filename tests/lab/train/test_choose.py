"""Choosing prompts in the laboratory: what is taken, what it weighs, equal rollouts, and RLOO of uneven groups."""

import json
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_krpo import tiny_model
from verl_krpo.advantage.memory import PromptMemory, krpo_memory
from verl_krpo.lab.train import choose, loop
from verl_krpo.lab.train.tasks import mixed
from verl_krpo.replay.trackers import TRACKERS


def known(rights, step=1):
    """A memory and trackers of prompts that were seen `step` times with so many of four right."""
    trackers = {name: TRACKERS[name](len(rights)) for name in ("MoPPS", "SPO", "DPS")}
    memory, places, right = PromptMemory(), np.arange(len(rights)), np.array(rights)
    for k in range(1, step + 1):
        rewards = (np.arange(4) < right[:, None]).ravel().astype(np.float64)
        _, memory = krpo_memory(torch.from_numpy(rewards), places.repeat(4), memory, step=k)
        for tracker in trackers.values():
            tracker.update(places, k, right, np.full(len(rights), 4))
    return memory, trackers


@pytest.mark.parametrize("way", ["mopps", "dps", "signal", "both"])
def test_prompts_that_are_sometimes_right_are_taken(way):
    rights = [0, 4] * 24 + [2] * 16
    memory, trackers = known(rights, step=8)
    asked = choose.decide(way, np.arange(64), memory, trackers, 9, np.random.default_rng(0))
    assert len(set(asked.chosen)) == choose.PROMPTS and asked.counts.sum() == choose.PROMPTS * choose.SIZE
    assert np.mean(asked.chosen >= 48) > 0.9  # a quarter of the candidates


@pytest.mark.parametrize("way", ["uniform", "allocate"])
def test_uniform_and_allocate_take_what_comes_next(way):
    memory, trackers = known([0, 2] * 8, step=8)
    asked = choose.decide(way, np.arange(16), memory, trackers, 9, np.random.default_rng(0))
    np.testing.assert_array_equal(asked.chosen, np.arange(16))
    np.testing.assert_allclose(asked.weights * asked.counts, choose.SIZE)
    assert asked.counts.sum() == 64 and (asked.counts[1::2] > asked.counts[::2]).all() == (way == "allocate")


def test_rloo_of_uneven_groups():
    rewards, owner = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 5.0]).double(), np.array([0, 0, 0, 1, 1, 2])
    expected = [1 - 0, 0 - 0.5, 0 - 0.5, 0, 0, 0]
    np.testing.assert_allclose(choose.rloo(rewards, owner), expected)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A model that is asked operations and knows nothing."""
    path = tmp_path_factory.mktemp("models")
    tokenizer = tiny_model.tokenizer()
    tiny_model.untrained(len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id, 0).save_pretrained(
        path / "mixed"
    )
    tokenizer.save_pretrained(path / "mixed")
    return path


def test_responses_belong_to_their_prompts_however_many_each_has(models):
    first, pool = loop.start(models, "mixed"), mixed(random.Random(0), 3)
    asked = choose.Step(np.array([2, 0]), np.array([3, 1]), np.ones(2))
    rolled = choose.roll(first, first.model, pool, asked, torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(rolled.owner, [0, 0, 0, 1])
    with torch.no_grad():
        again = loop.log_probs(first.model, rolled.prompts, rolled.sampled.tokens, torch.tensor([0, 0, 0, 1]))
    mask = rolled.sampled.mask
    torch.testing.assert_close(again[mask], rolled.sampled.log_probs[mask], rtol=1e-4, atol=1e-4)
    kept = rolled.of(np.array([1]))
    assert len(kept.rewards) == 1 and kept.places.tolist() == [0]
    torch.testing.assert_close(kept.sampled.tokens[0], rolled.sampled.tokens[3])


@pytest.mark.parametrize("method", ["uniform_rloo", "dapo_memory", "oracle_memory", "both_memory_score"])
def test_a_run_takes_its_rollouts_and_repeats_itself(models, monkeypatch, tmp_path, method):
    for name, value in (("STEPS", 4), ("EVERY", 1), ("POOL", 64), ("PROMPTS", 4), ("ROUNDS", 2)):
        monkeypatch.setattr(choose, name, value)
    first = loop.start(models, "mixed")
    by_length = replace(first.task, reward=lambda text, answer: float(len(text) % 2))  # the model knows no sums
    monkeypatch.setattr(loop, "start", lambda models, task: first._replace(task=by_length))
    row = choose.run(models, "dead_30", method, 0)
    looks, per_step = row["curve"].split(), 4 * choose.SIZE
    assert len(looks) == len(row["transfer"].split()) == 5 and row["rollouts"] == per_step
    assert row["steps"] == 4 if method != "dapo_memory" else row["steps"] <= 4
    again = choose.run(models, "dead_30", method, 0, tmp_path / "visits")
    assert {**row, "seconds": 0} == {**again, "seconds": 0}
    (log,) = (tmp_path / "visits").iterdir()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert {line["step"] for line in lines} == set(range(1, row["steps"] + 1))
    assert method == "dapo_memory" or sum(len(line["rewards"]) for line in lines) == 4 * per_step


@pytest.mark.parametrize("measure", ["curve", "transfer"])
def test_the_page_says_what_the_runs_say(measure, tmp_path):
    docs = Path(__file__).parents[3] / "docs"
    shutil.copy(docs / "results/choice/runs.csv", tmp_path)
    told = "results/choice/choice.md" if measure == "curve" else f"results/choice/{measure}/choice.md"
    assert choose.show(tmp_path / "runs.csv", measure) + "\n" == (docs / told).read_text()
    assert f'\n--8<-- "docs/{told}"\n' in (docs / "laboratory.md").read_text()
