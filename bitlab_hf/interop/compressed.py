"""Models as compressed-tensors checkpoints, which transformers loads without BitLab.

The format is ``pack-quantized`` with two bits, symmetric: ``weight_packed`` holds ``code + 2``,
sixteen neighbours of a row in an int32, the first in its lowest bits; ``weight_scale`` one float
for each row or group; ``weight_shape`` the rows and columns. Nothing of a weight is lost.
Activations are not quantized in it: its readers compute in the model's dtype.
"""

from __future__ import annotations

import copy
import os
from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitcore import unpack_ternary
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.quantize import group_scale
from bitlab_hf.checkpoint.saving import save
from bitlab_hf.interop.expressible import check_modules
from bitlab_hf.interop.packed_stream import relative_change
from bitlab_hf.interop.two_bits import pack_fields, unpack_fields
from bitlab_hf.model.parts import check_whole
from bitlab_hf.model.tree import Found, quantized_layers
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
# Codes of two bits in an int32, and what is added to each.
WORD, OFFSET = 16, 2
# What a layer's tensors are called.
PACKED, SCALE, SHAPE = "weight_packed", "weight_scale", "weight_shape"


def export_compressed_tensors(
    model: PreTrainedModel,
    directory: str | os.PathLike[str],
    *,
    tokenizer: Any = None,
    **kwargs: Any,
) -> float:
    """Writes a model as a ``pack-quantized`` folder that transformers loads without BitLab.

    It needs the package ``compressed-tensors`` there, not here. Codes and scales are stored
    exactly; a reader casts the scales to the dtype that it computes in. The folder is written
    beside and put in place in one step.

    Numerics: weight-only. Of a model with int8 activations, readers compute the same weights with
    activations that are not quantized, so their logits differ from BitLab's by what quantizing
    activations changes.

    Args:
        model: A latent or deployed model; it is left as it is.
        directory: Where to write; made if needed.
        tokenizer: A tokenizer or processor to save beside the model.
        kwargs: Passed to ``save_pretrained``, such as ``max_shard_size``.

    Returns:
        The largest relative change of a scale in a reader that computes in the model's dtype; 0
        with float32.

    Raises:
        ArgumentTypeError: model is no transformers model.
        ArgumentError: A layer is of a class that the format cannot express; the message says what
            can.
    """
    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(
            "export_compressed_tensors: model must be a transformers PreTrainedModel, "
            f"got {type(model).__name__}"
        )
    check_whole("export_compressed_tensors", model)
    layers = quantized_layers(model)
    _check_expressible(model, layers)
    names = {name for found in layers for name in found.names}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in names or name.endswith(".bias")
    }
    change = 0.0
    for found in layers:
        for name in found.names:
            # Tensors of their own under each name: a file cannot share them.
            held = _tensors(found.module)
            state.update({f"{name}.{leaf}": tensor for leaf, tensor in held.items()})
            if found.module.bias is not None:
                state[f"{name}.bias"] = found.module.bias.detach().clone()
        scale = held[SCALE]
        change = max(change, relative_change(scale, scale.to(model.dtype).float()))
    # A shallow copy, so that neither the model nor its configuration is touched.
    view: Any = copy.copy(model)
    view.__dict__.pop("hf_quantizer", None)
    view.__dict__.pop("quantization_method", None)
    view.config = copy.deepcopy(model.config)
    view.config.quantization_config = _configuration(model, layers)
    save(view, directory, tokenizer=tokenizer, state_dict=state, **kwargs)
    return change


def pack_words(codes: Tensor) -> Tensor:
    """Returns a matrix as ``weight_packed``, int32 [N, ceil(K / 16)].

    Args:
        codes: int8 [N, K], each -1, 0 or +1.
    """
    rows, columns = codes.shape
    words = (columns + WORD - 1) // WORD
    data = torch.zeros(rows, 4 * words, dtype=torch.uint8)
    padded = nn.functional.pad(codes, (0, -columns % 4), value=-OFFSET)
    data[:, : padded.shape[1] // 4] = pack_fields(padded, OFFSET)
    return data.view(torch.int32)


def unpack_words(words: Tensor, columns: int) -> Tensor:
    """Returns the codes of ``weight_packed``, int8 [N, columns], each from -2 to 1.

    Args:
        words: int32 [N, ceil(columns / 16)].
        columns: What is held of each row.
    """
    return unpack_fields(words.contiguous().view(torch.uint8), OFFSET)[:, :columns]


def _tensors(layer: BitLayerBase) -> dict[str, Tensor]:
    """Returns what a file holds of a layer."""
    qweight, scale, *multiplier = (tensor.detach().cpu() for tensor in layer.packed())
    if multiplier:
        scale = group_scale(scale, multiplier[0])
    rows = layer.out_features
    # One scale for the matrix is one for each row: kernels know no other.
    columns = scale if scale.dim() == 2 else scale.view(-1, 1).expand(rows, 1)
    return {
        PACKED: pack_words(unpack_ternary(qweight, rows)),
        SCALE: columns.float().clone(),
        SHAPE: torch.tensor([rows, layer.in_features]),
    }


def _configuration(model: PreTrainedModel, layers: list[Found[BitLayerBase]]) -> dict[str, Any]:
    """Returns the quantization_config: one group of layers for each size of groups."""
    sizes = {name: f.module.quant_config.group_size for f in layers for name in f.names}
    common = Counter(sizes.values()).most_common(1)[0][0]
    groups: dict[str, Any] = {}
    # Names come before the class: readers take the first target that a layer matches.
    for size in [*sorted({*sizes.values()} - {common}, key=str), common]:
        named = sorted(name for name, own in sizes.items() if own == size)
        groups[f"group_{len(groups)}"] = {
            "targets": ["Linear"] if size == common else named,
            "weights": {
                "num_bits": 2,
                "type": "int",
                "symmetric": True,
                "strategy": "channel" if size is None else "group",
                "group_size": size,
                "dynamic": False,
            },
            "input_activations": None,
            "output_activations": None,
        }
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": sorted(
            name
            for name, module in model.named_modules(remove_duplicate=False)
            if isinstance(module, nn.Linear) and name not in sizes
        ),
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _check_expressible(model: PreTrainedModel, layers: list[Found[BitLayerBase]]) -> None:
    if not layers:
        raise ArgumentError("export_compressed_tensors: model must hold quantized layers, got none")
    check_modules(
        "export_compressed_tensors",
        model,
        lambda module: type(module) is BitLinear,
        "\nUse bitlab_hf.save, or model.dequantize() and save_pretrained for a float checkpoint.",
    )
