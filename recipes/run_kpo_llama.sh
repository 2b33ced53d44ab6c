#!/usr/bin/env bash
# KPO with Llama-3.2-3B-Instruct: as run_kpo_qwen.sh (its knobs and overrides hold here too), with another model.
#
#   bash recipes/run_kpo_llama.sh [verl overrides]
#
# The model's license has to be accepted on the hub; MODEL_PATH can name a folder instead.
set -euo pipefail
export FAMILY=llama MODEL_PATH=${MODEL_PATH:-meta-llama/Llama-3.2-3B-Instruct}
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_kpo_qwen.sh" "$@"
