"""GGUF's types for ternary layers: what each can hold, and the bytes of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitcore import unpack_ternary
from bitcore.errors import ArgumentError
from bitcore.quantize import dequantize, group_scale
from bitlab_hf.interop import q2_0
from bitlab_hf.interop.packed_stream import relative_change
from bitlab_hf.model.tree import quantized_layers
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.experts import BitExperts

# Inputs that share a scale, by type.
_BLOCKS = {"Q2_0": q2_0.BLOCK, "TQ2_0": 256, "TQ1_0": 256}
QTYPES = (*_BLOCKS, "BF16")
# The least scale that float16 rounds by no more than bfloat16 does, and the largest that it holds.
_LEAST, _MOST = 2.0**-17, 65504.0
ALTERNATIVES = "\nUse bitlab_hf.save, or export_bitnet for transformers without BitLab."


def default_type(model: PreTrainedModel) -> str:
    """Returns TQ2_0 where it can hold every layer, else Q2_0."""
    layers = [found.module for found in quantized_layers(model)]
    return "Q2_0" if any(_problem(layer, "TQ2_0") for layer in layers) else "TQ2_0"


def ggml_type(kind: str) -> tuple[Any, int, int]:
    """Returns a type's number, the values of a block, and its bytes."""
    import gguf

    if kind == "Q2_0":
        # The package writes the number of a type that it does not know as it is.
        return q2_0.NUMBER, q2_0.BLOCK, q2_0.SIZE
    number = gguf.GGMLQuantizationType[kind]
    return number, *gguf.GGML_QUANT_SIZES[number]


def file_type(kind: str) -> int:
    """Returns the number of a file that is mostly of a type."""
    import gguf

    return q2_0.FILE_TYPE if kind == "Q2_0" else int(gguf.LlamaFileType[f"MOSTLY_{kind}"])


def check_layers(model: PreTrainedModel, qtype: str) -> float:
    """Checks that a type can hold the layers of a model.

    Returns:
        The largest relative change of a scale.

    Raises:
        ArgumentError: A layer is of another class, its scales are not those of the type's blocks,
            or one is out of float16's range.
    """
    layers = quantized_layers(model)
    if not layers:
        raise ArgumentError("export_gguf: model must hold quantized layers, got none")
    for name, module in model.named_modules():
        tensors: dict[str, Tensor | None] = {**module._parameters, **module._buffers}
        foreign = (
            isinstance(module, BitLayerBase | BitExperts) or tensors.get("qweight") is not None
        )
        if (foreign and type(module) is not BitLinear) or hasattr(module, "base_layer"):
            raise ArgumentError(
                f"export_gguf: {name} must be a BitLinear or a plain module, got "
                f"{type(module).__name__}{ALTERNATIVES}"
            )
    dtype = torch.bfloat16 if qtype == "BF16" else torch.float16
    change = 0.0
    for found in layers:
        layer, name = found.module, found.names[0]
        problem = None if qtype == "BF16" else _problem(layer, qtype)
        if problem is not None:
            other = "BF16" if _problem(layer, "Q2_0") else "Q2_0"
            raise ArgumentError(f"export_gguf: {name} must have {problem}{_instead(other)}")
        _, scale = _packed(layer)
        least, most = float(scale.min()), float(scale.max())
        if qtype != "BF16" and not (least >= _LEAST and most <= _MOST):
            raise ArgumentError(
                f"export_gguf: {name} must have scales from {_LEAST:.3g} to {_MOST:g} for {qtype}, "
                f"got {least:.3g} to {most:.3g}{_instead('BF16')}"
            )
        change = max(change, relative_change(scale, scale.to(dtype)))
    return change


def _problem(layer: BitLayerBase, qtype: str) -> str | None:
    """Returns what a layer would have to have for a type of blocks, and has not."""
    block, groups = _BLOCKS[qtype], layer.quant_config.group_size
    if layer.in_features % block:
        return f"a multiple of {block} inputs for {qtype}, got {layer.in_features}"
    if groups is not None and groups % block:
        return f"one scale for {block} inputs for {qtype}, got groups of {groups}"
    return None


def _instead(qtype: str) -> str:
    return f'\nPass qtype="{qtype}", or use bitlab_hf.save.'


def _packed(layer: BitLayerBase) -> tuple[Tensor, Tensor]:
    """Returns a layer's packed codes and what they are multiplied with, float32 [1], [N] or
    [N, K / G].
    """
    qweight, scale, *multiplier = (tensor.detach().cpu() for tensor in layer.packed())
    return qweight, group_scale(scale, multiplier[0]) if multiplier else scale


def layer_values(layer: BitLayerBase, qtype: str, order: Tensor | None) -> Tensor:
    """Returns what a file holds of a layer: bytes of the type's blocks, or bfloat16 [N, K].

    Args:
        layer: A layer that `check_layers` let through.
        qtype: The type.
        order: Where each of the file's rows is found, or None for as they are.
    """
    import gguf

    qweight, scale = _packed(layer)
    codes = unpack_ternary(qweight, layer.out_features)
    if order is not None:
        codes = codes[order]
        scale = scale if len(scale) == 1 else scale[order]
    if qtype == "BF16":
        return dequantize(codes, scale, torch.bfloat16)
    if qtype == "Q2_0":
        blocks = layer.in_features // q2_0.BLOCK
        columns = scale if scale.dim() == 2 else scale.unsqueeze(1)
        spread = columns.repeat_interleave(blocks // columns.shape[1], 1)
        return q2_0.encode(codes, spread.expand(layer.out_features, -1))
    values = dequantize(codes, scale, torch.float32).numpy()
    return torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType[qtype]))
