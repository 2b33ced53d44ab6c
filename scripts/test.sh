#!/usr/bin/env bash
# Sets up an environment if there is none, then lints, checks types and tests, on two cores.
#
#   bash scripts/test.sh                        every test without a real verl run, and one real run: KRPO with KPO, resumed
#   bash scripts/test.sh all                    every test: killed jobs, lost nodes, layouts, vLLM where it is installed
#   bash scripts/test.sh ci                     all but what is marked nightly
#   bash scripts/test.sh -n 2 -m "not e2e"      what starts with - goes to pytest, once
#
# The last lines say what was left out, and why.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case ${1:-} in
    "") quick="not e2e or quick" real= ;;
    all) quick="not e2e" real="e2e" ;;
    ci) quick="not e2e" real="e2e and not nightly" ;;
    -*) ;;
    *) sed -n '2,9s/^# \{0,1\}//p' "$0" >&2; exit 2 ;;
esac

python=$(bash scripts/setup.sh dev)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}   # Ray workers and torch threads would fight over few cores
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m basedpyright --pythonpath "$python"
[[ ${1:-} != -* ]] || exec "$python" -m pytest "$@"
failed=0
part() { "$python" -m pytest "$@" || [ $? -eq 5 ] || failed=1; }   # 5: PYTEST_ADDOPTS chose no test of this part
part -n 2 --dist worksteal -m "$quick"
[ -z "$real" ] || part -m "$real" --durations=25
exit $failed
