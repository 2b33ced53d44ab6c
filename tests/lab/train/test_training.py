"""The training laboratory in small: what is sampled and computed, methods by hand, runs that are paired and resumed."""

import dataclasses
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_krpo.lab.train import conditions, loop, results, study
from verl_krpo.lab.train.conditions import NOISES, Condition
from verl_krpo.lab.train.methods import ESTIMATES, METHODS, Batch, Method
from verl_krpo.lab.train.tasks import TASKS
from verl_krpo.runs import curves

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def first(models):
    return loop.start(models, "sharpen")


def sums(seed, count, held_out=False):
    return TASKS["sharpen"].draw(random.Random(seed), count, held_out)


def sample(first, prompts, size):
    end, pad = first.tokenizer.eos_token_id, first.tokenizer.pad_token_id
    return loop.sample(first.model, prompts, size, end, pad, torch.Generator().manual_seed(0), first.task.max_tokens)


@pytest.fixture
def condition(monkeypatch):
    """Adds a condition for the length of a test."""
    return lambda name, **fields: monkeypatch.setitem(conditions.CONDITIONS, name, Condition(name, **fields))


def test_log_probs_are_those_of_whole_sequences(first):
    prompts = first.encode(sums(1, 3))
    responses, mask, sampled, sum_squares = sample(first, prompts, 2)
    owner = torch.tensor([0, 0, 1, 1, 2, 2])
    with torch.no_grad():
        found = loop.log_probs(first.model, prompts, responses, owner)
        whole = first.model(torch.cat([prompts[owner], responses], 1)).logits.log_softmax(-1)[
            :, prompts.shape[1] - 1 : -1
        ]
    expected = whole.gather(-1, responses[..., None])[..., 0]
    for log_probs in (found, sampled):
        torch.testing.assert_close(log_probs[mask], expected[mask], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sum_squares[mask], whole.exp().square().sum(-1)[mask], rtol=1e-4, atol=1e-6)
    for row, seen in zip(responses.tolist(), mask.sum(1).tolist(), strict=True):
        assert first.tokenizer.eos_token_id not in row[: seen - 1]
        assert seen == mask.shape[1] or row[seen - 1] == first.tokenizer.eos_token_id


def test_tokens_are_sampled_from_the_model(first):
    prompts, count = first.encode(sums(2, 1)), 1000
    responses, *_ = sample(first, prompts, count)
    with torch.no_grad():
        probability = first.model(prompts).logits[0, -1].softmax(-1)
    share = torch.bincount(responses[:, 0], minlength=len(probability)) / count
    assert ((share - probability).abs() <= 5 * (probability * (1 - probability) / count).sqrt() + 1e-3).all()


def test_what_a_model_is_worth_is_what_sampling_finds(first):
    problems = sums(0, loop.HELD_OUT, held_out=True)
    responses, *_ = sample(first, first.encode(problems), 8)
    right = (loop.scores(first, responses, problems, 8) == 1).double()
    worth = loop.look(first.model, first.held_out)
    for found, expected in ((right, worth["accuracy"]), (right.amax(1), worth["pass8"])):
        assert abs(found.mean().item() - expected) < 5 * (expected / found.numel()) ** 0.5 + 0.01
    greedy = first.model.generate(first.encode(problems), max_new_tokens=8, do_sample=False)
    greedy = first.tokenizer.batch_decode(greedy[:, first.held_out[0].shape[1] :])
    begins = [text.startswith(first.task.response(p.answer)) for text, p in zip(greedy, problems, strict=True)]
    assert worth["greedy"] == pytest.approx(sum(begins) / len(begins))
    assert 0 < worth["entropy"] < np.log(first.model.config.vocab_size)


def test_noise_is_what_it_is_called():
    rewards = torch.tensor([[0.0, 1.0]]).repeat(20_000, 1).double()
    for name, level, mean, std in (
        ("none", 0.0, rewards[0], (0.0, 0.0)),
        ("flip", 0.2, torch.tensor([0.2, 0.8]), (0.4, 0.4)),
        ("gaussian", 0.5, torch.tensor([0.0, 1.0]), (0.5, 0.5)),
    ):
        noisy = NOISES[name](level, rewards.shape, torch.Generator().manual_seed(0))(rewards)
        torch.testing.assert_close(noisy.mean(0), mean.double(), rtol=0, atol=0.02)
        torch.testing.assert_close(noisy.std(0), torch.tensor(std).double(), rtol=0, atol=0.02)
    graded = NOISES["judge"](1.0, rewards.shape, torch.Generator().manual_seed(0))(rewards)
    assert 0 < graded.min() and graded.max() < 1 and graded[:, 1].mean() > graded[:, 0].mean() + 0.5


@pytest.fixture(scope="module")
def batch_of(first):
    """batch_of(rewards, lengths) -> a Batch of prompts that differ."""
    problems = sums(0, 8)

    def make(rewards, lengths=None):
        lengths = torch.ones_like(rewards) if lengths is None else lengths
        mask = torch.arange(lengths.max()) < lengths.view(-1, 1)
        probability = torch.rand(mask.shape, generator=torch.Generator().manual_seed(0))
        chosen = problems[: len(rewards)]
        sampled = loop.Responses(torch.zeros(mask.shape), mask, probability.log(), probability.square())
        return Batch(rewards, [p.question for p in chosen], 0, first.encode(chosen), first.model, *sampled)

    return make


def test_a_value_network_learns_what_a_prompt_is_worth(batch_of):
    method = METHODS["value_network"].make()
    batch = batch_of(torch.tensor([[1.0, 0.6], [0.4, 0.0]], dtype=torch.float64))
    first, *_, last = (method(batch).mean(1) for _ in range(60))
    assert first[0] - first[1] > 1  # before, the mean of the batch
    assert abs(last[0] - last[1]) < 0.2


@pytest.mark.parametrize("name", ESTIMATES)
def test_a_method_is_finite_and_favors_the_better_answer(name, batch_of):
    rewards = torch.from_numpy(np.random.default_rng(0).choice([0.0, 0.01, 0.5, 1.0], (8, 4)))
    lengths = torch.from_numpy(np.random.default_rng(1).integers(3, 9, (8, 4)))
    batch = batch_of(rewards, lengths)
    advantage = METHODS[name](batch).reshape(*rewards.shape, -1)
    assert advantage.shape[2] in (1, batch.mask.shape[1]) and advantage.isfinite().all()
    assert (advantage * (rewards - rewards.mean(1, keepdim=True))[..., None]).sum() > 0


def test_prompts_recur_from_a_pool_and_are_otherwise_new():
    pooled = dataclasses.replace(conditions.CONDITIONS["recurring"], prompts=4, pool=8)
    steps = [next_ for next_, _ in zip(loop.visits(TASKS["sharpen"], pooled, 3), range(4), strict=False)]
    first, second = ({p.question for step in half for p in step} for half in (steps[:2], steps[2:]))
    assert first == second and len(first) <= 8
    fresh = loop.visits(TASKS["sharpen"], conditions.CONDITIONS["pairs"], 3)
    assert next(fresh) != next(fresh)


def test_runs_of_a_seed_are_paired_and_repeatable(models, condition):
    condition("short", prompts=6, size=2, steps=2, every=1, learning_rate=1e-3)
    condition("frozen", prompts=6, size=2, steps=2, every=1, learning_rate=0.0)
    rloo, again, other = (loop.run(models, "short", method, 5) for method in ("rloo", "rloo", "krpo"))
    assert rloo["curve"] == again["curve"] != other["curve"]
    assert rloo["curve"].split()[0] == other["curve"].split()[0]
    frozen = [loop.run(models, "frozen", method, 5) for method in ("rloo", "krpo")]
    assert frozen[0]["reward"] == frozen[1]["reward"]  # the same answers were sampled


def test_training_follows_the_advantage(models, condition, monkeypatch):
    lengths = []

    def shorter(batch):
        lengths.append(float(batch.lengths.double().mean()))
        return batch.lengths.double().mean() - batch.lengths

    monkeypatch.setitem(METHODS, "shorter", Method(lambda: shorter))
    condition("few", prompts=8, size=4, steps=12, every=12, learning_rate=1e-3)
    loop.run(models, "few", "shorter", 1)
    assert sum(lengths[-3:]) < 0.8 * sum(lengths[:3])


def test_a_penalty_holds_the_model_back(models, condition):
    curves = []
    for kl in (0.0, 10.0):
        condition("held", prompts=8, size=4, steps=6, every=6, learning_rate=1e-3, kl=kl)
        before, after = map(float, loop.run(models, "held", "rloo", 1)["curve"].split())
        curves.append(abs(after - before))
    assert curves[1] < curves[0]


def test_a_study_resumes_and_reports(tmp_path, monkeypatch):
    """With runs that are made up and in this process."""
    ran = []

    def invented(tasks_run, tasks, model, path, jobs):
        for condition, method, seed in tasks:
            ran.append((method, seed))
            row = {"condition": condition, "method": method, "seed": seed, "rollouts": 64}
            curves = {"curve": f"0.1 0.2 0.{3 + seed}", "greedy": "0.1 0.5 0.9"}
            study.append(path, row | curves | {"advantage_std": 1.0})
            yield row | {"curve": ""}

    monkeypatch.setattr(study, "execute", invented)
    for seeds in (range(2), range(3)):
        wanted = study.tasks(conditions.CONDITIONS, ["pairs"], METHODS, ["rloo", "grpo"], seeds)
        study.complete(tmp_path / "runs.csv", loop.run, wanted, tmp_path, lambda condition: None, 1)
        text = study.show(tmp_path / "runs.csv")
    assert ran == [(method, seed) for seed in range(3) for method in ("rloo", "grpo")]
    assert len(text.splitlines()) == 4 and "| pairs" in text and "grpo" in text
    assert {path.name for path in tmp_path.iterdir()} >= {"runs.csv", "summary.csv", "curves.png", "differences.png"}
    assert (tmp_path / "table.md").read_text() == text + "\n"
    greedy = study.show(tmp_path / "runs.csv", measure="greedy")
    assert (tmp_path / "table.md").read_text() == text + "\n"
    assert (tmp_path / "greedy" / "table.md").read_text() == greedy + "\n"
    assert "0.900" in greedy and "0.900" not in text
    with pytest.raises(ValueError, match="no measure beauty"):
        study.show(tmp_path / "runs.csv", measure="beauty")
    with pytest.raises(ValueError, match="no method dapo"):
        study.tasks(conditions.CONDITIONS, ["pairs"], METHODS, ["dapo"], range(1))


def test_a_run_that_fails_in_its_process_is_seen(models, tmp_path):
    with pytest.raises(KeyError, match="nothing"):
        list(study.execute(loop.run, [study.Task("nothing", "rloo", 0)], models, tmp_path / "runs.csv", 1))


def test_runs_with_other_columns_are_not_mixed(tmp_path):
    study.append(tmp_path / "runs.csv", {"condition": "pairs", "curve": "0.1"})
    with pytest.raises(ValueError, match="has the columns condition,curve, a run now condition,greedy"):
        study.append(tmp_path / "runs.csv", {"condition": "pairs", "greedy": "0.1"})


def curve_rows(method, curves):
    line = {"condition": "pairs", "method": method, "rollouts": "64", "advantage_std": "2"}
    return [line | {"seed": str(k), "curve": " ".join(map(str, curve))} for k, curve in enumerate(curves)]


RESULTS = ROOT / "docs" / "results"
TABLES = [path.parent for path in sorted(RESULTS.rglob("summary.csv")) if path.parent.name != "compare"]


@pytest.mark.parametrize("folder", TABLES, ids=lambda folder: str(folder.relative_to(RESULTS)))
def test_a_table_of_the_pages_says_what_its_runs_say(folder):
    """The table that the study writes of them today; of a measure the folder above has the runs."""
    if (folder / "runs.csv").exists():
        rows = study.finished(folder / "runs.csv")
    else:
        _, rows = study.read(folder.parent / "runs.csv", folder.name)
    other = study.finished(folder / "summary.csv")[0]["other"]
    assert (folder / "table.md").read_text() == results.as_table(results.summary(rows, other)) + "\n"


def test_every_table_of_runs_is_on_a_page():
    pages = "".join(page.read_text() for page in (ROOT / "docs").glob("*.md"))
    missing = [folder for folder in TABLES if f'\n--8<-- "{(folder / "table.md").relative_to(ROOT)}"\n' not in pages]
    assert TABLES and not missing


@pytest.mark.parametrize(
    "folder, methods",
    [("verl", ["rloo", "krpo_adaptive"]), ("verl_controls", ["rloo", "none"]), ("verl_choice", ["uniform"])],
)
def test_the_page_of_the_laboratory_says_what_the_runs_in_verl_say(capsys, folder, methods):
    page = (ROOT / "docs/laboratory.md").read_text()
    runs = [curves.read(run) for run in sorted((ROOT / "docs/results" / folder).glob("*_seed*"))]
    for method in methods:
        curves.table_of_differences(runs, method)
        assert "\n".join(line.rstrip() for line in capsys.readouterr().out.strip("\n").splitlines()) in page


def test_the_page_of_claims_says_how_large_advantages_are():
    runs = study.finished(ROOT / "docs/results/training/runs.csv")

    def size(condition, method):
        values = [
            float(run["advantage_std"]) for run in runs if (run["condition"], run["method"]) == (condition, method)
        ]
        return sum(values) / len(values)

    (krpo, grpo) = ([size(condition, method) for condition in ("pairs", "fours")] for method in ("krpo", "grpo"))
    said = f"KRPO {krpo[0]:.2f} and {krpo[1]:.2f}, GRPO {grpo[0]:.2f} and {grpo[1]:.2f}"
    times = f"it is {(krpo[0] / grpo[0]) ** 2:.0f} and {(krpo[1] / grpo[1]) ** 2:.0f} times GRPO's"
    page = (ROOT / "docs/claims.md").read_text()
    assert said in page and times in page


def test_the_summary_by_hand():
    rloo = curve_rows("rloo", [[0.0, 0.2, 0.4, 0.6, 0.8], [0.0, 0.2, 0.4, 0.6, 0.8]])
    quick = curve_rows("jspo", [[0.0, 0.4, 0.8, 0.9, 0.9], [0.0, 0.4, 0.8, 0.9, 1.0]])
    slow = curve_rows("krpo", [[0.0, 0.1, 0.2, 0.3, 0.4]] * 2)
    by_method = {line["method"]: line for line in results.summary(rloo + quick + slow)}
    # RLOO is at .6 after 3 of 4 looks; the quick one passes it halfway between the first and the second.
    assert by_method["rloo"]["rollouts"] == 1 and by_method["rloo"]["difference"] == 0
    assert by_method["jspo"]["rollouts"] == pytest.approx(1.5 / 3)
    assert by_method["jspo"]["difference"] == pytest.approx(0.15) and by_method["jspo"]["wins"] == 1
    assert by_method["jspo"]["difference_half"] == pytest.approx(12.7062 * 0.05, rel=1e-4)  # t, one degree of freedom
    assert np.isnan(by_method["krpo"]["to_other"])
    grpo = curve_rows("grpo", [[0.0, 0.1, 0.2, 0.3, 0.5]] * 2)
    krpo = next(line for line in results.summary(rloo + slow + grpo) if line["method"] == "krpo")
    assert krpo["to_other"] == pytest.approx(-0.1) and krpo["difference"] == pytest.approx(-0.4)
    assert np.isnan(results.rollouts(np.ones((2, 5)), np.ones((2, 5))))
    assert by_method["krpo"]["rollouts"] == float("inf") and "never" in results.as_table([by_method["krpo"]])
    assert "collapsed" not in results.as_table(list(by_method.values()))
    fallen = curve_rows("krpo", [[0.3, 0.5, 0.9, 0.0, 0.0], [0.3, 0.5, 0.9, 0.9, 0.9]])
    steady = curve_rows("rloo", [[0.3, 0.4, 0.5, 0.6, 0.7]] * 2)
    table = results.as_table(results.summary(steady + fallen)).splitlines()
    assert table[0].endswith("| collapsed |") and [line.split()[-2] for line in table[2:]] == ["0", "1"]
    with pytest.raises(ValueError, match="twice"):
        results.summary(rloo + rloo)
    with pytest.raises(ValueError, match="several models"):
        results.summary(rloo + curve_rows("grpo", [[0.1, 0.2, 0.3, 0.4, 0.5]]))
    other_start = curve_rows("rloo", [[0.1, 0.2, 0.2, 0.2, 0.2]]) + curve_rows("grpo", [[0.1, 0.2, 0.2, 0.2, 0.2]])
    elsewhere = [row | {"seed": "7"} for row in other_start]
    assert next(line for line in results.summary(rloo + grpo + elsewhere) if line["method"] == "grpo")["seeds"] == 3
    with pytest.raises(ValueError, match="none of rloo, batch_mean"):
        results.summary(slow)
