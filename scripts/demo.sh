#!/usr/bin/env bash
# The main job, end to end, from a bare clone: makes a virtual environment and runs `bitlab demo`.
#   scripts/demo.sh [--quick] [--model FOLDER_OR_NAME] ...     (options: bitlab demo --help)
#   scripts/demo.sh --real [--tokens N] ...    SmolLM2-135M on Wikipedia; goes on if it was killed
set -euo pipefail
cd "$(dirname "$0")/.."
bin=${BITLAB_VENV:-.venv}/bin
if [ "${1:-}" = --real ]; then
    shift
    # SmolLM2 comes as a GGUF file.
    scripts/environment.sh train,gguf
    models=out/models
    if [ ! -e "$models/smollm2-135m/config.json" ] || [ ! -e "$models/wikipedia/test.jsonl" ]; then
        "$bin/python" scripts/real_models.py "$models" --only smollm2 wikipedia
    fi
    exec "$bin/bitlab" demo --model "$models/smollm2-135m" --text "$models/wikipedia" \
        --output out/demo-real --tokens 600000 --resume "$@"
fi
scripts/environment.sh train
exec "$bin/bitlab" demo "$@"
