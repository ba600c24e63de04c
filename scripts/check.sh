#!/usr/bin/env bash
# The checks that need no build: style, types, imports between packages. Under a minute.
#   scripts/check.sh     (the environment of scripts/environment.sh dev: BITLAB_VENV, by default .venv)
set -euo pipefail
cd "$(dirname "$0")/.."
bin=$(cd "${BITLAB_VENV:-.venv}/bin" && pwd)
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/clang-format" --dry-run --Werror $(git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh')
"$bin/mypy"
"$bin/lint-imports"
