"""GGUF's types for ternary layers: what each can hold, and the bytes of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError
from bitcore.quantize import dequantize, row_blocks
from bitlab_hf.interop import q2_0
from bitlab_hf.interop.expressible import check_modules
from bitlab_hf.interop.matrices import Matrices, matrices_of
from bitlab_hf.interop.packed_stream import relative_change
from bitlayers.bitlinear import BitLinear
from bitlayers.embedding import TernaryEmbedding
from bitlayers.experts import BitExperts
from bitlayers.int8 import Int8Rows

# Inputs that share a scale, by type.
_BLOCKS = {"Q2_0": q2_0.BLOCK, "TQ2_0": 256, "TQ1_0": 256}
QTYPES = (*_BLOCKS, "BF16")
# The least scale that float16 rounds by no more than bfloat16 does, and the largest that it holds.
_LEAST, _MOST = 2.0**-17, 65504.0
ALTERNATIVES = "\nUse bitlab_hf.save, or export_bitnet for transformers without BitLab."


def default_type(model: PreTrainedModel) -> str:
    """Returns TQ2_0 where it can hold every layer, else Q2_0."""
    return "Q2_0" if any(_problem(one, "TQ2_0") for one in matrices_of(model)) else "TQ2_0"


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
    held = matrices_of(model)
    if not held:
        raise ArgumentError("export_gguf: model must hold quantized layers, got none")
    check_modules(
        "export_gguf",
        model,
        lambda module: (
            type(module) is BitLinear
            or isinstance(module, BitExperts | Int8Rows | TernaryEmbedding)
        ),
        ALTERNATIVES,
    )
    dtype = torch.bfloat16 if qtype == "BF16" else torch.float16
    change = 0.0
    for matrices in held:
        name = matrices.name
        problem = None if qtype == "BF16" else _problem(matrices, qtype)
        if problem is not None:
            other = "BF16" if _problem(matrices, "Q2_0") else "Q2_0"
            raise ArgumentError(f"export_gguf: {name} must have {problem}{_instead(other)}")
        for _, scale in matrices:
            least, most = float(scale.min()), float(scale.max())
            if qtype != "BF16" and not (least >= _LEAST and most <= _MOST):
                raise ArgumentError(
                    f"export_gguf: {name} must have scales from {_LEAST:.3g} to {_MOST:g} for "
                    f"{qtype}, got {least:.3g} to {most:.3g}{_instead('BF16')}"
                )
            change = max(change, relative_change(scale, scale.to(dtype)))
    return change


def _problem(matrices: Matrices, qtype: str) -> str | None:
    """Returns what matrices would have to have for a type of blocks, and have not."""
    block, groups = _BLOCKS[qtype], matrices.group_size
    if matrices.in_features % block:
        return f"a multiple of {block} inputs for {qtype}, got {matrices.in_features}"
    if groups is not None and groups % block:
        return f"one scale for {block} inputs for {qtype}, got groups of {groups}"
    return None


def _instead(qtype: str) -> str:
    return f'\nPass qtype="{qtype}", or use bitlab_hf.save.'


def values_of(matrices: Matrices, qtype: str, order: Tensor | None) -> Tensor:
    """Returns what a file holds of matrices: bytes of the type's blocks, or bfloat16.

    Args:
        matrices: Some that `check_layers` let through.
        qtype: The type.
        order: Where each of the file's rows is found, or None for as they are.
    """
    made = [_encoded(codes, scale, qtype, order) for codes, scale in matrices]
    return made[0] if matrices.experts is None else torch.stack(made)


def _encoded(codes: Tensor, scale: Tensor, qtype: str, order: Tensor | None) -> Tensor:
    if order is not None:
        codes = codes[order]
        scale = scale if len(scale) == 1 else scale[order]
    # Part by part: those of an embedding are as many as of the rest of a small model.
    parts = [
        _encoded_rows(codes[rows], scale if len(scale) == 1 else scale[rows], qtype)
        for rows in row_blocks(*codes.shape)
    ]
    return torch.cat(parts)


def _encoded_rows(codes: Tensor, scale: Tensor, qtype: str) -> Tensor:
    import gguf

    if qtype == "BF16":
        return dequantize(codes, scale, torch.bfloat16)
    if qtype == "Q2_0":
        blocks = codes.shape[1] // q2_0.BLOCK
        columns = scale if scale.dim() == 2 else scale.unsqueeze(1)
        spread = columns.repeat_interleave(blocks // columns.shape[1], 1)
        return q2_0.encode(codes, spread.expand(len(codes), -1))
    values = dequantize(codes, scale, torch.float32).numpy()
    return torch.from_numpy(gguf.quants.quantize(values, gguf.GGMLQuantizationType[qtype]))
