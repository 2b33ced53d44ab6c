#!/usr/bin/env bash
# Sets up an environment if there is none, then lints and runs every test.
#
#   bash scripts/test.sh                        everything: on two cores what needs no real verl run, then the real runs
#   bash scripts/test.sh -n 2 -m "not e2e"      what follows goes to pytest, once
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh dev)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # Ray workers and torch threads would fight over few cores
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m basedpyright --pythonpath "$python"
[ $# -eq 0 ] || exec "$python" -m pytest "$@"
failed=0
part() { "$python" -m pytest "$@" || [ $? -eq 5 ] || failed=1; }   # 5: PYTEST_ADDOPTS chose no test of this part
part -n 2 -m "not e2e"
part -m e2e --durations=25
exit $failed
