#!/usr/bin/env bash
# Everything that wants a GPU, in one visit: see scripts/gpu.py, which this starts.
#   scripts/gpu.sh [--minutes 9] [--only PART...] [--quick]     (--help: the rest)
# Needs no network. PYTHON names the Python that has torch (default: that of .venv, else python3).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-}
if [ -z "$python" ]; then
    python=${BITLAB_VENV:-.venv}/bin/python
    [ -x "$python" ] || python=python3
fi
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
exec "$python" scripts/gpu.py "$@"
