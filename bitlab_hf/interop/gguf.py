"""Models as GGUF files for llama.cpp, tokenizer included.

The ternary types of GGUF hold the codes as they are and one float16 scale for every 64 inputs
(Q2_0) or 256 (TQ2_0, TQ1_0), so nothing but that rounding is lost. What a file cannot express is
refused before anything is written. llama.cpp quantizes activations by blocks, of 32 or 256, where
BitLab does by token, so its logits differ.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError, ArgumentTypeError
from bitlab_hf.checkpoint.atomic import (
    check_place,
    naming_full_disk,
    naming_place,
    put_in_place,
    resolved,
    staged_beside,
)
from bitlab_hf.interop.gguf_architectures import (
    Architecture,
    add_metadata,
    check_architecture,
    row_order,
    shift_of,
)
from bitlab_hf.interop.gguf_file import require_gguf
from bitlab_hf.interop.gguf_tokenizer import add_tokenizer, find_tokenizer
from bitlab_hf.interop.gguf_types import (
    ALTERNATIVES,
    QTYPES,
    check_layers,
    default_type,
    ggml_type,
    values_of,
)
from bitlab_hf.interop.matrices import apart, matrices_of
from bitlab_hf.model.parts import check_whole
from bitlayers.experts import BitExperts
from bitlayers.int8 import Int8Rows

if TYPE_CHECKING:
    import gguf


_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_ROUTER = "ffn_gate_inp"
# The names that gguf's map knows, of the first models of BitNet and of experts.
_RENAMED = {
    "attn_sub_norm": "inner_attn_ln",
    "ffn_sub_norm": "ffn_layernorm",
    "block_sparse_moe.router": "mlp.gate",
    "block_sparse_moe.": "mlp.",
}


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: its name, shape and type, and what makes its bytes."""

    name: str
    shape: tuple[int, ...]
    kind: str
    make: Callable[[], Tensor]


def export_gguf(
    model: PreTrainedModel,
    path: str | os.PathLike[str],
    qtype: str | None = None,
    *,
    tokenizer: Any = None,
    pre_tokenizer: str | None = None,
    advance: Callable[[float], None] = lambda _share: None,
) -> float:
    """Writes a model and its tokenizer as one GGUF file, in place in one step.

    Args:
        model: A latent or deployed model; it is left as it is.
        path: The file.
        qtype: ``"Q2_0"`` (2.25 bits a weight; takes scales of groups), ``"TQ2_0"`` (2.06),
            ``"TQ1_0"`` (1.69) or ``"BF16"`` for what is ternary; everything else keeps the
            model's dtype, which what is int8 is rounded to, norms are float32.
            Default TQ2_0 if it can hold every layer, else Q2_0.
        tokenizer: The tokenizer; default the one of the folder or repository that the model was
            loaded from.
        pre_tokenizer: llama.cpp's name of how text is split; default found from the tokenizer.
        advance: Called with the share of all values that was written since the last call.

    Returns:
        The largest relative change of a scale, which is rounded to float16; with BF16 to bfloat16.

    Raises:
        MissingExtraError: The package ``gguf`` is not installed.
        ArgumentTypeError: model is no transformers model.
        ArgumentError: path is a folder or a file of another kind; or the architecture, a layer or
            the tokenizer cannot be expressed: the message says why and what can.
        DiskFullError: It does not fit; what was there is as it was.
    """
    require_gguf("export_gguf")
    import gguf

    if not isinstance(model, PreTrainedModel):
        raise ArgumentTypeError(
            f"export_gguf: model must be a transformers PreTrainedModel, got {type(model).__name__}"
        )
    check_whole("export_gguf", model)
    if qtype not in (None, *QTYPES):
        raise ArgumentError(f"export_gguf: qtype must be one of {QTYPES}, got {qtype!r}")
    check_target(path)
    architecture = check_architecture(model)
    qtype = qtype or default_type(model)
    change = check_layers(model, qtype)
    tokenizer = find_tokenizer(model, tokenizer)
    target = Path(path).resolve()
    with naming_place(path, "export_gguf"):
        target.parent.mkdir(parents=True, exist_ok=True)
    tensors = list(_tensors(model, architecture, qtype))
    with (
        naming_full_disk(path, "export_gguf"),
        staged_beside(target, "export_gguf") as staged,
    ):
        writer = gguf.GGUFWriter(staged, architecture.name)
        add_metadata(writer, model, architecture, qtype)
        add_tokenizer(writer, tokenizer, model.config.vocab_size, pre_tokenizer)
        _write(writer, tensors, advance)
        put_in_place(staged, target)
    return change


def check_target(path: str | os.PathLike[str]) -> None:
    """Checks that a GGUF file may be written to a path.

    Raises:
        ArgumentError: It is no file, a file of another kind, or lies below a file.
    """
    target = resolved(path, "export_gguf")
    check_place(target.parent, "export_gguf")
    if not target.exists():
        return
    if not target.is_file():
        raise ArgumentError(
            f"export_gguf: path must be a file or a new name, got {path}, which is no file\n"
            f"Name a file in it: {target / 'model.gguf'}."
        )
    with target.open("rb") as file:
        magic = file.read(4)
    if magic not in (b"GGUF", b""):
        raise ArgumentError(
            f"export_gguf: path must be new or a GGUF file, got {path}, a file of another kind\n"
            "Remove it first, or name another."
        )


def _tensors(model: PreTrainedModel, known: Architecture, qtype: str) -> Iterator[_Tensor]:
    """Yields the file's tensors, each under llama.cpp's name."""
    import gguf

    config = model.config
    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == known.name)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    held = matrices_of(model)
    for matrices in held:
        order = row_order(config, matrices.name) if known.pairs else None
        make = partial(values_of, matrices, qtype, order)
        yield _Tensor(renamed(names, matrices.key), matrices.shape, qtype, make)
    ternary = {matrices.key for matrices in held}
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        if config.tie_word_embeddings and module is head:
            continue
        order = row_order(config, name) if known.pairs else None
        if isinstance(module, Int8Rows):
            kind = _float_kind(module.dtype)
            shape = tuple(module.qweight.shape)
            make = partial(_rows, module, kind, order)
            yield _Tensor(renamed(names, f"{name}.weight"), shape, kind, make)
        for leaf, tensor in module.named_parameters(recurse=False):
            ours = isinstance(module, BitExperts | Int8Rows) or f"{name}.weight" in ternary
            if ours and leaf != "bias":
                continue
            shift = shift_of(known, f"{name}.{leaf}")
            for key, part in apart(f"{name}.{leaf}", tensor):
                file_name = renamed(names, key)
                # llama.cpp computes with routers in float32 alone.
                wide = part.dim() > 1 and _ROUTER not in file_name
                kind = _float_kind(part.dtype) if wide else "F32"
                ordered = part if order is None else part[order]
                yield _Tensor(
                    file_name, tuple(part.shape), kind, partial(_floats, ordered, kind, shift)
                )
    if (config.rope_parameters or {}).get("rope_type") == "llama3":
        factors = _rope_factors(model)
        yield _Tensor("rope_freqs.weight", tuple(factors.shape), "F32", lambda: factors)


def _rope_factors(model: PreTrainedModel) -> Tensor:
    """Returns what each plain rotary frequency is divided by, float32 [head_dim / 2]."""
    found = next(
        buffer for name, buffer in model.named_buffers() if name.endswith("rotary_emb.inv_freq")
    )
    scaled = found.detach().float().cpu()
    theta = float(model.config.rope_parameters["rope_theta"])
    steps = torch.arange(0, 2 * len(scaled), 2).float() / (2 * len(scaled))
    return 1.0 / (theta**steps) / scaled


def renamed(names: Any, key: str) -> str:
    """Returns llama.cpp's name of a tensor; names is gguf's map of the architecture."""
    for ours, known in _RENAMED.items():
        key = key.replace(ours, known)
    key = f"{key}.weight" if key.endswith("_proj") else key
    renamed: str | None = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if renamed is None:
        raise ArgumentError(
            f"export_gguf: {key} must be a tensor that llama.cpp knows, got none{ALTERNATIVES}"
        )
    return renamed


def _float_kind(dtype: torch.dtype) -> str:
    return next((kind for kind, held in _DTYPES.items() if held == dtype), "F32")


def _rows(module: Int8Rows, kind: str, order: Tensor | None) -> Tensor:
    values = module.dequantized_weight(_DTYPES[kind]).detach().cpu()
    return values if order is None else values[order]


def _floats(tensor: Tensor, kind: str, shift: float) -> Tensor:
    values = tensor.detach().to("cpu", _DTYPES[kind])
    return values + shift if shift else values


def _write(
    writer: gguf.GGUFWriter, tensors: list[_Tensor], advance: Callable[[float], None]
) -> None:
    import numpy as np

    for tensor in tensors:
        kind, block, size = ggml_type(tensor.kind)
        count = math.prod(tensor.shape) // block * size
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), count, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    total = sum(math.prod(tensor.shape) for tensor in tensors)
    for tensor in tensors:
        values = tensor.make().contiguous()
        writer.write_tensor_data(values.view(torch.uint8).numpy())
        advance(math.prod(tensor.shape) / total)
    writer.close()
