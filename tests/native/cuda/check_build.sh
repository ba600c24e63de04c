#!/usr/bin/env bash
# Builds libbitkernels_cuda for every architecture, warnings as errors, and checks what came out: no spills, no local
# memory, the instructions that are meant. Needs nvcc, no GPU.
#   tests/native/cuda/check_build.sh VENV WORK [LOG]     VENV: has cmake and ninja; WORK: a folder for the build
# LOG is what pip wrote (PIP_LOG=LOG) while it installed the library into VENV with the options below in CMAKE_ARGS;
# then that library is checked, and nothing is compiled again.
set -euo pipefail
cd "$(dirname "$0")/../../.."
options="-DBITLAB_WERROR=ON -DBITLAB_CUDA=ON -DCMAKE_CUDA_FLAGS=-Xptxas=-v"
bin=$(cd "$1/bin" && pwd)
work=$2
mkdir -p "$work"
if [ -n "${3:-}" ]; then
    log=$3
    grep -q "Warnings are errors: ON" "$log" || { echo "$log: not installed with $options" >&2; exit 1; }
    library=$("$bin/python" -c 'from bitcore.kernels.native import library_path as at; print(at("bitkernels_cuda"))')
else
    log=$work/build.log
    "$bin/cmake" -G Ninja -DCMAKE_MAKE_PROGRAM="$bin/ninja" -S csrc -B "$work/build" $options \
        >"$work/configure.log" || { cat "$work/configure.log"; exit 1; }
    "$bin/cmake" --build "$work/build" --target bitkernels_cuda >"$log" 2>&1 || { cat "$log"; exit 1; }
    library=$work/build/libbitkernels_cuda.so
fi

# cuobjdump calls nvdisasm; both come with the CUDA toolkit, or as packages.
export PATH=$PATH:${CUDA_HOME:-/usr/local/cuda}/bin
if ! command -v cuobjdump >/dev/null || ! command -v nvdisasm >/dev/null; then
    "$bin/pip" install --quiet --disable-pip-version-check --target "$work/tools" \
        nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm
    chmod +x "$work"/tools/nvidia/*/bin/*
    export PATH=$(dirname "$(find "$work/tools" -name cuobjdump)"):$PATH
fi
for architecture in sm_80 sm_90a; do
    cuobjdump -sass -arch "$architecture" "$library" >"$work/$architecture.txt" &
    readers+=($!)
done
c++ -std=c++17 -x c++ -Icsrc/include -Icsrc/cuda -Itests/native/cuda tests/native/cuda/tools/shared_sizes.cpp \
    tests/native/cuda/{emulator,exchange,memory,warpgroup}.cpp -o "$work/shared_sizes"
"$work/shared_sizes" >"$work/shared_sizes.txt"
# What checks the fragment tables on a GPU.
${CUDACXX:-nvcc} -std=c++17 -gencode=arch=compute_80,code=sm_80 -gencode=arch=compute_90a,code=sm_90a \
    -DBK_CUDA_ARCHITECTURES='"sm_80 sm_90a"' -Werror all-warnings -Icsrc/include -Icsrc/cuda -Itests/native/cuda \
    tests/native/cuda/fragments_gpu.cu -o "$work/fragments"
for reader in "${readers[@]}"; do wait "$reader"; done
"$bin/python" tests/native/cuda/tools/check_build.py "$log" "$work/shared_sizes.txt" "$work/sm_80.txt" "$work/sm_90a.txt"
