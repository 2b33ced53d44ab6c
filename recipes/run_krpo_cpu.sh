#!/usr/bin/env bash
# KRPO without a GPU: verl's own trainer teaches a tiny model to add, in a few minutes on two cores.
#
#   bash recipes/run_krpo_cpu.sh [verl overrides]
#   METHOD=grpo SEED=2 bash recipes/run_krpo_cpu.sh              the same job under another method
#   MODEL_PATH=FOLDER DATA_DIR=FOLDER bash recipes/run_krpo_cpu.sh data.max_prompt_length=256 [...]
#       a model and data of your own: a folder of transformers' or a name on the hub, and train.parquet and test.parquet
#       with verl's columns (the tiny model and the sums are made only where these are not set)
#
# Sets up .venv if there is no environment yet; data, model, log, metrics, checkpoints and figure go to runs/. Given again
# after a crash, the same command resumes at the last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- user-adjustable ----
METHOD=${METHOD:-krpo}                    # a file of recipes/config/method
SEED=${SEED:-1}
STEPS=${STEPS:-30}                       # 100 for the curves of docs/results.md
ROLLOUT=${ROLLOUT:-hf}                    # what generates: hf (transformers), or vllm
MODEL_PATH=${MODEL_PATH:-}                # empty: the tiny model, made in runs/model/tiny
DATA_DIR=${DATA_DIR:-}                    # empty: sums of two numbers, made in runs/data/sums
RUN_DIR=${RUN_DIR:-runs/${METHOD}_cpu_seed$SEED}
LOGGER=${LOGGER:-'["console","file"]'}
# -------------------------

python=$(bash scripts/setup.sh "$([ "$ROLLOUT" = vllm ] && echo vllm || echo cpu)")
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

if [[ -z $DATA_DIR ]]; then
    DATA_DIR=runs/data/sums
    echo "[1/4] data: sums of two numbers"
    "$python" -m verl_krpo data arithmetic --level sums --out "$DATA_DIR"
else
    echo "[1/4] data: $DATA_DIR, as it is"
fi
if [[ -z $MODEL_PATH ]]; then
    MODEL_PATH=runs/model/tiny
    export HF_HUB_OFFLINE=1
    echo "[2/4] model: a tiny Qwen2, warm-started: about a minute"
    "$python" -m verl_krpo tiny-model --out "$MODEL_PATH"   # two threads wait for each other on a busy machine: 4 x the time
else
    echo "[2/4] model: $MODEL_PATH, as it is"
    [[ -d $MODEL_PATH ]] || "$python" -c 'import sys, huggingface_hub as hub; hub.snapshot_download(sys.argv[1])' "$MODEL_PATH"
fi

echo "[3/4] training: $STEPS steps with $METHOD, 2 s each after half a minute; verl's own output goes to $RUN_DIR/log.txt"
[[ $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR
export VERL_PLATFORM=cpu VERL_FILE_LOGGER_PATH="$RUN_DIR/metrics.jsonl"
"$python" -m verl_krpo run --quiet "$RUN_DIR" "$python" -m verl.trainer.main_ppo --config-path "$PWD/recipes/config" --config-name arithmetic_cpu \
    method="$METHOD" \
    data.train_files="$DATA_DIR/train.parquet" \
    data.val_files="$DATA_DIR/test.parquet" \
    data.seed="$SEED" \
    actor_rollout_ref.model.path="$MODEL_PATH" \
    actor_rollout_ref.rollout.name="$ROLLOUT" \
    trainer.total_training_steps="$STEPS" \
    trainer.logger="$LOGGER" \
    trainer.experiment_name="$(basename "$RUN_DIR")" \
    trainer.default_local_dir="$RUN_DIR" \
    "$@"

echo "[4/4] result"
"$python" -m verl_krpo curves "$RUN_DIR"
