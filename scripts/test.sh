#!/usr/bin/env bash
# The checks and the tests, from a bare clone: makes a virtual environment and runs them in it.
#   scripts/test.sh [pytest's arguments]     (-m ci: what takes long, which .ci/run runs besides)
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/environment.sh dev
scripts/check.sh
# Compiled modules are kept: tests start many processes.
unset PYTHONDONTWRITEBYTECODE
# One process for each CPU; a test that is about threads sets their number itself.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
exec "${BITLAB_VENV:-.venv}/bin/pytest" -n logical --dist worksteal -m "not ci" "$@"
