#!/usr/bin/env bash
# KRPO with Qwen2.5: FSDP training, vLLM rollouts, the published settings (arXiv 2505.07527).
#
#   bash recipes/run_krpo_qwen.sh [verl overrides]
#   METHOD=grpo SEED=2 bash recipes/run_krpo_qwen.sh             the same job under another method
#   TASK=openmath TOPIC=probability bash recipes/run_krpo_qwen.sh
#   DRY_RUN=1 bash recipes/run_krpo_qwen.sh                      compose and validate, start nothing (no GPU needed)
#
# Needs GPUs and an environment with verl, vLLM and flash-attn (docs/recipes.md). Given again after a crash, the same
# command resumes at the last checkpoint.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- user-adjustable ----
MODEL_PATH=${MODEL_PATH:-Qwen/Qwen2.5-1.5B-Instruct}   # published: 0.5B and 1.5B; Qwen2.5-7B-Instruct for scale
METHOD=${METHOD:-krpo}                    # a file of recipes/config/method
TASK=${TASK:-arithmetic}                  # arithmetic or openmath
LEVEL=${LEVEL:-normal}                    # arithmetic: easy, normal or hard
TOPIC=${TOPIC:-algebra}                   # openmath: a topic of OpenMath-Instruct (docs/data.md)
SEED=${SEED:-1}
NNODES=${NNODES:-1}                       # more than one: on a Ray cluster (docs/clusters.md)
NGPUS_PER_NODE=${NGPUS_PER_NODE:-}        # empty: every GPU of this node
TRAIN_ROWS=${TRAIN_ROWS:-64000}           # arithmetic: one epoch of 2000 steps
TEST_ROWS=${TEST_ROWS:-1000}
case $TASK in arithmetic) part=$LEVEL ;; openmath) part=$TOPIC ;; *) echo "TASK=$TASK: arithmetic or openmath" >&2; exit 2 ;; esac
DATA_DIR=${DATA_DIR:-runs/data/${TASK}_$part}
SOURCE=${SOURCE:-}                        # empty: the hub; else OpenMath-Instruct is in SOURCE/openmath_instruct
RUN_DIR=${RUN_DIR:-runs/${METHOD}_${FAMILY:-qwen}_${TASK}_${part}_seed$SEED}
LOGGER=${LOGGER:-'["console","file","tensorboard"]'}
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
# -------------------------

source recipes/launch.sh
launch "krpo_$TASK" prepare_krpo \
    data.train_files="$DATA_DIR/train.parquet" \
    data.val_files="$DATA_DIR/test.parquet" \
    "$@"
