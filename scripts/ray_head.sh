#!/usr/bin/env bash
# The head of a Ray cluster, in the foreground: it ends with this script.
#
#   bash scripts/ray_head.sh [ray start options]
#
# Then on every other node: bash scripts/ray_worker.sh HEAD_IP; and here:
#
#   export RAY_ADDRESS=HEAD_IP:6379 RAY_AUTH_MODE=token
#   NNODES=2 NGPUS_PER_NODE=8 bash recipes/run_krpo_qwen.sh
set -euo pipefail

# ---- user-adjustable ----
PYTHON=${PYTHON:-python3}                 # the environment with verl and verl-krpo: workers run in it
PORT=${PORT:-6379}
NODE_IP=${NODE_IP:-$(hostname -I | cut -d ' ' -f 1)}
# -------------------------

"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("ray", "verl", "verl_krpo")))' ||
    { echo "ray_head.sh: ray, verl or verl-krpo is missing in $PYTHON on $(hostname): set PYTHON" >&2; exit 1; }
# Whoever reaches the port could run code on the cluster: Ray asks for a token, the same file or variable on every node.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
[ "$RAY_AUTH_MODE" != token ] || "$PYTHON" -m ray.scripts.scripts get-auth-token --generate > /dev/null
echo "Ray head at $NODE_IP:$PORT; on the other nodes: bash scripts/ray_worker.sh $NODE_IP:$PORT"
echo "and where the job starts: export RAY_ADDRESS=$NODE_IP:$PORT RAY_AUTH_MODE=$RAY_AUTH_MODE"
exec "$PYTHON" -m ray.scripts.scripts start --head --block --node-ip-address="$NODE_IP" --port="$PORT" \
    --disable-usage-stats "$@"
