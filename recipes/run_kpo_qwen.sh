#!/usr/bin/env bash
# KPO on DAPO-Math with Qwen: FSDP training, vLLM rollouts, the published settings (arXiv 2602.10609).
#
#   bash recipes/run_kpo_qwen.sh [verl overrides]
#   METHOD=gspo SEED=2 bash recipes/run_kpo_qwen.sh              the same job under another method
#   DRY_RUN=1 bash recipes/run_kpo_qwen.sh                       compose and validate, start nothing (no GPU needed)
#
# Needs GPUs and an environment with verl, vLLM and flash-attn (docs/recipes.md). Given again after a crash, the same
# command resumes at the last checkpoint. Afterwards: bash recipes/eval_math.sh RUN_DIR/global_step_N
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- user-adjustable ----
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen3-4B}                  # published; also Qwen/Qwen2.5-1.5B-Instruct, Qwen2.5-7B-Instruct
METHOD=${METHOD:-kpo}                     # a file of recipes/config/method
SEED=${SEED:-1}
NNODES=${NNODES:-1}                       # more than one: on a Ray cluster (docs/clusters.md)
NGPUS_PER_NODE=${NGPUS_PER_NODE:-}        # empty: every GPU of this node (published: 2)
BENCHMARKS=${BENCHMARKS:-math500 aime24 aime25}   # followed while training
DATA_DIR=${DATA_DIR:-runs/data}
SOURCE=${SOURCE:-}                        # empty: the hub; else each data set is in SOURCE/its name
RUN_DIR=${RUN_DIR:-runs/${METHOD}_${FAMILY:-qwen}_math_seed$SEED}
LOGGER=${LOGGER:-'["console","file","tensorboard"]'}
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
# -------------------------

source recipes/launch.sh
launch kpo_math prepare_kpo \
    data.train_files="$DATA_DIR/dapo_math/train.parquet" \
    data.val_files="$(benchmark_files)" \
    "$@"
