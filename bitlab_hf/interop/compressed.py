"""Models as compressed-tensors checkpoints, which transformers loads without BitLab.

The format is ``pack-quantized`` with two bits, symmetric: ``weight_packed`` holds ``code + 2``,
sixteen neighbours of a row in an int32, the first in its lowest bits; ``weight_scale`` one float
for each row or group; ``weight_shape`` the rows and columns. Nothing of a weight is lost.
Activations are not quantized in it: its readers compute in the model's dtype.
"""

from __future__ import annotations

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
from bitlab_hf.interop.compressed_experts import names_of
from bitlab_hf.interop.expressible import check_modules
from bitlab_hf.interop.matrices import Matrices, expert_matrices
from bitlab_hf.interop.packed_stream import relative_change
from bitlab_hf.interop.two_bits import pack_fields, unpack_fields
from bitlab_hf.interop.view import view_of
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.parts import check_whole
from bitlab_hf.model.tree import Found, quantized_layers
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.experts import BitExperts

METHOD, FORMAT = "compressed-tensors", "pack-quantized"
# Codes of two bits in an int32, and what is added to each.
WORD, OFFSET = 16, 2
# By what readers know the scheme of experts, which are linear layers only in files.
_EXPERTS = r"re:.*\.experts\.\d+\..*"
_ALTERNATIVES = (
    "\nUse bitlab_hf.save, or model.dequantize() and save_pretrained for a float checkpoint."
)
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
    experts = expert_matrices(model)
    files = {one.key: _file_name(model, one) for one in experts}
    names = {name for found in layers for name in found.names}
    names |= {name for found in expert_modules(model) for name in found.names}
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name.rpartition(".")[0] not in names or name.endswith(".bias")
    }
    change = 0.0

    def rounded(scale: Tensor) -> float:
        return relative_change(scale, scale.to(model.dtype).float())

    for found in layers:
        for name in found.names:
            # Tensors of their own under each name: a file cannot share them.
            held = _tensors(found.module)
            state.update({f"{name}.{leaf}": tensor for leaf, tensor in held.items()})
            if found.module.bias is not None:
                state[f"{name}.bias"] = found.module.bias.detach().clone()
        change = max(change, rounded(held[SCALE]))
    for one in experts:
        for expert, (codes, scale) in enumerate(one):
            held = _stored(codes, scale)
            name = files[one.key].format(expert)
            state.update({f"{name}.{leaf}": tensor for leaf, tensor in held.items()})
            change = max(change, rounded(held[SCALE]))
    view = view_of(
        "export_compressed_tensors", model, layers, _configuration(model, layers, experts)
    )
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
    return _stored(unpack_ternary(qweight, layer.out_features), scale)


def _stored(codes: Tensor, scale: Tensor) -> dict[str, Tensor]:
    """Returns what a file holds of a matrix [N, K] with scales [1], [N] or [N, K / G]."""
    # One scale for the matrix is one for each row: kernels know no other.
    columns = scale if scale.dim() == 2 else scale.view(-1, 1).expand(len(codes), 1)
    return {
        PACKED: pack_words(codes),
        SCALE: columns.float().clone(),
        SHAPE: torch.tensor(codes.shape),
    }


def _file_name(model: PreTrainedModel, matrices: Matrices) -> str:
    """Returns what a file calls experts' matrices, with ``{}`` for the expert's number."""
    names = names_of(model, matrices.tensor)
    if not names:
        raise ArgumentError(
            f"export_compressed_tensors: {matrices.tensor} must be of an architecture whose files "
            f"hold each expert apart, got {type(model).__name__}{_ALTERNATIVES}"
        )
    return names[matrices.part]


def _configuration(
    model: PreTrainedModel, layers: list[Found[BitLayerBase]], experts: list[Matrices]
) -> dict[str, Any]:
    """Returns the quantization_config: one group of layers for each size of groups, and one of
    experts.
    """
    sizes = {name: f.module.quant_config.group_size for f in layers for name in f.names}
    common = Counter(sizes.values()).most_common(1)[0][0] if sizes else None
    groups: dict[str, Any] = {}
    for size in _expert_sizes(experts):
        groups["group_0"] = _group([_EXPERTS], size)
    # Names come before the class: readers take the first target that a layer matches.
    for size in [*sorted({*sizes.values()} - {common}, key=str), common] if sizes else []:
        named = sorted(name for name, own in sizes.items() if own == size)
        groups[f"group_{len(groups)}"] = _group(["Linear"] if size == common else named, size)
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


def _group(targets: list[str], size: int | None) -> dict[str, Any]:
    """Returns the scheme of what has groups of a size, or one scale a row."""
    weights = {
        "num_bits": 2,
        "type": "int",
        "symmetric": True,
        "strategy": "channel" if size is None else "group",
        "group_size": size,
        "dynamic": False,
    }
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": None,
        "output_activations": None,
    }


def _expert_sizes(experts: list[Matrices]) -> set[int | None]:
    """Returns the size of experts' groups, none where there are no experts."""
    sizes = {one.group_size for one in experts}
    if len(sizes) > 1:
        one = next(one for one in experts if one.group_size != experts[0].group_size)
        raise ArgumentError(
            f"export_compressed_tensors: {one.name} must have the scales of {experts[0].name}, "
            f"since readers take one scheme for all experts, got groups of {one.group_size} beside "
            f"{experts[0].group_size}{_ALTERNATIVES}"
        )
    return sizes


def _check_expressible(model: PreTrainedModel, layers: list[Found[BitLayerBase]]) -> None:
    if not layers and not expert_modules(model):
        raise ArgumentError("export_compressed_tensors: model must hold quantized layers, got none")
    check_modules(
        "export_compressed_tensors",
        model,
        lambda module: type(module) is BitLinear or isinstance(module, BitExperts),
        _ALTERNATIVES,
    )
