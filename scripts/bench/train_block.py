"""The transformer block of bench/train.py with each kind of linear layer, and what a step of it
costs in memory, measured in a process of its own.

Run as a script it reads a JSON request from its argument and prints the answer as JSON. The parent
sets glibc's MALLOC_MMAP_THRESHOLD_ and MKL_DISABLE_FAST_MM, so that freed tensors and the buffers
of matrix products leave the resident memory at once.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

ENGINES = ("plain", "bitlab", "transformers", "onebitllms")
# name: dtype of the weights and the input, whether under bfloat16 autocast
PRECISIONS = {
    "float32": (torch.float32, False),
    "bf16 autocast": (torch.float32, True),
    "bfloat16": (torch.bfloat16, False),
}
GEOMETRIES = {
    "2B-4T": {
        "hidden_size": 2560,
        "intermediate_size": 6912,
        "num_attention_heads": 20,
        "num_key_value_heads": 5,
    },
    "quick": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def _bitlab(linear: nn.Linear) -> nn.Module:
    from bitlayers import BitLinear

    return BitLinear.from_linear(linear)


def _transformers(linear: nn.Linear) -> nn.Module:
    from transformers.integrations.bitnet import AutoBitLinear

    layer = AutoBitLinear(
        linear.in_features, linear.out_features, bias=False, device="meta", online_quant=True
    )
    layer.weight = linear.weight
    return layer


def _onebitllms(linear: nn.Linear) -> nn.Module:
    from onebitllms import BitNetLinear

    layer = BitNetLinear(linear.in_features, linear.out_features, bias=False)
    layer.weight = linear.weight
    return layer


_CONVERSIONS: dict[str, Callable[[nn.Linear], nn.Module]] = {
    "bitlab": _bitlab,
    "transformers": _transformers,
    "onebitllms": _onebitllms,
}


@dataclass
class Seconds:
    """What the parts of one step took."""

    forward: float
    backward: float
    optimizer: float


class Block:
    """A Llama block in training, with its optimizer and the input of one sequence.

    Args:
        engine: One of `ENGINES`.
        geometry: One of `GEOMETRIES`.
        precision: One of `PRECISIONS`.
        tokens: Length of the sequence.
    """

    def __init__(self, engine: str, geometry: str, precision: str, tokens: int) -> None:
        torch.manual_seed(0)
        dtype, self._autocast = PRECISIONS[precision]
        config = LlamaConfig(**GEOMETRIES[geometry], attn_implementation="sdpa")
        self.module = LlamaDecoderLayer(config, 0).to(dtype).train()
        if engine != "plain":
            for name, linear in list(self.module.named_modules()):
                if isinstance(linear, nn.Linear):
                    self.module.set_submodule(name, _CONVERSIONS[engine](linear))
        self._optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)
        shape = (1, tokens, config.hidden_size)
        self.x = torch.randn(shape).to(dtype).requires_grad_()
        self._dy = torch.randn(shape)
        positions = torch.arange(tokens)[None]
        self._embedding = LlamaRotaryEmbedding(config)(self.x, positions)

    def _casts(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self._autocast else nullcontext()

    def forward(self) -> Tensor:
        """Runs the block."""
        with self._casts():
            y: Tensor = self.module(self.x, position_embeddings=self._embedding)
        return y

    def step(self, optimize: bool = True) -> Seconds:
        """Runs forward, backward and, if asked for, the optimizer; drops the gradients before."""
        self._optimizer.zero_grad()
        self.x.grad = None
        started = time.perf_counter()
        y = self.forward()
        dy = self._dy.to(y.dtype)
        forwarded = time.perf_counter()
        y.backward(dy)
        ended = time.perf_counter()
        if optimize:
            self._optimizer.step()
        return Seconds(forwarded - started, ended - forwarded, time.perf_counter() - ended)

    def saved_bytes(self) -> int:
        """Returns the bytes that the backward pass keeps, parameters and the input excluded."""
        known = {p.untyped_storage().data_ptr() for p in (*self.module.parameters(), self.x)}
        kept: dict[int, int] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                kept[storage.data_ptr()] = storage.nbytes()
            # Not the tensor itself: an output that holds its own graph would never be freed.
            return tensor if tensor.grad_fn is None else tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = self.forward()
        found = sum(kept.values())
        del y
        return found


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


def has_bfloat16() -> bool:
    """Tells whether this CPU multiplies bfloat16 at a useful speed in torch."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


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


def measure_memory(request: dict[str, Any]) -> dict[str, int]:
    """Returns bytes of one configuration: the model, the peaks of a step, what backward keeps."""
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


def find_problem(engine: str) -> str | None:
    """Runs a step of a tiny block with an engine; returns what went wrong, or None."""
    try:
        Block(engine, "quick", "float32", 8).step()
    except Exception as error:  # whatever a peer raises is the answer
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return None


def copies(engines: list[str], geometry: str, precision: str, tokens: int) -> dict[str, Block]:
    """Returns a block for each engine, with its own weights of equal values."""
    return {name: Block(name, geometry, precision, tokens) for name in engines}


if __name__ == "__main__":
    print(json.dumps(measure_memory(json.loads(sys.argv[1]))))
