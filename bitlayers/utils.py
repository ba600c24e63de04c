"""What a layer costs: bytes computed for any state, and bytes and times measured."""

from __future__ import annotations

import copy
import math
import statistics
import time
from typing import TypedDict

import torch
from torch import Tensor, nn

from bitcore.errors import ArgumentError, ArgumentTypeError
from bitlayers.base import BitLayerBase
from bitlayers.embedding import TernaryEmbedding
from bitlayers.experts import BitExperts
from bitlayers.int8 import Int8Linear


class MemoryUsage(TypedDict):
    """Bytes of a layer before and after packing, and the share saved."""

    original: int
    quantized: int
    savings: float


class Comparison(TypedDict):
    """A layer beside its quantized form: ratios and the figures they come from."""

    reduction: float
    speedup: float
    regular_bytes: int
    quantized_bytes: int
    regular_seconds: float
    quantized_seconds: float
    tokens: int
    threads: int


def _bytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.numel() * tensor.element_size()


def estimate_memory_usage(
    layer: BitLayerBase | BitExperts | TernaryEmbedding | Int8Linear,
) -> MemoryUsage:
    """Estimates the memory of a quantized layer, of a ternary embedding or of ternary experts, in
    any state, changing none.

    Args:
        layer: A layer with in_features and out_features, ternary or int8, an embedding, or a module
            of experts.

    Returns:
        ``original`` (bytes of the latent weight and the bias), ``quantized`` (bytes of the packed
        weight, its scales and the bias) and ``savings`` (share of the original that is saved); of
        experts all of theirs.

    Raises:
        ArgumentTypeError: layer is not a BitLayerBase, no Int8Linear, nor an embedding or experts.
    """
    if isinstance(layer, BitExperts):
        names = [f"{name}_bias" for name in layer.stacks]
        bias = sum(_bytes(layer._parameters.get(name)) for name in names)
        # Of a deployed one it is what stands for its float weight.
        original = sum(
            stack.weights * getattr(layer, name).dtype.itemsize
            for name, stack in layer.stacks.items()
        )
        return _usage(original + bias, bias, layer.packed_tensors())
    if isinstance(layer, TernaryEmbedding):
        return _usage(layer.weight.nbytes, 0, layer.packed_tensors())
    if isinstance(layer, Int8Linear):
        tensors = {"qweight": layer.qweight, "qweight_scale": layer.qweight_scale}
        bias = _bytes(layer.bias)
        original = layer.out_features * layer.in_features * layer.dtype.itemsize + bias
        held = {name: (one.dtype, tuple(one.shape)) for name, one in tensors.items()}
        return _usage(original, bias, held)
    if not isinstance(layer, BitLayerBase):
        raise ArgumentTypeError(
            f"estimate_memory_usage: layer must be a BitLayerBase, got {type(layer).__name__}"
        )
    bias = _bytes(layer.bias)
    dtype = layer.latent_dtype if layer.is_deployed else layer.weight.dtype
    original = layer.out_features * layer.in_features * dtype.itemsize + bias
    return _usage(original, bias, layer.packed_tensors())


def _usage(
    original: int, bias: int, packed: dict[str, tuple[torch.dtype, tuple[int, ...]]]
) -> MemoryUsage:
    quantized = bias + sum(dtype.itemsize * math.prod(shape) for dtype, shape in packed.values())
    return {"original": original, "quantized": quantized, "savings": 1 - quantized / original}


def compare_layers(
    regular: nn.Module, quantized: BitLayerBase, tokens: int = 1, repeats: int = 50
) -> Comparison:
    """Measures a regular layer against a quantized one, on this machine, now.

    Both are timed in eval mode without gradients, in turn, on the same random input; a latent
    layer is compared by a deployed copy. Neither layer is changed.

    Args:
        regular: A layer such as ``nn.Linear``.
        quantized: A quantized layer of the same sizes.
        tokens: Rows of the input; 1 is a decoding step.
        repeats: Timed calls of each; the median counts.

    Returns:
        ``reduction`` (share of bytes saved) and ``speedup`` (regular time over quantized time),
        and the bytes, median seconds, tokens and threads behind them.

    Raises:
        ArgumentTypeError: quantized is not a BitLayerBase.
        ArgumentError: The layers differ in size.
    """
    if not isinstance(quantized, BitLayerBase):
        raise ArgumentTypeError(
            f"compare_layers: quantized must be a BitLayerBase, got {type(quantized).__name__}"
        )
    sizes = (quantized.in_features, quantized.out_features)
    regular_sizes = (getattr(regular, "in_features", None), getattr(regular, "out_features", None))
    if regular_sizes != sizes:
        raise ArgumentError(
            f"compare_layers: regular must have (in_features, out_features) {sizes}, "
            f"got {regular_sizes}"
        )
    if not quantized.is_deployed:
        quantized = copy.deepcopy(quantized).deploy()
    reference = next(regular.parameters())
    x = torch.randn(tokens, sizes[0], device=reference.device, dtype=reference.dtype)
    times: dict[nn.Module, list[float]] = {regular: [], quantized: []}
    was_training = regular.training
    regular.eval()
    try:
        with torch.no_grad():
            for _ in range(repeats + 3):
                for layer, measured in times.items():
                    started = time.perf_counter()
                    layer(x)
                    if x.is_cuda:
                        torch.cuda.synchronize(x.device)
                    measured.append(time.perf_counter() - started)
    finally:
        regular.train(was_training)
    # The first three calls warm caches and threads up.
    seconds = [statistics.median(measured[3:]) for measured in times.values()]
    sizes_in_bytes = [
        sum(_bytes(tensor) for tensor in (*layer.parameters(), *layer.buffers())) for layer in times
    ]
    return {
        "reduction": 1 - sizes_in_bytes[1] / sizes_in_bytes[0],
        "speedup": seconds[0] / seconds[1],
        "regular_bytes": sizes_in_bytes[0],
        "quantized_bytes": sizes_in_bytes[1],
        "regular_seconds": seconds[0],
        "quantized_seconds": seconds[1],
        "tokens": tokens,
        "threads": torch.get_num_threads(),
    }
