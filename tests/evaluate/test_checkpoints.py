import csv
import itertools
import json
from collections import Counter
from math import comb, erfc, sqrt

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verl.trainer.ppo.metric_utils import process_validation_metrics
from verl.trainer.ppo.v1.trainer_base import PPOTrainer

from verl_krpo.evaluate import checkpoints
from verl_krpo.evaluate.pass_at_k import majority_at, pass_at
from verl_krpo.report.intervals import p_value, resampled


@st.composite
def sampled(draw):
    """Answers of one problem; equal answers are equally right, none ("") is wrong."""
    answers = draw(st.lists(st.sampled_from(["", "a", "b", "c", "d"]), min_size=1, max_size=7))
    truth = draw(st.sampled_from(["a", "b", "z"]))
    return answers, [float(answer == truth) for answer in answers], draw(st.integers(1, len(answers)))


@given(sampled())
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(drawn):
    _, right, k = drawn
    subsets = list(itertools.combinations(right, k))
    expected = sum(max(subset) for subset in subsets) / len(subsets)
    assert pass_at(len(right), int(sum(right)), k) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("n", [1, 4, 16, 64])
def test_pass_at_k_closed_form(n):
    for c in range(n + 1):
        for k in range(1, n + 1):
            product = 1.0
            for i in range(k):  # every one of k draws wrong
                product *= (n - c - i) / (n - i) if n - c - i > 0 else 0.0
            assert pass_at(n, c, k) == pytest.approx(1 - product, abs=1e-12)
    assert pass_at(n, 0, n) == 0 and pass_at(n, n, 1) == 1


def voted(answers, right):
    """Mean correctness of the answers that are most frequent, over every way to break a tie."""
    counts = Counter(answer for answer in answers if answer)
    if not counts:
        return 0.0
    winners = [answer for answer, count in counts.items() if count == max(counts.values())]
    return float(np.mean([right[answers.index(winner)] for winner in winners]))


@settings(max_examples=300)
@given(sampled())
def test_majority_at_k_is_the_mean_over_subsets(drawn):
    answers, right, k = drawn
    subsets = list(itertools.combinations(range(len(answers)), k))
    expected = np.mean([voted([answers[i] for i in s], [right[i] for i in s]) for s in subsets])
    assert majority_at(answers, right, k) == pytest.approx(expected, abs=1e-12)


def test_majority_of_many_samples():
    answers = ["a"] * 40 + ["b"] * 24
    right = [1.0] * 40 + [0.0] * 24
    assert majority_at(answers, right, 64) == 1.0
    hypergeometric = sum(comb(40, a) * comb(24, 31 - a) for a in range(16, 32)) / comb(64, 31)
    assert majority_at(answers, right, 31) == pytest.approx(hypergeometric, rel=1e-12)


def entry(source, problem, session, right, pred, **extra):
    return {
        "input": f"user\n{source} {problem}\nassistant\n",
        "output": f"so \\boxed{{{pred}}}" if pred else "no idea",
        "gts": "7",
        "score": float(right),
        "step": 5,
        "reward": float(right),
        "acc": float(right),
        "uid": f"{source}{problem}_{session}_0",
        "pred": pred,
        "source": source,
        **extra,
    }


def drawn_entries(seed=0, shift=0.0, problems=12, n=4):
    rng = np.random.default_rng(seed)
    made = []
    for source, count in (("aime24", problems), ("math500", 2 * problems)):
        for problem in range(count):
            chance = np.clip((problem % 10) / 10 + shift, 0, 1)
            for session in range(n):
                right = rng.random() < chance
                made.append(entry(source, problem, session, right, "7" if right else str(rng.integers(0, 3) or "")))
    return made


def write_dump(folder, entries, step=5):
    """A dump in the folder, written by verl itself."""
    fields = {key: [e.get(key) for e in entries] for key in entries[0]}
    core = [fields.pop(key) for key in ("input", "output", "gts", "score")]
    fields.pop("step")
    PPOTrainer._write_generations(*core, fields, str(folder), step)
    return folder


def test_avg_at_k_equals_verl_s_mean_at_k(tmp_path):
    entries = drawn_entries()
    benchmarks = checkpoints.read(write_dump(tmp_path, entries))
    verl = process_validation_metrics(
        [e["source"] for e in entries], [e["uid"].split("_")[0] for e in entries], {"acc": [e["acc"] for e in entries]}
    )
    assert set(benchmarks) == {"aime24", "math500"}
    for name, benchmark in benchmarks.items():
        ours = checkpoints.summary(benchmark)["avg@4"]
        assert ours.value == pytest.approx(verl[name]["acc"]["mean@4"], abs=1e-12)
        assert ours.low < ours.value < ours.high


def test_summary_of_known_counts():
    problems = {
        ("p", "7"): checkpoints.Problem([1.0, 0.0, 0.0, 0.0], ["7", "1", "1", "2"]),
        ("q", "7"): checkpoints.Problem([1.0, 1.0, 1.0, 0.0], ["7", "7", "7", ""]),
    }
    made = {key: estimate.value for key, estimate in checkpoints.summary(problems).items()}
    assert made["avg@4"] == made["pass@1"] == pytest.approx(0.5)
    assert made["pass@2"] == pytest.approx((1 / 2 + 1) / 2)
    assert made["pass@4"] == 1.0 and made["maj@4"] == 0.5
    assert set(made) == {"avg@4"} | {f"{m}@{k}" for m in ("pass", "maj") for k in (1, 2, 4)}


def test_last_step_and_last_output_of_a_session(tmp_path):
    write_dump(tmp_path, [entry("aime24", 0, 0, False, "1")], step=9)
    write_dump(
        tmp_path,
        [
            entry("aime24", 0, 0, False, "1", uid="u_0_0"),
            entry("aime24", 0, 0, True, "7", uid="u_0_1", input="what the tool said, then the question"),
            entry("aime24", 0, 1, True, "7", uid="u_1_0"),
        ],
        step=10,
    )
    (tmp_path / "other.jsonl").write_text("{}\n")
    assert list(checkpoints.read(tmp_path)["aime24"].values()) == [checkpoints.Problem([1.0, 1.0], ["7", "7"])]
    assert len(next(iter(checkpoints.read(tmp_path / "9.jsonl")["aime24"].values())).right) == 1


def test_answers_are_found_where_the_reward_gave_none(tmp_path):
    plain = [
        {"input": "p", "output": output, "gts": "7", "score": 1.0, "acc": 1.0, "uid": f"u_{i}_0", "step": 5}
        for i, output in enumerate(["\\boxed{7}", "<think>\\boxed{1}</think><answer> 7 </answer>", "seven"])
    ]
    benchmarks = checkpoints.read(write_dump(tmp_path, plain))
    assert benchmarks["validation"]["p", "7"].answers == ["7", "7", ""]


def test_bootstrap_interval_has_its_coverage():
    rng = np.random.default_rng(0)
    intervals = [resampled(rng.random(60) < 0.3) for _ in range(300)]
    covered = np.mean([e.low <= 0.3 <= e.high for e in intervals])
    # 95 % nominal, a little less at 60 problems; the standard error over 300 trials is 0.013.
    assert 0.90 <= covered <= 0.98


def test_p_value_by_enumeration_and_by_drawing():
    assert p_value([0.0, 0.0]) == 1.0
    assert p_value([0.25] * 5) == pytest.approx(2 / 2**5)
    differences = [0.5, -0.25, 0.25, 0.75]
    reached = [abs(np.dot(s, differences)) >= sum(differences) - 1e-9 for s in itertools.product((-1, 1), repeat=4)]
    assert p_value(differences) == pytest.approx(np.mean(reached))
    many = list(np.random.default_rng(0).normal(0.2, 1, 200))
    z = np.sum(many) / np.sqrt(np.sum(np.square(many)))
    # The drawn p has a standard error of at most 0.005; at 200 terms the normal approximation is closer than that.
    assert p_value(many) == pytest.approx(erfc(abs(z) / sqrt(2)), abs=0.02)


def test_under_the_null_p_values_are_uniform():
    rng = np.random.default_rng(1)
    drawn = [p_value(rng.choice((-0.25, 0.0, 0.25), 30)) for _ in range(200)]
    # Binomial(200, 0.05) is above 0.105 with probability 0.001; discreteness only lowers it.
    assert np.mean(np.array(drawn) <= 0.05) <= 0.105


def test_compare_pairs_the_problems(tmp_path):
    before = checkpoints.read(write_dump(tmp_path / "a", drawn_entries(0)))["math500"]
    after = checkpoints.read(write_dump(tmp_path / "b", drawn_entries(1, shift=0.3)))["math500"]
    made = checkpoints.compare("math500", before, dict(list(after.items())[:20]))
    assert made.problems == 20 and made.left_out == 4
    keys = list(after)[:20]
    expected = np.mean([np.mean(after[k].right) - np.mean(before[k].right) for k in keys])
    assert made.difference.value == pytest.approx(expected)
    assert made.difference.low < expected < made.difference.high and made.p_value < 0.05
    assert checkpoints.compare("math500", before, before).p_value == 1.0
    with pytest.raises(ValueError, match="math500: the two dumps share no problem"):
        checkpoints.compare("math500", before, {("another", "7"): checkpoints.Problem([1.0], ["7"])})


def test_show(tmp_path, capsys):
    for run, seed, shift in (("grpo", 0, 0.0), ("krpo", 1, 0.3)):
        write_dump(tmp_path / run / "validation", drawn_entries(seed, shift))
    paths = [tmp_path / run / "validation" for run in ("grpo", "krpo")]
    table = checkpoints.show(paths, tmp_path / "out")
    text = capsys.readouterr().out
    rows = [line for line in text.splitlines() if "│" in line or "━" in line]
    assert max(map(len, rows)) <= 80 and sum("math500" in row for row in rows) == 2
    assert "krpo/validation minus grpo/validation" in text and "p = " in text
    with open(table, newline="") as file:
        cells = list(csv.DictReader(file))
    assert {cell["metric"] for cell in cells} >= {"avg@4", "pass@4", "maj@4", "avg difference"}
    value = next(c for c in cells if c["checkpoint"] == "grpo/validation" and c["metric"] == "avg@4")
    assert float(value["low"]) <= float(value["value"]) <= float(value["high"])
    assert (tmp_path / "out" / "evaluation.png").read_bytes().startswith(b"\x89PNG")


def test_one_sample_a_problem(tmp_path):
    write_dump(tmp_path, drawn_entries(n=1))
    assert checkpoints.show([tmp_path]) == tmp_path / "evaluation.csv"


def test_what_cannot_be_read_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="trainer.validation_data_dir"):
        checkpoints.read(tmp_path)
    (tmp_path / "3.jsonl").write_text(json.dumps({"input": "a", "output": "b"}) + "\n")
    with pytest.raises(ValueError, match=r"3.jsonl, line 1 .*'acc'"):
        checkpoints.read(tmp_path)
    (tmp_path / "3.jsonl").write_text("")
    with pytest.raises(ValueError, match="holds no samples"):
        checkpoints.read(tmp_path)
    with pytest.raises(ValueError, match="at least one dump"):
        checkpoints.show([])
    write_dump(tmp_path, drawn_entries(), step=3)
    with pytest.raises(ValueError, match="named twice"):
        checkpoints.show([tmp_path, tmp_path])
