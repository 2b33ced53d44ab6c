#!/usr/bin/env bash
# Tests the core where verl is not: in an environment with torch and numpy, then with the tools of its tests.
#
#   bash scripts/test_core.sh             an environment of its own, removed at the end
#   VENV=/path bash scripts/test_core.sh  kept there, and used again
#
# TRL is one of the tools: its example trains (docs/examples/trl_sums.py). What needs verl is skipped by name.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- user-adjustable ----
PYTHON=${PYTHON:-python3}
TORCH=${TORCH:-torch==2.13.0}             # pip takes the build (CPU, CUDA) that your index offers
# -------------------------

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
env=${VENV:-$work/env}
[ -x "$env/bin/python" ] || "$PYTHON" -m venv "$env"
pip() { "$env/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# From a copy of what git tracks, so that no build folder is left and the checkout is not imported.
mkdir "$work/source"
git ls-files -z verl_krpo pyproject.toml README.md LICENSE | xargs -0 cp --parents -t "$work/source"
pip "$TORCH" numpy
pip --no-deps --force-reinstall "$work/source"
(cd tests && "$env/bin/python" -c 'import sys, test_core; exec(test_core.CODE)')
pip pytest pytest-timeout hypothesis statsmodels mpmath omegaconf wrapt trl
"$env/bin/pytest" -p no:cacheprovider tests/kalman tests/advantage tests/policy_loss tests/test_core.py tests/examples "$@"
