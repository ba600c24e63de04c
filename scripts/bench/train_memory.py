"""What a training step of bench/train.py's block costs in memory.

On a CPU it is the resident memory of a fresh process: run as a script this reads a JSON request
from its argument and prints the answer as JSON. The parent sets glibc's MALLOC_MMAP_THRESHOLD_ and
MKL_DISABLE_FAST_MM, so that freed tensors and the buffers of matrix products leave the resident
memory at once. On a GPU it is what torch's allocator has given out.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from train_block import Block, has_bfloat16


class ZeroProducts(TorchDispatchMode):
    """Writes zeros for torch's bfloat16 products, which take minutes on a CPU without bfloat16.

    Their operands, and an output of the same size, are allocated and written all the same.
    """

    _PRODUCTS = (
        torch.ops.aten.mm.default,
        torch.ops.aten.bmm.default,
        torch.ops.aten.addmm.default,
    )

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Runs one op."""
        if func in self._PRODUCTS and args[-1].dtype == torch.bfloat16:
            left, right = args[-2:]
            return left.new_zeros((*left.shape[:-1], right.shape[-1]))
        return func(*args, **(kwargs or {}))


def _resident(field: str) -> int:
    """Returns a line of /proc/self/status in bytes: VmRSS now, VmHWM at most since the reset."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise SystemExit(f"/proc/self/status has no {field}: the benchmark needs Linux.")


def _peak_of(call: Callable[[], object]) -> int:
    """Returns the most resident bytes while a call runs."""
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return _resident("VmHWM")


def measure_here(request: dict[str, Any]) -> dict[str, int]:
    """Returns bytes of one configuration in this process, on its CPU: the model, the peaks of a
    step, what backward keeps.
    """
    engine, precision, tokens = request["engine"], request["precision"], request["tokens"]
    torch.set_num_threads(request["threads"])
    torch.compiler.set_stance("force_eager")
    products = nullcontext() if request["multiply"] else ZeroProducts()
    with products:
        warm = Block(engine, "quick", precision, 8)
        warm.step()
        del warm
        imported = _resident("VmRSS")
        block = Block(engine, request["geometry"], precision, tokens)
        block.saved_bytes()
        held = _resident("VmRSS")
        step = _peak_of(lambda: block.step(optimize=False))
        block.step()
        optimized = _peak_of(block.step)
        return {
            "model": held - imported,
            "peak": step - imported,
            "peak_with_optimizer": optimized - imported,
            "saved": block.saved_bytes(),
        }


def measure_process(
    engine: str, geometry: str, precision: str, tokens: int, threads: int
) -> dict[str, int]:
    """Returns the same, out of a fresh process.

    Raises:
        RuntimeError: It failed; the message holds the last line that it printed.
    """
    request = {
        "engine": engine, "precision": precision, "tokens": tokens, "threads": threads,
        "geometry": geometry, "multiply": has_bfloat16(),
    }  # fmt: skip
    environment = {
        **os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MKL_DISABLE_FAST_MM": "1",
    }  # fmt: skip
    command = [sys.executable, __file__, json.dumps(request)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        printed = done.stderr.strip().splitlines() or ["nothing printed"]
        raise RuntimeError(f"exit status {done.returncode}: {printed[-1]}")
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return found


def free() -> None:
    """Gives back what nobody holds any more, on a GPU too."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure_gpu(
    engine: str, geometry: str, precision: str, tokens: int, backend: str | None
) -> dict[str, int]:
    """Returns the same on the GPU, of what torch's allocator has given out there; `backend` is
    torch.compile's, None for a block that is not compiled.
    """
    free()
    before = torch.cuda.memory_allocated()
    block = Block(engine, geometry, precision, tokens, "cuda")
    held = torch.cuda.memory_allocated()
    saved = block.saved_bytes()
    if backend is not None:
        block.compile(backend)
    block.step(optimize=False)  # what is allocated once, and kept
    torch.cuda.reset_peak_memory_stats()
    block.step(optimize=False)
    step = torch.cuda.max_memory_allocated()
    block.step()
    torch.cuda.reset_peak_memory_stats()
    block.step()
    optimized = torch.cuda.max_memory_allocated()
    return {
        "model": held - before,
        "peak": step - before,
        "peak_with_optimizer": optimized - before,
        "saved": saved,
    }


if __name__ == "__main__":
    print(json.dumps(measure_here(json.loads(sys.argv[1]))))
