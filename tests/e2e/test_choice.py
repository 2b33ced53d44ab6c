"""A memory that chooses prompts and numbers of responses, in real jobs on the CPU."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest

pytestmark = pytest.mark.e2e

HERE = Path(__file__).parent
ACTOR, ROLLOUT, MEMORY = "actor_rollout_ref.actor", "actor_rollout_ref.rollout", "algorithm.krpo_memory"
JOB = [
    "+algorithm=krpo_memory",
    "data.train_batch_size=8",
    "data.train_max_samples=32",
    "data.seed=1",
    "data.max_prompt_length=32",
    "data.max_response_length=16",
    f"{ACTOR}.ppo_mini_batch_size=4",
    f"{ROLLOUT}.n=4",
    "trainer.logger=[console,file]",
    "trainer.test_freq=-1",
    "trainer.val_before_train=False",
    f"reward.custom_reward_function.path={HERE}/unruly.py",
    "reward.custom_reward_function.name=by_prompt",
]


def groups(rollouts: Path, step: int) -> list[tuple[bool, int]]:
    """Of each prompt of a step by verl's own dump: whether its rewards can differ, and how many responses it got."""
    rows = [json.loads(line) for line in (rollouts / f"{step}.jsonl").read_text().splitlines()]
    counts = Counter((row["uid"].split("_")[0], int(row["gts"]) % 3 == 1) for row in rows)
    return [(teaches, count) for (_, teaches), count in counts.items()]


@pytest.mark.timeout(1800)  # two jobs, one after the other
@pytest.mark.parametrize("objective", ["signal", pytest.param("same", marks=pytest.mark.nightly)])
def test_a_job_chooses_and_goes_on(verl_job, tmp_path, objective):
    job = [
        *JOB,
        f"{MEMORY}.select=signal",
        f"{MEMORY}.objective={objective}",
        f"{MEMORY}.allocate=signal",
        f"trainer.default_local_dir={tmp_path}/checkpoints",
        f"trainer.rollout_data_dir={tmp_path}/rollouts",
        "trainer.save_freq=4",
    ]
    first = verl_job(*job, "trainer.total_training_steps=8")
    later = verl_job(*job, "trainer.total_training_steps=10")
    assert sorted(later.metrics) == [9, 10] and "krpo remembers" in later.output
    metrics = {**first.metrics, **later.metrics}
    found = {step: groups(tmp_path / "rollouts", step) for step in metrics}
    for step, data in metrics.items():
        assert math.isfinite(data["actor/pg_loss"]) and data["krpo/groups"] == len(found[step]) == 8
        counts = [count for _, count in found[step]]
        assert sum(counts) == 32
        assert counts == [4] * 8 or step > 1  # nothing is known before the first step
        assert ("krpo/effective_prompts" in data) == (objective == "same")
        assert 0 <= data["krpo/dead"] <= 1
    ends = [group for step in (7, 8, 9, 10) for group in found[step]]
    given = {kind: [count for teaches, count in ends if teaches == kind] for kind in (True, False)}
    assert sum(given[True]) / len(given[True]) > 4 > sum(given[False]) / len(given[False])
    if objective == "signal":
        assert len(given[True]) > len(ends) / 3  # of all sums a third
        assert metrics[10]["krpo/rollouts_saved"] > 0
    else:
        assert all(1 <= data["krpo/effective_prompts"] <= 8 for data in metrics.values())
