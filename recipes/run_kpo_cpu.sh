#!/usr/bin/env bash
# KPO without a GPU: as run_krpo_cpu.sh (its knobs and overrides hold here too), with KPO's loss on GRPO's advantages.
#
#   bash recipes/run_kpo_cpu.sh [verl overrides]
#
# Four updates a batch, since the importance ratio is 1 in the first, and a process variance at which the filter does
# something on answers of a handful of tokens (the published 1e-6 is made for thousands).
set -euo pipefail
export METHOD=${METHOD:-kpo}
overrides=(actor_rollout_ref.actor.ppo_mini_batch_size=4 actor_rollout_ref.actor.optim.lr=5e-5)
case $METHOD in *kpo*) overrides+=(actor_rollout_ref.actor.policy_loss.kpo.process_var=1e-3) ;; esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/run_krpo_cpu.sh" "${overrides[@]}" "$@"
