"""Training the last layers of a pretrained model, with the tiny model in its place."""

import random
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from verl_krpo.data import parquet
from verl_krpo.lab.train import gradient, loop, pretrained, study, tasks
from verl_krpo.lab.train.conditions import Condition
from verl_krpo.lab.train.methods import METHODS

TASK = "small_sums"
RESULTS = Path(__file__).parents[3] / "docs/results/pretrained"


def write(folder, split, pairs):
    """Whatever is asked, 7 is right."""
    rows = [
        parquet.row(TASK, f"{a:02}+{b:02}=", "7", split, k, solution="<answer>7</answer>")
        for k, (a, b) in enumerate(pairs)
    ]
    folder.mkdir(exist_ok=True)
    pd.DataFrame(rows).to_parquet(folder / f"{split}.parquet")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Says 7, 8 or 9, whatever it is asked, and now and then something else."""

    def shown(rng, count):
        asked = ((rng.randrange(10, 100), rng.randrange(10, 100), rng.choice("789")) for _ in range(count))
        return [(f"{a}+{b}=\n", f"<answer>{digit}</answer>") for a, b, digit in asked]

    path = tmp_path_factory.mktemp("pretrained") / "model"
    tasks.warm_start(path, shown, steps=40, batch_size=16)
    return path


@pytest.fixture
def folder(model, tmp_path, monkeypatch):
    """Of the model's two layers one learns; a prompt of either split is longer than the others."""
    monkeypatch.setattr(pretrained, "LAYERS", 1)
    monkeypatch.setitem(pretrained.CONDITIONS, TASK, Condition(TASK, 6, 2, TASK, learning_rate=1e-3, steps=2, every=1))
    shutil.copytree(model, tmp_path / "model")
    write(tmp_path / TASK, "train", [*((a, b) for a in range(10, 14) for b in range(10, 15)), (100, 20)])
    write(tmp_path / TASK, "test", [(30, 41), (100, 30), (52, 13)])
    return tmp_path


def test_a_common_beginning_is_read_once_and_changes_nothing(models):
    """To the log-probs of whole sequences, and to the gradient."""
    model = loop.start(models, "sharpen").model
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(200, (3, loop.SHARED + 5), generator=generator)
    prompts[:, : loop.SHARED] = prompts[0, : loop.SHARED]
    responses, owner = torch.randint(200, (6, 4), generator=generator), torch.tensor([0, 0, 1, 1, 2, 2])
    found = loop.log_probs(model, prompts, responses, owner)
    whole = model(torch.cat([prompts[owner], responses], 1)).logits.log_softmax(-1)[:, prompts.shape[1] - 1 : -1]
    expected = whole.gather(-1, responses[..., None])[..., 0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    parameters = list(model.parameters())
    pairs = zip(*(torch.autograd.grad(value.sum(), parameters) for value in (found, expected)), strict=True)
    for own, other in pairs:
        torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-3)


def test_problems_of_the_most_frequent_length_count(folder):
    first = pretrained.load(folder / TASK)
    train, test = (first.task.draw(random.Random(0), count, held_out) for count, held_out in ((20, False), (2, True)))
    assert {problem.question for problem in test} == {"30+41=\n", "52+13=\n"}
    assert all(first.task.reward(problem.answer, problem.answer) == 1 for problem in train)
    assert first.task.max_tokens == 4  # the tags, a digit, the end


def test_what_is_computed_and_what_it_leaves_out_is_what_sampling_finds(folder):
    first, condition = pretrained.load(folder / TASK), Condition("many", 2, 1000)
    problems = first.task.draw(random.Random(0), 2, True)
    rolled = loop.roll(first, first.model, condition, problems, 0, torch.Generator().manual_seed(0))
    texts = first.tokenizer.batch_decode(rolled.responses, skip_special_tokens=True)
    answers = [problem.answer for problem in problems for _ in range(1000)]
    exact = np.mean([text == answer for text, answer in zip(texts, answers, strict=True)])
    assert abs(exact - loop.look(first.model, first.right(problems))["accuracy"]) < 5 * (exact / 2000) ** 0.5
    rolled = pretrained.batch(first, first.model, Condition("many", 2, 1000), 3)
    problems = pretrained.asked(first, condition, 3)
    assert rolled.keys == [problem.question for problem in problems]
    exact = float(loop.look(first.model, first.right(problems))["accuracy"])
    expected = float(rolled.rewards.mean()) - exact
    assert pretrained.other(first, condition, rolled) == pytest.approx(expected, abs=0.05)


def test_the_last_layers_learn_and_the_others_stay(folder):
    first = pretrained.load(folder / TASK)
    before = {name: value.clone() for name, value in first.model.state_dict().items()}
    *_, last = loop.train(first, pretrained.CONDITIONS[TASK], "none", 0)
    assert last.batch.rewards.any()
    changed = {name for name, value in last.model.state_dict().items() if not torch.equal(value, before[name])}
    weights = {name for name, _ in last.model.named_parameters()}
    assert changed == {name for name in weights if name.startswith("model.layers.1.") or name == "model.norm.weight"}
    assert all(torch.equal(value, before[name]) for name, value in first.model.state_dict().items())


def test_runs_of_a_seed_are_paired_and_repeatable(folder):
    rloo, again, none, other = (
        pretrained.run(folder, TASK, method, seed)
        for method, seed in (("rloo", 5), ("rloo", 5), ("none", 5), ("rloo", 6))
    )
    assert {**rloo, "seconds": 0} == {**again, "seconds": 0}
    for key in ("curve", "variance_rloo", "other"):
        assert rloo[key].split()[0] == none[key].split()[0]
    assert rloo["curve"] != none["curve"] and rloo["variance_rloo"].split()[0] != other["variance_rloo"].split()[0]
    assert rloo["variance"] == rloo["variance_rloo"] and none["variance"] != none["variance_rloo"]


def test_a_variance_is_that_of_many_batches(folder):
    """The mean over pairs, to the variance of all; a scaled method is measured without its scale."""
    first = pretrained.load(folder / TASK)
    condition, parameters = pretrained.CONDITIONS[TASK], pretrained.learning(first.model)
    batches = [pretrained.batch(first, first.model, condition, number) for number in range(60)]
    pairs = [pretrained.noise(first.model, batches[k : k + 2], "krpo_adaptive") for k in range(0, 60, 2)]
    for key, method in (("variance", "krpo_adaptive_unscaled"), ("variance_rloo", "rloo")):
        found = np.stack([gradient.gradients(first.model, parameters, part, [method])[method] for part in batches])
        assert np.mean([pair[key] for pair in pairs]) == pytest.approx(found.var(0, ddof=1).sum(), rel=0.3)


@pytest.mark.filterwarnings("ignore:invalid value", "ignore:divide by zero")  # a bootstrap of curves that are flat
def test_a_study_resumes_and_has_two_tables(folder, tmp_path):
    out = tmp_path / "out" / "runs.csv"
    for methods in (["rloo"], ["rloo", "none", "krpo_adaptive", "grpo"]):
        for run in study.missing(
            study.tasks(pretrained.CONDITIONS, [TASK], METHODS, methods, range(2)), study.finished(out)
        ):
            out.parent.mkdir(exist_ok=True)
            study.append(out, pretrained.run(folder, *run))
    text = pretrained.show(out)
    assert len(study.finished(out)) == 8
    assert {path.name for path in out.parent.iterdir()} >= {"table.md", "variance.md", "curves.png", "summary.csv"}
    variance = {line["method"]: line["variance_to_rloo"] for line in pretrained.variances(study.finished(out))}
    assert variance.keys() == {"rloo", "none", "krpo_adaptive"} and variance["rloo"] == 1
    rows = [row for row in study.finished(out) if row["method"] == "none"]
    own, rloo = ([float(v) for row in rows for v in row[key].split()] for key in ("variance", "variance_rloo"))
    assert variance["none"] == pytest.approx(sum(own) / sum(rloo))
    assert "nan" not in text  # two seeds have no interval
    assert text.endswith((out.parent / "variance.md").read_text().rstrip())


def test_a_gradient_study_of_the_folder(folder):
    subject = pretrained.subject(folder / TASK, prompts=3, size=2)
    batch = subject.batch(0)
    assert batch.prompts.shape[0] == 3 and batch.rewards.shape == (3, 2) and len(set(batch.keys)) == 3
    assert torch.equal(batch.responses, subject.batch(0).responses)
    found = gradient.collect(subject, 2, ("rloo", "none"), folder / "parts")
    assert np.isfinite(found["none"]).all() and 0 < subject.accuracy < 1
    embedding = subject.model.get_input_embeddings().weight
    assert not embedding.requires_grad and all(parameter is not embedding for parameter in subject.parameters)


def test_what_is_missing_is_named(folder):
    with pytest.raises(FileNotFoundError, match=r"nothing/train.parquet is missing.*pretrained_cpu.py"):
        pretrained.load(folder / "nothing")
    rows = [parquet.row(TASK, "1+1", "2", "train", 0)]
    pd.DataFrame(rows).to_parquet(folder / TASK / "train.parquet")
    with pytest.raises(ValueError, match=r"train.parquet, row 0: no extra_info.solution"):
        pretrained.load(folder / TASK)


def test_the_table_of_variances_says_what_its_runs_say():
    text = pretrained.as_table(pretrained.variances(study.finished(RESULTS / "runs.csv")))
    assert (RESULTS / "variance.md").read_text() == text + "\n"
