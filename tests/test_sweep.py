"""scripts/sweep.sh with a recipe that logs instead of training: which runs, which lines, what is done again."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

RECIPE = """
echo "$METHOD $SEED $*" >> {calls}
[ -z "${{CALLS_ONLY:-}}" ] || exit 0
[ "$SEED" != "${{BAD_SEED:-}}" ] || {{ echo "CUDA out of memory" >&2; exit 1; }}
{python} -m verl_krpo run "$RUN_DIR" {python} -c '
import json, os, sys
row = {{"step": 7, "data": {{"critic/score/mean": 0.25, "timing_s/step": 36, "val-core/sums/acc/mean@1": 0.5}}}}
open(os.path.join(sys.argv[1], "metrics.jsonl"), "w").write(json.dumps(row) + chr(10))' "$RUN_DIR"
"""


@pytest.fixture
def sweep(tmp_path):
    """sweep(NAME, *overrides, **knobs) -> (exit status, lines of output, runs that were started)."""
    recipe, calls = tmp_path / "recipe.sh", tmp_path / "calls.txt"
    recipe.write_text(RECIPE.format(calls=calls, python=sys.executable))

    def run(*arguments: str, **knobs: str) -> tuple[int, list[str], list[str]]:
        calls.write_text("")
        ours = {"RECIPE": str(recipe), "SWEEP_DIR": str(tmp_path / "sweep"), "PYTHON": sys.executable}
        done = subprocess.run(
            ["bash", ROOT / "scripts/sweep.sh", *arguments],
            env=os.environ | ours | knobs,
            capture_output=True,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout.splitlines(), calls.read_text().splitlines()

    return run


def test_a_line_for_every_run_and_nothing_twice(sweep, tmp_path):
    status, lines, calls = sweep("group_size", "trainer.test_freq=5", SEEDS="1 2", VALUES="4 8")
    assert status == 0
    assert [line.split("\t") for line in lines] == [
        [f"group_size={n}", method, f"seed {seed}", "steps 7 reward 0.25 accuracy 0.5 hours 0.01"]
        for n in (4, 8)
        for method in ("krpo", "grpo")
        for seed in (1, 2)
    ]
    assert calls[0] == "krpo 1 actor_rollout_ref.rollout.n=4 trainer.test_freq=5" and len(calls) == 8
    assert (tmp_path / "sweep/results.tsv").read_text().splitlines() == lines
    runs = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/*/metrics.jsonl")}
    assert len(runs) == 8
    again = sweep("group_size", "trainer.test_freq=5", SEEDS="1 2", VALUES="4 8")
    assert again[:2] == (0, lines)
    assert {path: path.stat().st_mtime_ns for path in runs} == runs  # nothing was trained again


def test_a_failed_run_is_named_does_not_stop_the_sweep_and_is_done_the_next_time(sweep):
    status, lines, calls = sweep("krpo_measurement_var", SEEDS="1 2 3", VALUES="1e-2", BAD_SEED="2")
    assert status == 1 and len(calls) == 3
    assert "seed 2\tfailed: CUDA out of memory" in lines[1]
    assert "reward 0.25" in lines[0] and "reward 0.25" in lines[2]
    status, lines, _ = sweep("krpo_measurement_var", SEEDS="1 2 3", VALUES="1e-2")
    assert status == 0 and all("reward 0.25" in line for line in lines)


@pytest.mark.parametrize(
    "name, first, count",
    [
        ("method", "cispo 1 ", len(list((ROOT / "recipes/config/method").glob("*.yaml")))),
        ("kl", "krpo 1 actor_rollout_ref.actor.kl_loss_coef=0 actor_rollout_ref.actor.use_kl_loss=true", 3),
        ("krpo_process_var", "krpo 1 algorithm.krpo.process_var=0", 5),
        ("krpo_measurement_var", "krpo 1 algorithm.krpo.measurement_var=1e-3", 4),
        ("kpo_process_var", "kpo 1 actor_rollout_ref.actor.policy_loss.kpo.process_var=1e-7", 5),
        ("kpo_measurement_var", "kpo 1 actor_rollout_ref.actor.policy_loss.kpo.measurement_var=0.1", 3),
        ("clip", "kpo 1 actor_rollout_ref.actor.clip_ratio_low=3e-4 actor_rollout_ref.actor.clip_ratio_high=4e-4", 4),
    ],
)
def test_every_sweep_gives_overrides_that_compose(sweep, compose, name, first, count):
    status, lines, calls = sweep(name, SEEDS="1", CALLS_ONLY="1")
    assert status == 0 and len(lines) == len(calls) == count
    assert calls[0].startswith(first)
    paths = ["data.train_files=a", "data.val_files=b", "trainer.default_local_dir=run"]
    for call in {calls[0], calls[-1]}:
        method, _, *overrides = call.split()
        compose(f"method={method}", *paths, *overrides, name="krpo_arithmetic")


def test_methods_can_be_chosen(sweep):
    status, lines, calls = sweep("method", SEEDS="1 2", VALUES="rloo krpo_adaptive", CALLS_ONLY="1")
    assert status == 0 and [call.split()[:2] for call in calls] == [
        [method, seed] for method in ("rloo", "krpo_adaptive") for seed in ("1", "2")
    ]
    assert lines[2].startswith("krpo_adaptive\tseed 1\t")


def test_an_unknown_sweep_shows_the_names(sweep):
    status, lines, calls = sweep("krpo_q")
    assert status == 2 and calls == []
    assert any("krpo_process_var" in line for line in lines)
