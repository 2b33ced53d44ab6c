#!/usr/bin/env bash
# A further node of a Ray cluster, in the foreground: it ends with this script, or when the head is gone.
#
#   bash scripts/ray_worker.sh HEAD_IP[:PORT] [ray start options]
set -euo pipefail
[ $# -ge 1 ] || { sed -n '2,4p' "$0"; exit 2; }
head=$1
shift
[[ $head == *:* ]] || head=$head:6379

# ---- user-adjustable ----
PYTHON=${PYTHON:-python3}                 # the environment with verl and verl-krpo: workers run in it
NODE_IP=${NODE_IP:-$(hostname -I | cut -d ' ' -f 1)}
WAIT_SECONDS=${WAIT_SECONDS:-300}         # how long the head may take to come up
# -------------------------

"$PYTHON" -c 'import importlib.util as u, sys; sys.exit(any(u.find_spec(m) is None for m in ("ray", "verl", "verl_krpo")))' ||
    { echo "ray_worker.sh: ray, verl or verl-krpo is missing in $PYTHON on $(hostname): set PYTHON" >&2; exit 1; }
# The head's token: ~/.ray/auth_token of the head's user, copied here, shared, or in RAY_AUTH_TOKEN.
export RAY_AUTH_MODE=${RAY_AUTH_MODE:-token}
until (exec 3<> "/dev/tcp/${head%:*}/${head##*:}") 2> /dev/null; do
    [ "$SECONDS" -lt "$WAIT_SECONDS" ] ||
        { echo "ray_worker.sh: no Ray head at $head after $WAIT_SECONDS s: is scripts/ray_head.sh running there?" >&2; exit 1; }
    sleep 1
done
exec "$PYTHON" -m ray.scripts.scripts start --block --address="$head" --node-ip-address="$NODE_IP" \
    --disable-usage-stats "$@"
