#!/usr/bin/env bash
# Tests the plugin against several versions of verl and writes the table of docs/compatibility.md.
#
#   bash scripts/test_compat.sh [VERSION...]       all of verl_krpo/versions.py if none is given
#
# Each version gets an environment of its own, .venv-compat-VERSION, that is removed at the end. It has that verl and
# this package as a wheel; torch, ray, transformers and the rest come from the development environment, read through a
# .pth file, so that a version costs seconds and not gigabytes. What we rest on is looked up in its source as well, and
# in the newest verl of the index (check_verl_api.py).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh dev)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} PIP_DISABLE_PIP_VERSION_CHECK=1
versions=("$@")
[ $# -gt 0 ] || mapfile -t versions < <("$python" -c 'from verl_krpo.versions import VERL; print("\n".join(VERL))')

work=$(mktemp -d)
trap 'rm -rf "$work" .venv-compat-*' EXIT
# Built from a copy of what git tracks, so that no build folder is left and no stale file gets into the wheel.
mkdir "$work/source"
git ls-files -z verl_krpo pyproject.toml README.md LICENSE | xargs -0 cp --parents -t "$work/source"
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$work" "$work/source" 2> "$work/pip.log" || { cat "$work/pip.log" >&2; exit 1; }

base=$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
for version in "${versions[@]}"; do
    env=.venv-compat-$version
    rm -rf "$env"
    "$python" -m venv --without-pip "$env"
    site=$("$env/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    "$python" -m pip install --quiet --no-deps --target "$site" "verl==$version" "$work"/verl_krpo-*.whl 2> "$work/pip.log" ||
        { cat "$work/pip.log" >&2; exit 1; }
    echo "$base" > "$site/shared.pth"
    # Before 0.9 verl does not look for entry points.
    modules=$("$env/bin/python" - <<'PY'
from packaging.version import Version
from verl_krpo.versions import WITH_PLUGINS, installed
print("" if Version(installed("verl")) >= Version(WITH_PLUGINS) else "verl_krpo.plugin")
PY
    )
    "$python" scripts/check_verl_api.py "$site" | tee "$work/$version.api" && names=0 || names=$?
    echo "$names" > "$work/$version.names"
    echo "[compat] verl $version${modules:+, VERL_USE_EXTERNAL_MODULES=$modules}"
    # From another folder: the checkout must not be imported in place of the wheel.
    root=$PWD
    (cd "$work" && VERL_USE_EXTERNAL_MODULES=$modules "$root/$env/bin/python" -m pytest "$root/tests/compat" \
        -c "$root/pyproject.toml" --rootdir="$root" -p no:cacheprovider -W ignore --quiet --junitxml="$work/$version.xml") || true
    (cd "$work" && VERL_USE_EXTERNAL_MODULES=$modules "$root/$env/bin/python" -m verl_krpo doctor --no-ray --json \
        > "$work/$version.json") || true
done
"$python" scripts/check_verl_api.py newest || true   # of what is not in the list, the names alone
"$python" scripts/compat_table.py "$work" docs/compatibility.md
