#!/usr/bin/env bash
# The checks and the tests, from a bare clone: makes a virtual environment and runs them in it.
#   scripts/test.sh [pytest's arguments]     (-m ci: what takes long, which .ci/run runs besides)
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/environment.sh dev
bin=$(cd "${BITLAB_VENV:-.venv}/bin" && pwd)
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/clang-format" --dry-run --Werror $(git ls-files '*.h' '*.cpp' '*.inl' '*.cu' '*.cuh')
"$bin/mypy"
"$bin/lint-imports"
# One process for each CPU; a test that is about threads sets their number itself.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "$bin/pytest" -n logical --dist worksteal -m "not ci" "$@"
