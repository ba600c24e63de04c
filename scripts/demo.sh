#!/usr/bin/env bash
# The main job, end to end, from a bare clone: makes a virtual environment and runs `bitlab demo`.
#   scripts/demo.sh [--quick] [--model FOLDER_OR_NAME] ...     (options: bitlab demo --help)
set -euo pipefail
cd "$(dirname "$0")/.."
scripts/environment.sh train
exec "${BITLAB_VENV:-.venv}/bin/bitlab" demo "$@"
