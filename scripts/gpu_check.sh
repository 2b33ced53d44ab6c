#!/usr/bin/env bash
# Does all of it run on this GPU? About half an hour; ends in a table, and in one JSON file to attach to an issue.
#
#   bash scripts/gpu_check.sh
#   VERL_PLATFORM=cpu bash scripts/gpu_check.sh        a rehearsal without a GPU
#
# KRPO and KPO, ten steps each, with vLLM and with hf, under the configs of the GPU recipes, on a tiny model that is built
# on the spot; one of them resumed; what the loss costs on the device. Nothing is downloaded. Given again after a crash,
# what is finished is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- user-adjustable ----
PYTHON=${PYTHON:-}                        # the environment with verl, vLLM and verl-krpo; empty: python3's, in a rehearsal .venv
OUT=${OUT:-runs/gpu_check}
ROLLOUTS=${ROLLOUTS:-vllm hf}
STEPS=${STEPS:-10}
ROUNDS=${ROUNDS:-15}                      # of each measurement of bench
RUN_SECONDS=${RUN_SECONDS:-1200}          # a run that takes longer is ended, and the table says so
# -------------------------

[[ $OUT == /* ]] || OUT=$PWD/$OUT
mkdir -p "$OUT"
export HF_HUB_OFFLINE=1
device=cuda
[ "${VERL_PLATFORM:-}" != cpu ] || device=cpu
if [ -z "$PYTHON" ]; then
    PYTHON=python3
    [ $device = cuda ] || PYTHON=$(bash scripts/setup.sh vllm)
fi
"$PYTHON" -c 'import verl, verl_krpo' || { echo "verl or verl-krpo is missing in $PYTHON: docs/recipes.md, or set PYTHON" >&2; exit 1; }

echo "[1/5] doctor"
"$PYTHON" -m verl_krpo doctor --json > "$OUT/doctor.json" || echo "doctor found something: $OUT/doctor.json"
echo "[2/5] a tiny model and its data"
"$PYTHON" -m verl_krpo tiny-model --out "$OUT/model"
"$PYTHON" -m verl_krpo data arithmetic --level sums --out "$OUT/sums" --test 64

# As the recipes, with the lengths of the tiny model and its task. Its attention heads are of 32, which flash-attn and
# sdpa both take: sdpa needs no further package.
train() { # NAME CONFIG ROLLOUT STEPS OVERRIDES...
    local run=$OUT/$1 config=$2 rollout=$3 steps=$4
    shift 4
    mkdir -p "$run"
    if [ -f "$run/metrics.$steps.jsonl" ]; then echo "      $run: done before"; return; fi
    VERL_FILE_LOGGER_PATH=$run/metrics.jsonl timeout "$RUN_SECONDS" "$PYTHON" -m verl.trainer.main_ppo \
        --config-path "$PWD/recipes/config" --config-name "$config" \
        data.train_files="$OUT/sums/train.parquet" data.val_files="$OUT/sums/test.parquet" \
        data.train_batch_size=16 data.max_prompt_length=32 data.max_response_length=40 \
        reward.custom_reward_function.path=pkg://verl_krpo.reward.answer_tag \
        actor_rollout_ref.model.path="$OUT/model" \
        actor_rollout_ref.model.use_remove_padding=false \
        +actor_rollout_ref.model.override_config.attn_implementation=sdpa \
        actor_rollout_ref.actor.ppo_mini_batch_size=8 actor_rollout_ref.actor.optim.lr=1e-4 \
        actor_rollout_ref.rollout.name="$rollout" actor_rollout_ref.rollout.max_model_len=128 \
        trainer.n_gpus_per_node=1 trainer.total_training_steps="$steps" trainer.total_epochs=100 \
        trainer.val_before_train=true trainer.test_freq="$STEPS" trainer.save_freq="$STEPS" \
        trainer.logger='[console,file]' trainer.default_local_dir="$run" "$@" > "$run/log.$steps.txt" 2>&1 ||
        { echo "      failed: $run/log.$steps.txt" >&2; return; }
    mv "$run/metrics.jsonl" "$run/metrics.$steps.jsonl"
}

echo "[3/5] training: $STEPS steps of each"
for rollout in $ROLLOUTS; do
    echo "      KRPO, $rollout"; train "krpo_$rollout" krpo_arithmetic "$rollout" "$STEPS"
    echo "      KPO, $rollout";  train "kpo_$rollout" kpo_math "$rollout" "$STEPS"
done
first=${ROLLOUTS%% *}
echo "[4/5] KRPO, $first: two steps more, from the checkpoint"
train "krpo_$first" krpo_arithmetic "$first" $((STEPS + 2))

echo "[5/5] what it costs on $device"
for table in filter kpo; do
    [ -f "$OUT/bench_$table.json" ] || "$PYTHON" -m verl_krpo bench "$table" --device "$device" --rounds "$ROUNDS" \
        --json "$OUT/bench_$table.json" > "$OUT/bench_$table.md" || echo "bench $table failed" >&2
done
set -- $ROLLOUTS
exec "$PYTHON" scripts/gpu_check_table.py "$OUT" $((2 * $# + 1)) "$device"
