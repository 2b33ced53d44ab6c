# Sourced by the recipes for GPUs: from their knobs to a verl job. Not a script of its own.
#
# Knobs it reads: METHOD SEED MODEL_PATH NNODES NGPUS_PER_NODE SOURCE RUN_DIR LOGGER PYTHON DRY_RUN.

stop() { echo "$(basename "$0"): $1" >&2; echo "  -> $2" >&2; exit 1; }

# launch CONFIG PREPARE OVERRIDES...: look at the machine, call the function PREPARE for the data, train in RUN_DIR.
# With DRY_RUN, only compose and validate. The job takes the shell's place, so that a signal to the recipe reaches it.
launch() {
    local config=$1 prepare=$2
    shift 2
    "$PYTHON" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("verl", "verl_krpo")))' ||
        stop "verl or verl-krpo is missing in $PYTHON" "pip install -e . in your verl environment, or set PYTHON"
    [[ $RUN_DIR == /* ]] || RUN_DIR=$PWD/$RUN_DIR
    if [ -z "$NGPUS_PER_NODE" ]; then
        NGPUS_PER_NODE=$("$PYTHON" -c 'import torch; print(torch.cuda.device_count() or 8)')
    fi

    local job=(
        --config-path "$PWD/recipes/config" --config-name "$config"
        method="$METHOD"
        data.seed="$SEED"
        actor_rollout_ref.model.path="$MODEL_PATH"
        actor_rollout_ref.actor.data_loader_seed="$SEED"
        trainer.nnodes="$NNODES"
        trainer.n_gpus_per_node="$NGPUS_PER_NODE"
        trainer.logger="$LOGGER"
        trainer.experiment_name="$(basename "$RUN_DIR")"
        trainer.default_local_dir="$RUN_DIR"
        # Through Ray, since a cluster's workers do not inherit this shell's environment.
        +ray_kwargs.ray_init.runtime_env.env_vars.VERL_FILE_LOGGER_PATH="$RUN_DIR/metrics.jsonl"
        +ray_kwargs.ray_init.runtime_env.env_vars.TENSORBOARD_DIR="$RUN_DIR/tensorboard"
        "$@"
    )
    if [ -n "$DRY_RUN" ]; then
        exec "$PYTHON" -m verl_krpo check "${job[@]}"
    fi
    "$PYTHON" -m verl_krpo preflight --prepares-data "${job[@]}" || exit 1
    "$prepare"
    exec "$PYTHON" -m verl_krpo run "$RUN_DIR" "$PYTHON" -m verl.trainer.main_ppo "${job[@]}"
}

# dataset NAME FOLDER OPTIONS...: from the hub, or from SOURCE/NAME.
dataset() {
    local name=$1 folder=$2
    shift 2
    "$PYTHON" -m verl_krpo data "$name" --out "$folder" ${SOURCE:+--source "$SOURCE/$name"} "$@"
}

# The data of KRPO's experiments, by TASK: arithmetic (LEVEL) or openmath (TOPIC).
prepare_krpo() {
    case $TASK in
        arithmetic) "$PYTHON" -m verl_krpo data arithmetic --level "$LEVEL" --seed 1 \
            --train "$TRAIN_ROWS" --test "$TEST_ROWS" --out "$DATA_DIR" ;;
        openmath) dataset openmath_instruct "$DATA_DIR" --topic "$TOPIC" ;;
    esac
}

# The benchmarks in BENCHMARKS, and their test files as a list for data.val_files.
prepare_benchmarks() {
    local name
    for name in $BENCHMARKS; do dataset "$name" "$DATA_DIR/$name"; done
}
benchmark_files() {
    local name files=()
    for name in $BENCHMARKS; do files+=("$DATA_DIR/$name/test.parquet"); done
    (IFS=,; echo "[${files[*]}]")
}

# The data of KPO's experiment: DAPO-Math to train on, and the benchmarks that follow the training.
prepare_kpo() {
    dataset dapo_math "$DATA_DIR/dapo_math"
    prepare_benchmarks
}
