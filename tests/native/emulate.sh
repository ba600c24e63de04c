#!/usr/bin/env bash
# The kernels' self-test on this CPU, and on emulated ones that have the instruction sets it lacks.
#   tests/native/emulate.sh [PYTHON [X86 ARM]]     PYTHON: 3.11 or newer, for Bochs; default $PYTHON or python3
# X86: where csrc has been built for this CPU, without CUDA or with it; ARM: a folder with the library for aarch64. Where
# they are not given, both are built.
# aarch64 runs under qemu's user mode, AVX-512 and AVX-VNNI under Bochs, which a virtual environment of its own gets
# from the Python package index (pip's own variables are honoured). Everything is made in a temporary folder.
set -euo pipefail
cd "$(dirname "$0")/../.."
python=${1:-${PYTHON:-python3}}
tests=$PWD/tests/native
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

require() { # COMMAND PACKAGE
    if ! command -v "$1" >/dev/null; then
        echo "emulate.sh needs $1; run: apt-get install $2" >&2
        exit 1
    fi
}
require cmake cmake
require c++ g++
require aarch64-linux-gnu-g++ g++-aarch64-linux-gnu
require qemu-aarch64 qemu-user
require "$python" python3
if [ "$(uname -m)" != x86_64 ]; then
    echo "emulate.sh runs on x86-64 only" >&2
    exit 1
fi

# run PLACE COMMAND...: runs a self-test and keeps what it says of each instruction set for the summary.
run() {
    local place=$1 start=$SECONDS output=$work/${1// /-}.output
    shift
    "$@" >"$output" || { echo "-- $place" && cat "$output" && exit 1; }
    echo "-- $place" && cat "$output"
    { grep -E '^[a-z0-9_]+: .* failures$' "$output" | sed "s/^/$place: /"
      echo "$place: $((SECONDS - start)) s"; } >>"$work/summary-${place%% *}"
}

build() { # FOLDER CMAKE_ARGUMENTS...
    local folder=$1
    shift
    cmake -S csrc -B "$folder" -DBITLAB_CUDA=OFF "$@" >/dev/null
    cmake --build "$folder" --parallel >/dev/null
}
flags=(-std=c++17 -O3 -Wall -Wextra -Werror -ffp-contract=off -fno-exceptions -fno-rtti -Icsrc/include)

x86=${2:-$work/x86} arm=${3:-$work/arm}
echo "== self-test: this CPU"
[ -n "${2:-}" ] || build "$x86"
c++ "${flags[@]}" -fopenmp "$tests/selftest.cpp" -o "$work/native" -L"$x86" -lbitkernels_cpu -Wl,-rpath,"$x86"
run "this CPU" "$work/native"
native=$(sed -n 's/^instruction sets: \(.*\); in use.*/,\1,/p' "$work/this-CPU.output")

echo "== building for aarch64, under qemu, and for AVX-512 and AVX-VNNI, under Bochs"
[ -n "${3:-}" ] || build "$arm" -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++
aarch64-linux-gnu-g++ "${flags[@]}" -fopenmp "$tests/selftest.cpp" -o "$work/aarch64" -L"$arm" \
    -lbitkernels_cpu -Wl,-rpath,"$arm"
arm() { # CPU ISA...
    run "qemu $1" qemu-aarch64 -L /usr/aarch64-linux-gnu -cpu "$1" "$work/aarch64" "${@:2}"
}
"$python" -m venv "$work/venv"
version=$(sed -n 's/^VERSION = "\(.*\)"$/\1/p' "$tests/run_bochs.py")
"$work/venv/bin/pip" install --quiet --disable-pip-version-check "bochscpu-python==$version"
preload=
if ! "$work/venv/bin/python" -c 'import bochscpu' 2>/dev/null; then
    cc -shared -fPIC -O2 "$tests/isoc23.c" -o "$work/isoc23.so"
    preload=$work/isoc23.so
fi
# The library's own objects, so that what runs there is what ships.
c++ "${flags[@]}" -c "$tests/selftest.cpp" -o "$work/selftest.o"
# More than -O1 would make loops of memcpy() and memset() into calls of themselves.
c++ "${flags[@]}" -O1 -ffreestanding -c "$tests/freestanding.cpp" -o "$work/freestanding.o"
c++ -nostdlib -static -no-pie -Wl,-Ttext-segment=0x200000 "$work/selftest.o" "$work/freestanding.o" \
    "$x86"/CMakeFiles/bitkernels_cpu.dir/cpu/*.o -lgcc -o "$work/selftest.elf"
# bochs MODEL --full|--quick ISA...: all must be there; those that this CPU has run itself, from the same objects, are left
# out. Where it has run all of them the first is run briefly: the model's CPU must still be recognized.
bochs() {
    local model=$1 how=$2 given=() left=() isa
    shift 2
    for isa in "$@"; do
        given+=("$isa")
        case "$native" in *",$isa,"*) given+=(--without "$isa") ;; *) left+=("$isa") ;; esac
    done
    [ ${#left[@]} -gt 0 ] || { how=--quick && given=("$@") && for isa in "${@:2}"; do given+=(--without "$isa"); done; }
    [ "$how" = --full ] || given=(--quick "${given[@]}")
    run "Bochs $model" env LD_PRELOAD="$preload" "$work/venv/bin/python" "$tests/run_bochs.py" "$model" \
        "$work/selftest.elf" --without portable "${given[@]}"
}
others() {
    arm max neon_i8mm neon_dotprod portable
    arm cortex-a76 --quick neon_dotprod portable
    arm cortex-a72 --quick portable
    bochs skylake_x --quick avx512bw avx2
    bochs arrow_lake --quick avxvnni avx2
}
others & # beside the longest: none uses more than a core
beside=$!
bochs sapphire_rapids --full avx512vnni avxvnni avx512bw avx2
wait "$beside"
echo "== self-test: all passed"
cat "$work"/summary-*
