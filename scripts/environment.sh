#!/usr/bin/env bash
# Makes the virtual environment that demo.sh and test.sh use, or brings it up to date.
#   scripts/environment.sh EXTRA     EXTRA: train, dev, or several with commas between
# BITLAB_VENV names its folder (default .venv). pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${BITLAB_VENV:-.venv}
python=
for candidate in python3.11 python3 python3.12 python3.13; do
    if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
        python=$candidate
        break
    fi
done
if [ -z "$python" ]; then
    echo "BitLab needs Python 3.11 or newer; none was found." >&2
    exit 1
fi
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    echo "BitLab needs a C++ compiler; run: apt-get install g++" >&2
    exit 1
fi
if [ ! -x "$venv/bin/pip" ]; then
    echo "Making the virtual environment $venv ..." >&2
    if ! "$python" -m venv "$venv"; then
        echo "Python's venv module is missing; run: apt-get install python3-venv" >&2
        exit 1
    fi
fi
# An installation is up to date while what it was made from has not changed.
state=$("$venv/bin/python" - "$1 ${BITLAB_CUDA:-} ${BITLAB_NATIVE:-}" <<'PYTHON'
import hashlib, pathlib, sys
digest = hashlib.sha256(sys.argv[1].encode())
sources = [pathlib.Path("pyproject.toml"), pathlib.Path("constraints.txt")]
sources += sorted(path for path in pathlib.Path("csrc").rglob("*") if path.is_file())
for path in sources:
    digest.update(path.read_bytes())
print(digest.hexdigest())
PYTHON
)
if [ "$(cat "$venv/bitlab-$1" 2>/dev/null || true)" != "$state" ]; then
    echo "Installing BitLab with '$1' into $venv (the first time takes a minute or two) ..." >&2
    "$venv/bin/pip" install --quiet --disable-pip-version-check -c constraints.txt -e ".[$1]"
    echo "$state" >"$venv/bitlab-$1"
fi
