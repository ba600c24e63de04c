#!/usr/bin/env bash
# Builds libbitkernels_cuda for every architecture, warnings as errors, and checks what came out: no spills, no local
# memory, the instructions that are meant. Needs nvcc, no GPU.
#   tests/native/cuda/check_build.sh VENV WORK     VENV: has cmake and ninja; WORK: a folder for the build
set -euo pipefail
cd "$(dirname "$0")/../../.."
bin=$(cd "$1/bin" && pwd)
work=$2
mkdir -p "$work"
"$bin/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -S csrc -B "$work/build" -DBITLAB_WERROR=ON -DBITLAB_CUDA=ON \
    -DCMAKE_CUDA_FLAGS=-Xptxas=-v >"$work/configure.log" || { cat "$work/configure.log"; exit 1; }
"$bin/cmake" --build "$work/build" --target bitkernels_cuda >"$work/build.log" 2>&1 || { cat "$work/build.log"; exit 1; }

# cuobjdump calls nvdisasm; both come with the CUDA toolkit, or as packages.
nvcc=$(sed -n 's/^CMAKE_CUDA_COMPILER:[A-Z]*=//p' "$work/build/CMakeCache.txt")
export PATH=$(dirname "$nvcc"):$PATH
if ! command -v cuobjdump >/dev/null || ! command -v nvdisasm >/dev/null; then
    "$bin/pip" install --quiet --disable-pip-version-check --target "$work/tools" \
        nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    chmod +x "$work"/tools/nvidia/*/bin/*
    export PATH=$(dirname "$(find "$work/tools" -name cuobjdump)"):$PATH
fi
for architecture in sm_80 sm_90; do
    cuobjdump -sass -arch "$architecture" "$work/build/libbitkernels_cuda.so" >"$work/$architecture.txt"
done
c++ -std=c++17 -x c++ -Icsrc/include -Icsrc/cuda -Itests/native/cuda tests/native/cuda/tools/shared_sizes.cpp \
    tests/native/cuda/emulator.cpp tests/native/cuda/exchange.cpp -o "$work/shared_sizes"
"$work/shared_sizes" >"$work/shared_sizes.txt"
"$bin/python" tests/native/cuda/tools/check_build.py "$work/build.log" "$work/shared_sizes.txt" "$work/sm_80.txt" "$work/sm_90.txt"
