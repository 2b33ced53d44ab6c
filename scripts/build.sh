#!/usr/bin/env bash
# Builds the wheel and the sdist into dist/ and checks their metadata, as for a release.
#
#   bash scripts/build.sh
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=$(bash scripts/setup.sh dev)
rm -rf dist
"$python" -m build --outdir dist .
"$python" -m twine check --strict dist/*
