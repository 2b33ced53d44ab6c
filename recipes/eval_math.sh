#!/usr/bin/env bash
# Evaluate a model on the mathematics benchmarks: 16 answers a problem, then avg@16, pass@k and maj@k with intervals.
#
#   bash recipes/eval_math.sh CKPT [verl overrides]
#
# CKPT: a checkpoint of a run (RUN_DIR/global_step_N), a folder as transformers saves it, or a model of the hub.
# Needs GPUs, as the training recipes do. Two evaluations are compared by: verl-krpo evaluate --help
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,7p' "$0"; exit 2; }
CKPT=$1
shift
[ ! -e "$CKPT" ] || CKPT=$(realpath "$CKPT")
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- user-adjustable ----
BENCHMARKS=${BENCHMARKS-math500 aime24 aime25 amc23 minerva olympiadbench}   # empty: data.val_files is yours
SEED=${SEED:-1}
NNODES=${NNODES:-1}
NGPUS_PER_NODE=${NGPUS_PER_NODE:-}        # empty: every GPU of this node
DATA_DIR=${DATA_DIR:-runs/data}
SOURCE=${SOURCE:-}                        # empty: the hub; else each data set is in SOURCE/its name
RUN_DIR=${RUN_DIR:-runs/eval/$(basename "$(dirname "$CKPT")")_$(basename "$CKPT")}
LOGGER=${LOGGER:-'["console","file"]'}
PYTHON=${PYTHON:-python3}
DRY_RUN=${DRY_RUN:-}
# -------------------------

METHOD=grpo MODEL_PATH=$CKPT
source recipes/launch.sh

# verl saves shards, one a rank: joined once into a folder that transformers reads.
if [ -d "$CKPT/actor" ]; then
    MODEL_PATH=$CKPT/merged
    if [ -z "$DRY_RUN" ] && [ ! -f "$MODEL_PATH/config.json" ]; then
        "$PYTHON" -m verl.model_merger merge --backend fsdp --local_dir "$CKPT/actor" --target_dir "$MODEL_PATH"
    fi
fi

files=$(benchmark_files)
(launch eval_math prepare_benchmarks \
    data.train_files="$files" \
    data.val_files="$files" \
    trainer.validation_data_dir="$(realpath -m "$RUN_DIR")/samples" \
    "$@")
[ -n "$DRY_RUN" ] || "$PYTHON" -m verl_krpo evaluate "$RUN_DIR/samples"
