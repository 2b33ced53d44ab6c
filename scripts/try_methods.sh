#!/usr/bin/env bash
# Trains two steps of every METHOD in verl without a GPU, about a minute each, and says what became of them.
#
#   bash scripts/try_methods.sh [METHOD...]       every file of recipes/config/method if none is given
#
# Prints a table of METHOD, outcome, mean reward and gradient norm of step 2; a run's log is runs/try/METHOD/log.txt. Exit
# status: how many failed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

methods=("$@")
[ $# -gt 0 ] || mapfile -t methods < <(basename -s .yaml recipes/config/method/*.yaml)
python=$(bash scripts/setup.sh cpu)
small=(
    data.train_batch_size=8 data.max_response_length=16 actor_rollout_ref.rollout.n=4
    actor_rollout_ref.actor.ppo_mini_batch_size=4      # two updates a batch: the ratio moves
    trainer.val_before_train=false trainer.test_freq=-1 trainer.save_freq=-1
)
failed=0
echo "| METHOD | outcome | reward | gradient norm |"
echo "| --- | --- | --- | --- |"
for method in "${methods[@]}"; do
    run=runs/try/$method
    rm -rf "$run"
    mkdir -p "$run"
    if METHOD=$method STEPS=2 RUN_DIR=$run bash recipes/run_krpo_cpu.sh "${small[@]}" > "$run.out" 2>&1; then
        "$python" - "$method" "$run" <<'PY'
import sys

from verl_krpo.runs import log

method, run = sys.argv[1:]
last = log.rows(run)[2]
print(f"| {method} | trained | {last['critic/score/mean']:.3f} | {last['actor/grad_norm']:.3g} |", flush=True)
PY
    else
        echo "| $method | **failed**: $run.out | | |"
        failed=$((failed + 1))
    fi
done
exit "$failed"
