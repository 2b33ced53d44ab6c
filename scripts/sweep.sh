#!/usr/bin/env bash
# The ablations of both papers over seeds: a run for every setting and seed, a line of output for every finished run.
#
#   bash scripts/sweep.sh NAME [verl overrides]
#   RECIPE=recipes/run_krpo_cpu.sh SEEDS="1 2" STEPS=20 bash scripts/sweep.sh group_size
#
#   NAME                    what changes
#   method                  nothing but the method: all of recipes/config/method, or VALUES="rloo krpo_adaptive"
#   group_size              responses a prompt, krpo against grpo
#   kl                      weight of the KL term (arXiv 2505.07527: 0, 0.01, 0.05)
#   krpo_process_var        Q of krpo
#   krpo_measurement_var    R of krpo (arXiv 2505.07527: 1e-3 is unstable)
#   kpo_process_var         Q of kpo (arXiv 2602.10609: larger Q/R degrades)
#   kpo_measurement_var     R of kpo
#   clip                    clip range of kpo, and none
#
# Around the published value the grids are ours, but for the KL weight's. A run that is finished is not run again: after a
# crash or an interruption, give the same command again. The lines are kept in SWEEP_DIR/results.tsv too.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
name=${1:-}
[ $# -eq 0 ] || shift

# ---- user-adjustable ----
case $name in kpo* | clip) default=recipes/run_kpo_qwen.sh ;; *) default=recipes/run_krpo_qwen.sh ;; esac
RECIPE=${RECIPE:-$default}                # its own knobs (MODEL_PATH, STEPS, ...) are taken from the environment
SEEDS=${SEEDS:-1 2 3}
VALUES=${VALUES:-}                        # other values than the sweep's own
SWEEP_DIR=${SWEEP_DIR:-runs/sweep/$name}
# -------------------------

krpo=algorithm.krpo actor=actor_rollout_ref.actor
kpo=$actor.policy_loss.kpo
methods=krpo
case $name in
    method)               methods=${VALUES:-$(basename -s .yaml recipes/config/method/*.yaml)}; VALUES= values=- key= ;;
    group_size)           key=actor_rollout_ref.rollout.n    values="4 8 12 16"; methods="krpo grpo" ;;
    kl)                   key=$actor.kl_loss_coef            values="0 0.01 0.05"; set -- $actor.use_kl_loss=true "$@" ;;
    krpo_process_var)     key=$krpo.process_var              values="0 1e-6 1e-5 1e-4 1e-3" ;;
    krpo_measurement_var) key=$krpo.measurement_var          values="1e-3 1e-2 1e-1 1" ;;
    kpo_process_var)      key=$kpo.process_var               values="1e-7 1e-6 1e-5 1e-4 1e-2"; methods=kpo ;;
    kpo_measurement_var)  key=$kpo.measurement_var           values="0.1 1 10"; methods=kpo ;;
    clip)                 key=clip                           values="3e-4,4e-4 3e-3,4e-3 0.2,0.2 none"; methods=kpo ;;
    *) sed -n '2,20p' "$0"; exit 2 ;;
esac

overrides_for() { # the overrides of one value
    case $key,$1 in
        ,*) ;;
        clip,none) echo "$kpo.clip=false" ;;
        clip,*) echo "$actor.clip_ratio_low=${1%,*} $actor.clip_ratio_high=${1#*,}" ;;
        *) echo "$key=$1" ;;
    esac
}

PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo "$PWD/.venv/bin/python" || echo python3)}
mkdir -p "$SWEEP_DIR"
results=$SWEEP_DIR/results.tsv
: > "$results"
failed=0
for value in ${VALUES:-$values}; do
    for method in $methods; do
        for seed in $SEEDS; do
            run=$SWEEP_DIR/${method}_${value}_seed$seed
            label="$name=$value	$method	seed $seed"
            [ "$name" != method ] || run=$SWEEP_DIR/${method}_seed$seed label="$method	seed $seed"
            mkdir -p "$run"
            if METHOD=$method SEED=$seed RUN_DIR=$run bash "$RECIPE" $(overrides_for "$value") "$@" \
                > "$run/recipe.txt" 2>&1 < /dev/null
            then
                echo "$label	$("$PYTHON" -m verl_krpo run "$run")" | tee -a "$results"
            else
                failed=$((failed + 1))
                echo "$label	failed: $(tail -n 1 "$run/recipe.txt") (all of it: $run/recipe.txt)" | tee -a "$results"
            fi
        done
    done
done
[ "$failed" -eq 0 ] || { echo "$failed runs failed: see why, and give the same command again" >&2; exit 1; }
