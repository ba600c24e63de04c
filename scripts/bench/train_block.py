"""The block of bench/train.py with each kind of linear layer, and the time of a step."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
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
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
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


class Marks:
    """Moments of a step: on a GPU those when its stream gets there, else those of the process."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []

    def set(self) -> None:
        """Notes one."""
        if self._on_gpu:
            self._events.append(torch.cuda.Event(enable_timing=True))
            self._events[-1].record()
        else:
            self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Returns what passed between neighbours; waits for the last."""
        if not self._on_gpu:
            return [after - before for before, after in pairwise(self._times)]
        self._events[-1].synchronize()
        return [1e-3 * before.elapsed_time(after) for before, after in pairwise(self._events)]


class Block:
    """A Llama block in training, with its optimizer and the input of one sequence.

    Args:
        engine: One of `ENGINES`.
        geometry: One of `GEOMETRIES`.
        precision: One of `PRECISIONS`.
        tokens: Length of the sequence.
    """

    def __init__(
        self, engine: str, geometry: str, precision: str, tokens: int, device: str = "cpu"
    ) -> None:
        torch.manual_seed(0)
        dtype, self._autocast = PRECISIONS[precision]
        self._device = torch.device(device)
        config = LlamaConfig(**GEOMETRIES[geometry], attn_implementation="sdpa")
        with self._device:
            self.module = LlamaDecoderLayer(config, 0).to(dtype).train()
        if engine != "plain":
            for name, linear in list(self.module.named_modules()):
                if isinstance(linear, nn.Linear):
                    self.module.set_submodule(name, _CONVERSIONS[engine](linear))
        self.module.to(self._device)
        self._optimizer = torch.optim.AdamW(self.module.parameters(), lr=1e-4, fused=True)
        shape = (1, tokens, config.hidden_size)
        self.x = torch.randn(shape, device=self._device).to(dtype).requires_grad_()
        self._dy = torch.randn(shape, device=self._device)
        positions = torch.arange(tokens, device=self._device)[None]
        rotary = LlamaRotaryEmbedding(config).to(self._device)
        self._embedding = rotary(self.x, positions)

    def _casts(self) -> AbstractContextManager[Any]:
        if not self._autocast:
            return nullcontext()
        return torch.autocast(self._device.type, torch.bfloat16)

    def compile(self, backend: str) -> None:
        """Compiles the block with torch.compile's backend; a graph break is an error."""
        self.module.compile(fullgraph=True, dynamic=False, backend=backend)

    def forward(self) -> Tensor:
        """Runs the block."""
        with self._casts():
            y: Tensor = self.module(self.x, position_embeddings=self._embedding)
        return y

    def step(self, optimize: bool = True) -> Seconds:
        """Runs forward, backward and, if asked for, the optimizer; drops the gradients before."""
        self._optimizer.zero_grad()
        self.x.grad = None
        marks = Marks(self._device)
        marks.set()
        y = self.forward()
        dy = self._dy.to(y.dtype)
        marks.set()
        y.backward(dy)
        marks.set()
        if optimize:
            self._optimizer.step()
        marks.set()
        return Seconds(*marks.seconds())

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


def has_bfloat16() -> bool:
    """Tells whether this CPU multiplies bfloat16 at a useful speed in torch."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def find_problem(engine: str, precision: str, device: str) -> str | None:
    """Runs a step of a tiny block with an engine; returns what went wrong, or None."""
    try:
        Block(engine, "quick", precision, 8, device).step()
    except Exception as error:  # whatever a peer raises is the answer
        return describe(error)
    return None


def describe(error: Exception) -> str:
    """Returns an error in one line."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0]}"
