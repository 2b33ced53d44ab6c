#!/usr/bin/env bash
# Sets up an environment if there is none, then lints and runs every test.
#
#   bash scripts/test.sh                   everything, real verl runs included
#   bash scripts/test.sh -m "not e2e"      what follows goes to pytest
#
# JOBS (2) processes share the tests; real verl runs stay in one of them.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh dev)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # Ray workers and torch threads would fight over few cores
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m basedpyright --pythonpath "$python"
exec "$python" -m pytest -n "${JOBS:-2}" --dist loadgroup "$@"
