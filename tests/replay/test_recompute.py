"""replay: verl's rollout files read back, and the estimators' own numbers."""

import dataclasses
import json
import math
import re
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch

from verl_krpo.advantage import ESTIMATORS, krpo, krpo_memory, settings_of
from verl_krpo.advantage.memory import PromptMemory
from verl_krpo.config import KrpoConfig, Weight
from verl_krpo.replay import page, recompute, rollouts
from verl_krpo.replay.recompute import CONTROLS, INFORMED, METHODS, advantages, replay, settings_from


def rollout(step, prompt, session, score, output=0, **more):
    row = {"input": f"what is {prompt}?", "output": "x", "gts": "1", "score": score, "step": step}
    return row | {"uid": f"{prompt}_{session}_{output}"} | more


def write_steps(folder, rows):
    folder.mkdir(parents=True, exist_ok=True)
    for step in {row["step"] for row in rows}:
        lines = [json.dumps(row) + "\n" for row in rows if row["step"] == step]
        (folder / f"{step}.jsonl").write_text("".join(lines))
    return folder


def bernoulli(steps=4, groups=8, members=6, seed=0):
    rng = np.random.default_rng(seed)
    return [
        rollout(step, f"p{step}-{g}", k, float(rng.random() < rate))
        for step in range(1, steps + 1)
        for g, rate in enumerate(rng.random(groups))
        for k in range(members)
    ]


@pytest.fixture
def folder(tmp_path):
    return write_steps(tmp_path / "rollouts", bernoulli())


def read_all(where):
    reading = rollouts.Reading()
    return list(rollouts.steps(where, reading)), reading


def test_what_verl_writes_is_what_is_read(tmp_path):
    """The trainer's own writer, values with quotes, newlines and unicode in them."""
    from verl.trainer.ppo.v1.trainer_base import PPOTrainer

    n = 6
    PPOTrainer._write_generations(
        inputs=['a "quoted"\nprompt √'] * n, outputs=["\u2028"] * n, gts=[None] * n, scores=[0.0, 1.0] * 3,
        reward_extra_infos_dict={"uid": [f"u-1_{k}_0" for k in range(n)]}, dump_path=str(tmp_path), global_steps=12,
    )  # fmt: skip
    (step,), reading = read_all(tmp_path)
    assert (step.number, step.rewards.tolist(), set(step.prompts)) == (12, [0.0, 1.0] * 3, {"u-1"})
    assert (reading.lines, reading.damaged, reading.by_text) == (n, 0, False)


def test_files_are_taken_by_step(tmp_path):
    write_steps(tmp_path, [rollout(step, "p", 0, 1.0) for step in (2, 10, 1)])
    assert [step.number for step in read_all(tmp_path)[0]] == [1, 2, 10]


def test_one_file_of_many_steps_is_cut_where_the_step_changes(tmp_path, folder):
    joined = tmp_path / "all.jsonl"
    joined.write_text("".join((folder / f"{step}.jsonl").read_text() for step in (1, 2, 3, 4)))
    for one, other in zip(read_all(folder)[0], read_all(joined)[0], strict=True):
        assert (one.number, one.rewards.tolist(), list(one.prompts)) == (
            other.number, other.rewards.tolist(), list(other.prompts))  # fmt: skip


def test_without_uid_rows_are_grouped_by_prompt_text_and_it_is_said(tmp_path, folder):
    for path in folder.glob("*.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({k: v for k, v in row.items() if k != "uid"}) + "\n" for row in rows))
    run = replay(folder)
    assert run.reading.by_text and run.total("groups") == 4 * 8
    assert any("grouped by prompt text" in value for _, value in page.facts(run))


def test_a_session_counts_once_by_its_final_output(tmp_path):
    rows = [rollout(1, "p", 0, 0.0), rollout(1, "p", 0, 1.0, output=1), rollout(1, "p", 1, 0.5)]
    (step,), _ = read_all(write_steps(tmp_path, rows))
    assert sorted(step.rewards) == [0.5, 1.0]


def test_rows_that_fill_up_a_batch_are_no_responses(tmp_path):
    """verl's upsample_batch_to_divisible_size names them so, one uid for all of a batch."""
    uid = f"pad{uuid.uuid4().hex}"
    rows = [rollout(1, "p", session, 1.0) for session in range(2)] + [rollout(1, uid, k, 0.0) for k in range(6)]
    (step,), reading = read_all(write_steps(tmp_path, rows))
    assert list(step.rewards) == [1.0, 1.0] and reading.damaged == 0


def test_damaged_lines_are_counted_named_and_left_out(folder):
    clean = replay(folder)
    path = folder / "2.jsonl"
    bad = ["{", '{"score": null, "step": 2, "uid": "a_0_0"}', "[1]", '{"score": 1e999, "step": 2, "input": "a"}',
           '{"score": 1, "step": 2}', '{"score": true, "step": 2, "input": "a"}']  # fmt: skip
    lines = path.read_text().splitlines()
    path.write_text("\n".join(bad + lines) + '\n{"input": "half a li')
    run = replay(folder)
    assert run.reading.damaged == len(bad) + 1
    assert len(run.reading.examples) == rollouts.EXAMPLES_KEPT
    assert run.reading.examples[0].startswith(f"{path}:1: no JSON")
    assert any("score is None" in example for example in run.reading.examples)
    assert [run.total(key) for key in ("rows", "sum", "squares")] == [
        clean.total(key) for key in ("rows", "sum", "squares")
    ]
    assert run.totals["krpo"].squares == clean.totals["krpo"].squares


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_neutral_lines_are_a_prompts_visits(tmp_path):
    rows = [
        {"prompt_id": "a_1_2", "step": 4, "rewards": [0, 1], "score_weights": [0.5, 2]},
        {"prompt_id": 7, "step": 4, "rewards": [0.25], "score_weights": [1]},
        {"prompt_id": 7, "step": 6, "rewards": [1, 1, 1], "score_weights": [0, 0, 1]},
    ]
    (one, other), reading = read_all(write_lines(tmp_path / "run.jsonl", rows))
    assert (one.number, one.rewards.tolist(), list(one.names)) == (4, [0, 1, 0.25], ["a_1_2", "a_1_2", "7"])
    assert list(one.prompts) == list(one.names) and one.weights[Weight.score].tolist() == [0.5, 2, 1]
    assert (other.number, other.rewards.tolist()) == (6, [1, 1, 1])
    assert (reading.damaged, reading.by_text, reading.kinds) == (0, False, (Weight.score,))


@pytest.mark.parametrize(
    "row, why",
    [
        ({"rewards": []}, "rewards is [], not a list of finite numbers"),
        ({"rewards": [True]}, "rewards is [True]"),
        ({"rewards": [1, None]}, "rewards is [1, None]"),
        ({"rewards": [1], "prompt_id": None}, "prompt_id is None"),
        ({"rewards": [1, 0], "score_weights": [1]}, "2 numbers >= 0"),
        ({"rewards": [1], "score_weights": [-1]}, "1 numbers >= 0"),
        ({"rewards": [1], "step": "x"}, "step is 'x'"),
        ({"rewards": [1]}, "no log-probs or score weights"),
    ],
)
def test_a_wrong_neutral_line_says_what_is_wrong(tmp_path, row, why):
    good = {"prompt_id": "a", "step": 1, "rewards": [1], "score_weights": [1]}
    _, reading = read_all(write_lines(tmp_path / "run.jsonl", [good, {"prompt_id": "a", "step": 1} | row]))
    assert reading.damaged == 1 and why in reading.examples[0]


@pytest.mark.parametrize("name", ["log_probs", "rollout_log_probs"])
def test_weights_come_from_the_log_probs_of_a_response(tmp_path, name):
    """Those of all outputs of a session add up."""
    rows = [
        rollout(1, "p", 0, 0.0, **{name: [math.log(0.5), math.log(0.9)]}),
        rollout(1, "p", 0, 0.0, output=1, **{name: [math.log(0.2)]}),
        rollout(1, "p", 1, 1.0, **{name: [0.0]}),
        rollout(1, "p", 2, 1.0),
        rollout(1, "p", 2, 1.0, **{name: ["a"]}),
    ]
    (step,), reading = read_all(write_steps(tmp_path, rows))
    assert step.weights[Weight.score] == pytest.approx([0.25 + 0.01 + 0.64, 0])
    assert step.weights[Weight.length].tolist() == [3, 1]
    assert [example.split(": ")[1][:20] for example in reading.examples] == [
        "no log-probs or scor",
        f"{name} is not a list"[:20],
    ]


def test_a_number_does_for_the_log_probs(tmp_path):
    rows = [rollout(1, "p", k, 0.0, score_weight=weight) for k, weight in enumerate([0.5, 2, -1])]
    (step,), reading = read_all(write_steps(tmp_path, rows))
    assert step.weights[Weight.score].tolist() == [0.5, 2] and reading.damaged == 1
    assert set(replay(tmp_path).methods) == {*METHODS, "krpo_adaptive_score", "krpo_memory_score"}


def test_opo_is_verls():
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    rng = np.random.default_rng(0)
    prompts, lengths = np.repeat(np.arange(5), [1, 2, 4, 3, 2]).astype(object), torch.from_numpy(rng.integers(1, 9, 12))
    mask = (torch.arange(9) < lengths[:, None]).float()
    rewards = torch.from_numpy(rng.random(12)).float()
    tokens = torch.zeros(12, 9).scatter_(1, lengths[:, None] - 1, rewards[:, None])
    expected, _ = get_adv_estimator_fn("opo")(token_level_rewards=tokens, response_mask=mask, index=prompts)
    found = advantages("opo", rewards.double(), prompts, KrpoConfig(), {Weight.length: lengths.double()})
    torch.testing.assert_close(found.float(), expected[:, 0], rtol=2e-6, atol=1e-6)


def test_nothing_readable_is_an_error_that_names_the_lines(tmp_path):
    (tmp_path / "1.jsonl").write_text("nonsense\n")
    with pytest.raises(ValueError, match=r"1 lines are damaged\)\n.*1.jsonl:1"):
        replay(tmp_path)
    with pytest.raises(FileNotFoundError, match="rollout_data_dir"):
        replay(tmp_path / "absent")


@pytest.mark.parametrize("method", [method for method in METHODS if method not in (*INFORMED, *CONTROLS)])
def test_the_advantages_are_those_of_verls_registry(folder, method):
    import verl  # noqa: F401
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    run = replay(folder)
    for step, row in zip(read_all(folder)[0], run.per_step, strict=True):
        rewards = torch.from_numpy(step.rewards)
        tokens = torch.zeros(len(rewards), 5)
        tokens[:, -1] = rewards
        kwargs = dict(token_level_rewards=tokens, response_mask=torch.ones(len(rewards), 5), index=step.prompts)
        expected, _ = get_adv_estimator_fn(method)(**kwargs, **({"config": {}} if method in ESTIMATORS else {}))
        found = advantages(method, rewards, step.prompts, KrpoConfig())
        torch.testing.assert_close(found.float(), expected[:, 0], rtol=2e-6, atol=1e-6)
        assert row[method]["std"] == pytest.approx(expected[:, 0].std(correction=0).item(), rel=1e-5)


def test_totals_are_those_of_all_rows_at_once(folder):
    run = replay(folder)
    seen, first, last = [], [], []
    for step in read_all(folder)[0]:
        found = krpo(torch.from_numpy(step.rewards), step.prompts, KrpoConfig())
        seen.append(found.advantage.flatten())
        first.append(found.advantage[:, 0].abs())
        last.append(found.advantage[:, -1].abs())
    seen, totals = torch.cat(seen), run.totals["krpo"]
    assert totals.std() == pytest.approx(seen.std(correction=0).item())
    assert totals.largest == seen.abs().max().item()
    ends = [torch.cat(part).mean().item() for part in (first, last)]
    assert totals.ends / run.total("groups_of_several") == pytest.approx(ends)
    assert totals.by_place[[0, 5]] / run.total("groups_at")[[0, 5]] == pytest.approx(ends)
    assert totals.histogram.sum() == len(seen) == run.totals["grpo"].rows


def test_order_matters_for_the_published_form_alone(folder):
    run = replay(folder)
    share = {m: math.sqrt(t.order / t.rows) / t.std() for m, t in run.totals.items()}
    assert 0.2 < share["krpo"] < 0.8
    assert share["grpo"] == share["rloo"] == share["jspo"] == share["krpo_adaptive"] == 0


@pytest.mark.parametrize("method", ["grpo", "rloo", *CONTROLS, "jspo", "krpo_adaptive"])
def test_the_others_do_not_know_the_order(folder, method):
    (step, *_), _ = read_all(folder)
    rewards, order = torch.from_numpy(step.rewards), np.random.default_rng(1).permutation(len(step.rewards))
    one = advantages(method, rewards, step.prompts, KrpoConfig())
    other = advantages(method, rewards[order], step.prompts[order], KrpoConfig())
    torch.testing.assert_close(one[order], other, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method", ["grpo", "rloo"])
def test_groups_of_one_and_of_unequal_sizes_are_verls(method):
    from verl.trainer.ppo.core_algos import get_adv_estimator_fn

    sizes = [1, 2, 5, 3, 1, 4]
    prompts = np.repeat(np.arange(len(sizes)), sizes).astype(object)
    order = np.random.default_rng(0).permutation(len(prompts))
    rewards = torch.from_numpy(np.random.default_rng(1).normal(size=len(prompts)))
    rewards[:1] = 0.3
    rewards[3:8] = 0.1  # a group of equal rewards
    column = rewards[order][:, None]
    expected, _ = get_adv_estimator_fn(method)(
        token_level_rewards=column, response_mask=torch.ones_like(column), index=prompts[order]
    )
    found = advantages(method, rewards[order], prompts[order], KrpoConfig())
    torch.testing.assert_close(found, expected[:, 0], rtol=1e-7, atol=1e-9)


def test_groups_of_equal_rewards(tmp_path):
    rows = [rollout(1, f"p{g}", k, float(g % 2)) for g in range(4) for k in range(4)]
    rows += [rollout(1, "single", 0, 1.0)] + [rollout(1, "mixed", k, float(k)) for k in range(2)]
    run = replay(write_steps(tmp_path, rows))
    assert [run.total(key) for key in ("groups", "equal_groups", "groups_of_several")] == [6, 4, 5]
    assert run.totals["grpo"].equal == run.totals["rloo"].equal == 0
    assert run.totals["krpo"].equal > 0  # all correct, and yet an advantage: the prior mean is 0


def test_variance_ratios_are_the_analytic_ones_for_a_common_distribution(tmp_path):
    """The posterior mean with Q = 0 is k times the sum of the rewards, k = P0 / (R + n P0)."""
    n, k = 8, 0.1 / (1 + 8 * 0.1)
    rewards = np.random.default_rng(0).normal(0.0, 1.0, (1000, n))  # every prompt's mean is 0, that of the prior below
    rows = [rollout(1, f"p{g}", member, float(rewards[g, member])) for g in range(1000) for member in range(n)]
    settings = settings_from(["process_var=0", "measurement_var=1", "init_var=0.1", "baseline=posterior", "scale=none"])
    run = replay(write_steps(tmp_path, rows), settings)
    assert run.variance("rloo") == 1 and run.interval("krpo") is None  # one step
    ours = 1 + (n - 1) * k**2 / (1 - k) ** 2  # E[A^2] / E[A r]^2 of A_i = (1 - k) r_i - k (the others)
    rloo = 1 + 1 / (n - 1)
    assert run.variance("krpo") == pytest.approx(ours / rloo, abs=0.01)
    assert ours / rloo < 0.9


@pytest.mark.parametrize(
    "law, members, adaptive",
    [
        ("uniform", 4, 0.906),
        ("Beta(1,8)", 8, 0.936),
        ("mixture", 4, None),
    ],
)
def test_variances_are_within_a_percent_of_the_truth(law, members, adaptive):
    """E[A^2] / E[A (r - theta)]^2 with the true theta; `adaptive`: E(r - b)^2 over RLOO's of a long study."""
    from verl_krpo.lab.simulate.simulate import LAWS

    rng, run = np.random.default_rng(5), recompute.Replay("simulated", KrpoConfig(), rollouts.Reading())
    methods = [method for method in METHODS if method not in INFORMED]
    truth = dict.fromkeys(methods, np.zeros(2))
    prompts = np.repeat([f"p{g}" for g in range(64)], members).astype(object)
    for number in range(120):
        rewards, theta, _ = LAWS[law](rng, 64, members)
        rewards, theta = rewards[0].ravel(), theta.ravel()
        recompute.add(run, rollouts.Step(number, rewards, prompts), rng)
        for method in methods:
            a = advantages(method, torch.from_numpy(rewards), prompts, run.settings).numpy()
            truth[method] = truth[method] + [np.mean(a**2), np.mean(a * (rewards - theta))]
    for method in CONTROLS:  # E[A (r - theta)] is rloo's, where it has less noise: no baseline has the own reward in it
        truth[method] = np.array([truth[method][0], truth["rloo"][1]])
    noise_per_signal = {method: 120 * square / signal**2 for method, (square, signal) in truth.items()}
    for method in methods:
        true = noise_per_signal[method] / noise_per_signal["rloo"]
        assert (method, run.variance(method)) == (method, pytest.approx(true, rel=0.01))
        low, high = run.interval(method)
        assert low <= run.variance(method) <= high
    if adaptive:
        assert run.variance("krpo_adaptive") == pytest.approx(adaptive, rel=0.01)


def test_with_score_weights_the_variance_is_the_gradients():
    """Two answers, the right one with probability p: the squares of their scores are (1 - p)^2 and p^2.

    Their baselines leave the own reward out, so E[A (r - p)] = p (1 - p) / scale.
    """
    rng, size = np.random.default_rng(7), 3
    run = recompute.Replay("simulated", KrpoConfig(), rollouts.Reading(kinds=(Weight.score,)))
    chance = np.linspace(0.3, 0.9, 64)[:, None].repeat(size, axis=1)  # the same at every visit
    names = np.array([f"p{g}" for g in range(64)], dtype=object).repeat(size)
    unscaled, truth = ("rloo", *CONTROLS, "jspo"), dict.fromkeys(("rloo", *CONTROLS, "jspo", *INFORMED), np.zeros(2))
    for number in range(1, 101):
        right = rng.random(chance.shape) < chance
        weights = np.where(right, 1 - chance, chance).ravel() ** 2
        step = rollouts.Step(number, right.ravel().astype(float), names, names, {Weight.score: weights})
        rewards, noise = torch.from_numpy(step.rewards), (chance * (1 - chance)).ravel()
        before = run.memories.copy()
        for method in truth:
            if method in unscaled:
                a, signal = advantages(method, rewards, names, run.settings), noise
            else:
                found = recompute._informed(run, method, rewards, step, torch.from_numpy(weights))
                scale = found.groups.scatter((found.baseline_var + found.scale_var).sqrt())
                a, signal = found.advantages(), noise / scale.numpy()
            truth[method] = truth[method] + [weights @ a.square().numpy(), signal.sum()]
        run.memories = before
        recompute.add(run, step, rng)
    noise_per_signal = {method: square / signal**2 for method, (square, signal) in truth.items()}
    for method in truth:
        true = noise_per_signal[method] / noise_per_signal["rloo"]
        assert (method, run.variance(method)) == (method, pytest.approx(true, rel=0.02))
    assert run.variance("krpo_adaptive_score") < 0.95 * run.variance("krpo_adaptive")
    assert run.variance("krpo_memory_score") < 0.85 * run.variance("krpo_memory")
    assert page.verdict(run)[1].startswith("Variance of the gradient, rloo = 1: krpo_memory_score 0.")


@pytest.mark.parametrize("size", [2, 4])
def test_the_memorys_variance_is_that_of_the_true_chances(size):
    """Prompts that recur and drift: E[A^2] / E[A (r - p)]^2 over RLOO's, where E[A (r - p)] = p (1 - p) / scale, and
    RLOO's E[A^2] = p (1 - p) n / (n - 1). In pairs the estimate itself has a standard error of 1 %."""
    from verl_krpo.lab.simulate.memory import Training

    rng, run = np.random.default_rng(6), recompute.Replay("simulated", KrpoConfig(), rollouts.Reading())
    memory, sums = PromptMemory(), np.zeros(3)
    training = Training(rise=0, pool=512, batch=128, steps=120)
    for number, (prompts, p, rewards) in enumerate(training.draw(size, rng), start=1):
        uids = np.repeat([f"{number}-{g}" for g in range(len(p))], size).astype(object)
        step = rollouts.Step(number, rewards.ravel(), uids, prompts.repeat(size).astype(str).astype(object))
        recompute.add(run, step, rng)
        found, memory = krpo_memory(torch.from_numpy(step.rewards), step.names, memory, step=number)
        noise = (p * (1 - p)).repeat(size)
        inverse = found.groups.scatter(1 / (found.baseline_var + found.scale_var).sqrt()).numpy()
        sums += [(found.advantages() ** 2).sum(), (inverse * noise).sum(), noise.sum()]
    true = sums[0] / sums[1] ** 2 * sums[2] * (size - 1) / size
    assert run.variance("krpo_memory") == pytest.approx(true, rel=0.02 if size == 2 else 0.01)
    assert run.variance("krpo_memory") < 0.95 * run.variance("krpo_adaptive")
    assert len(run.memories["krpo_memory"]) == 512


def test_the_memory_goes_from_step_to_step_and_knows_a_prompt_by_its_text(tmp_path):
    """A new uid every step; a session's later outputs, with other prompts, are no other prompt."""
    rows = [
        rollout(step, f"{step}-{g}", k, float((g + k + step) % 3 == 0), input=f"prompt {g}")
        for step in (1, 2, 10)
        for g in range(6)
        for k in range(4)
    ]
    rows += [row | {"uid": row["uid"][:-1] + "1", "input": "then " + row["input"]} for row in rows[::5]]
    run = replay(write_steps(tmp_path / "named", rows))
    memory = PromptMemory()
    for step in read_all(tmp_path / "named")[0]:
        found, memory = krpo_memory(torch.from_numpy(step.rewards), step.names, memory, step=step.number)
        assert run.per_step[[1, 2, 10].index(step.number)]["krpo_memory"]["std"] == pytest.approx(
            found.advantages().std(correction=0).item()
        )
    remembered = run.memories["krpo_memory"]
    assert (len(remembered), remembered.step, run.every("named")) == (6, 10, True)
    assert ("prompts", "6, each 3 times") in page.facts(run)

    for row in rows:
        del row["input"]
    run = replay(write_steps(tmp_path / "unnamed", rows))
    assert (len(run.memories["krpo_memory"]), run.every("named")) == (18, False)
    assert any("knows none of them again" in value for _, value in page.facts(run))


def test_the_verdict_names_the_rewards_the_methods_and_the_key(tmp_path):
    few, many = write_steps(tmp_path / "few", bernoulli()), write_steps(tmp_path / "many", bernoulli(40, 64, 4))
    first, variances, few_steps, _ = page.verdict(replay(few))
    assert re.fullmatch(r"groups of 6, rewards 0/1, \d+\.\d % of the groups without signal\.", first)
    assert few_steps == "From 4 steps: too few for intervals." and "krpo (published) 1." in variances
    _, variances, advice = page.verdict(replay(many))
    assert advice == "To use krpo_adaptive, add: algorithm.adv_estimator=krpo_adaptive"
    assert re.search(r"krpo_adaptive 0\.9\d \[0\.\d\d, 0\.\d\d\]", variances)
    assert re.search(r"krpo \(published\) 1\.\d\d \[[\d., ]+\]: do not use", variances)
    assert variances.startswith("Variance of the rewards (no log-probs here to tell the gradient's), rloo = 1: ")


def test_every_key_of_a_verdict_composes(compose):
    for method, key in page.KEYS.items():
        algorithm = compose(*key.split()).algorithm
        name = method.removesuffix("_score")
        assert algorithm.adv_estimator == name
        if name in ESTIMATORS:
            settings = settings_of(name, algorithm)
            default = ESTIMATORS[name].keys()
            assert settings == (default if name == method else dataclasses.replace(default, weight=Weight.score))
    assert set(page.KEYS) == {*METHODS, *(method for kind in recompute.WEIGHTED.values() for method in kind)} - {
        *CONTROLS
    }


def test_the_terminal_report_fits_80_columns(folder, capsys):
    page.show([replay(folder)])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    for method in METHODS:
        assert re.search(rf"^{method} +[\d.]+ +[\d.]+ ", text, re.M)


def test_runs_with_weights_and_without_are_one_report(folder, tmp_path, capsys):
    rng = np.random.default_rng(0)
    rows = [row | {"log_probs": (-rng.random(3)).tolist()} for row in bernoulli()]
    runs = [replay(folder), replay(write_steps(tmp_path / "weighted", rows))]
    assert set(runs[1].methods) - set(runs[0].methods) == {"krpo_adaptive_score", "krpo_memory_score", "opo"}
    assert runs[1].totals["krpo_adaptive"].squares == runs[0].totals["krpo_adaptive"].squares
    page.show(runs)
    text, html = capsys.readouterr().out, page.html(runs)
    assert "Variance of the gradient, rloo = 1" in text and "Variance of the rewards (no log-probs" in text
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text
    assert html.count("data:image/svg+xml;base64,") == 2 * 5


def test_weights_that_a_run_does_not_have_are_named(folder):
    with pytest.raises(ValueError, match="--krpo weight=score: the rollouts have no such weights"):
        replay(folder, settings_from(["weight=score"]))


def test_the_page_loads_nothing(folder):
    runs = [replay(folder), replay(folder, settings_from(["process_var=1e-3"]))]
    html = page.html(runs)
    assert "http" not in html and "<script" not in html and "<link" not in html
    assert html.count("data:image/svg+xml;base64,") == 2 * 5
    assert 'name="viewport"' in html and "process_var=0.001" in html


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("members", [1, 3])
def test_rewards_that_are_all_equal_have_a_report(tmp_path, members):
    rows = [rollout(1, f"p{g}", k, 1.0) for g in range(3) for k in range(members)]
    run = replay(write_steps(tmp_path, rows))
    assert math.isnan(run.variance("krpo"))
    assert "nothing can be learned" in page.html([run])


def test_names_from_outside_are_escaped(folder):
    run = replay(folder)
    run.name = "<b>x</b>"
    run.reading.skip(Path("<i>"), 1, "&")
    html = page.html([run])
    assert "<b>x" not in html and "<i>" not in html and "&lt;b&gt;x" in html


def test_a_wrong_setting_is_named():
    with pytest.raises(ValueError, match="algorithm.krpo.proces_var"):
        settings_from(["proces_var=1"])
    with pytest.raises(ValueError, match="KEY=VALUE"):
        settings_from(["process_var"])


def test_the_command(folder, tmp_path):
    command = [
        sys.executable,
        "-m",
        "verl_krpo",
        "replay",
        folder,
        folder / "1.jsonl",
        "--out",
        tmp_path / "r.html",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert f"report: {tmp_path / 'r.html'}" in done.stdout and (tmp_path / "r.html").exists()
