"""Ternary GGUF files as deployed models: the inverse of `export_gguf`.

Every matrix is read row block by row block through the memory map, and its structure is found by
its values, as for floats that are ternary already: a file's scale for each 256 inputs becomes one
of the matrix or of the row where they are equal, and two of 128 inputs each where they are not;
that of 64 inputs, one of groups of 128 where neighbours are equal, and else of 64.
Nothing of the file is used as a path.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitcore.errors import ArgumentError, CheckpointError
from bitlab_hf.checkpoint.card import model_card
from bitlab_hf.checkpoint.rotated import check_not_rotated
from bitlab_hf.checkpoint.saving import replacing
from bitlab_hf.interop import q2_0
from bitlab_hf.interop.gguf import renamed
from bitlab_hf.interop.gguf_architectures import BY_NAME, row_order, shift_of
from bitlab_hf.interop.gguf_config import read_config
from bitlab_hf.interop.gguf_file import GgufFile, GgufTensor, read_gguf, require_gguf
from bitlab_hf.interop.gguf_tokenizer import rebuild_tokenizer
from bitlab_hf.interop.matrices import apart
from bitlab_hf.interop.packed_configuration import (
    experts_of,
    packed_configuration,
    swap_skeleton,
)
from bitlab_hf.interop.packed_file import (
    find_expert_structures,
    find_structures,
    prove_file,
    write_file,
)
from bitlab_hf.interop.packed_stream import check_group_scale_dtype
from bitlab_hf.interop.skeleton import building
from bitlab_hf.interop.source import Experts, Source
from bitlab_hf.model.embedding import packable_embedding
from bitlab_hf.model.replace import find_linears

logger = logging.getLogger("bitlab")
# Bytes of a block of each layout of Q2_0.
_Q2_0 = {"Q2_0": q2_0.SIZE, "Q2_0 of 128": q2_0.WIDE_SIZE}
# Names of the ternary types that are read.
TERNARY = (*_Q2_0, "TQ2_0", "TQ1_0")
_FLOATS = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FACTORS = "rope_freqs.weight"


class _Matrix:
    """A tensor of the file as floats, its rows in transformers' order.

    Args:
        item: The tensor.
        order: Where each row lies in the file, or None for as they are.
        shift: What the file has added to each value.

    Attributes:
        kind: GGUF's name of its type.
        ternary, shape, dtype, n_bytes: See `packed_file.Source`.
    """

    def __init__(self, item: GgufTensor, order: Tensor | None, shift: float = 0.0) -> None:
        self._item, self._shift = item, shift
        self._data, self._order = item.data, None if order is None else order.numpy()
        self.kind, self.shape, self.n_bytes = item.kind, item.shape, item.data.nbytes
        self.dtype, self.ternary = _FLOATS.get(self.kind, torch.float32), self.kind in TERNARY

    def experts(self) -> list[_Matrix]:
        """Returns the matrices of a tensor [E, N, K]."""
        sizes = self.shape[1:]
        return [
            _Matrix(replace(self._item, shape=sizes, data=data.reshape(sizes[0], -1)), None)
            for data in self._data
        ]

    def numel(self) -> int:
        """Returns the number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        import gguf

        part = np.array(self._data[rows if self._order is None else self._order[rows]])
        shape = (len(part), *self.shape[1:])
        if not len(part):
            return torch.zeros(shape, dtype=self.dtype)
        if self.kind in _Q2_0:
            return q2_0.decode(part, _Q2_0[self.kind])
        if self.kind in TERNARY:
            with np.errstate(all="ignore"):
                # Scales that are not finite are found by their values.
                part = gguf.quants.dequantize(part, gguf.GGMLQuantizationType[self.kind])
        values = torch.from_numpy(part).view(self.dtype).view(shape)
        return values - self._shift if self._shift else values


def load_gguf(
    path: str | os.PathLike[str],
    *,
    activation_dtype: str | None = None,
    group_scale_dtype: str = "float32",
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a ternary GGUF file as a deployed model.

    It goes through a temporary folder, which needs the space of the packed model.

    Args:
        path: The file.
        activation_dtype: See `import_gguf`.
        group_scale_dtype: See `import_gguf`.
        auto_class: Which of transformers' auto classes loads it.
        kwargs: Passed to ``from_pretrained``.

    Returns:
        The model, with the file's codes and scales.

    Raises:
        MissingExtraError, ArgumentError, CheckpointError: See `import_gguf`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        import_gguf(
            path,
            Path(scratch) / "model",
            activation_dtype=activation_dtype,
            group_scale_dtype=group_scale_dtype,
        )
        # What is memory-mapped stays when its name goes.
        model: Any = auto_class.from_pretrained(Path(scratch) / "model", **kwargs)
    model.config._name_or_path = str(path)
    return cast(PreTrainedModel, model)


def import_gguf(
    path: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    activation_dtype: str | None = None,
    group_scale_dtype: str = "float32",
    advance: Callable[[int], None] | None = None,
) -> float:
    """Writes a ternary GGUF file as a deployed model with its tokenizer, in place in one step.

    Args:
        path: A file of an architecture that `export_gguf` writes, with tensors of the types Q2_0,
            in blocks of 64 or, as other programs write it, of 128, TQ2_0, TQ1_0, BF16, F16 and F32.
            Linear layers, experts and an embedding in floats that are exactly ternary are packed
            too, others stay float.
        directory: The folder to write.
        activation_dtype: ``"int8"`` or ``"float32"``, see `BitLabConfig`; the file does not say.
            Default int8 where a tensor is of a ternary type, for which llama.cpp quantizes
            activations, else float32.
        group_scale_dtype: How scales of groups are kept: ``"float32"`` as they are, ``"uint8"`` as
            7-bit multipliers of one a row, which is smaller and faster; see `BitLabConfig`. Of a
            Q2_0 file that BitLab wrote of such a model, these come back as they were.
        advance: Called with the bytes of the file done; the sum is about its size.

    Returns:
        The largest relative change of a scale; 0 where all are the file's.

    Raises:
        MissingExtraError: The package ``gguf`` is not installed.
        ArgumentError: There is no such file, or group_scale_dtype is another.
        ConfigError: Its weights are rotated.
        CheckpointError: The file is truncated or damaged, of an unknown architecture, holds a
            tensor of another type or one that the model does not have, one of a ternary type whose
            values are not, lacks one, or has no ternary layer.
    """
    check_group_scale_dtype("import_gguf", group_scale_dtype)
    advance = advance or (lambda size: None)
    file = _open(Path(path))
    fields, items = file.fields, file.tensors
    check_not_rotated("load_gguf", fields)
    if fields.get("split.count", 1) not in (0, 1):
        raise CheckpointError(
            "load_gguf: the model must be in one file, got a part of one\n"
            "Merge the parts with llama.cpp's gguf-split."
        )
    for item in items.values():
        if item.kind not in (*TERNARY, *_FLOATS):
            raise CheckpointError(
                f"load_gguf: {item.name} must be of a type among "
                f"{', '.join((*TERNARY, *_FLOATS))}, got {item.kind}\n"
                "Run the file with llama.cpp, or start from its float model."
            )
    shapes = {name: item.shape for name, item in items.items()}
    factors = _rope_factors(items.get(_FACTORS))
    config = read_config(fields, shapes, factors)
    with building(Path(path).name, "load_gguf"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    sources = _sources(model, str(fields["general.architecture"]), items)
    # The embedding's, or where that is ternary the first that another matrix has.
    matrices = [sources["model.embed_tokens.weight"], *sources.values()]
    floats = [one.dtype for one in matrices if len(one.shape) == 2 and not one.ternary]
    config.dtype = floats[0] if floats else torch.float32
    names = {
        f"{name}.weight": name
        for found in find_linears(model, [])
        for name in found.names
        if f"{name}.weight" in sources
    }
    embedding = packable_embedding(model)
    vocabulary = {} if embedding is None else {f"{embedding.owner}.weight": embedding.owner}
    experts = experts_of(model)
    found = find_structures("load_gguf", sources, names | vocabulary)
    found |= find_expert_structures("load_gguf", sources, experts)
    structures = {key: held.kept_as(group_scale_dtype) for key, held in found.items()}
    if vocabulary.keys() >= structures.keys():
        raise CheckpointError(
            "load_gguf: at least one linear layer must be ternary, got none\n"
            "transformers loads other GGUF files: from_pretrained(folder, gguf_file=...)."
        )
    if activation_dtype is None:
        ternary = any(sources[key].ternary for key in structures)
        activation_dtype = "int8" if ternary else "float32"
    quantization = packed_configuration(
        model,
        names | vocabulary,
        structures,
        group_scale_dtype,
        activation_dtype,
        experts,
        embedding,
    )
    tokenizer = rebuild_tokenizer(fields)
    if tokenizer is None:
        logger.warning(
            "load_gguf: the tokenizer is of a kind that is not rebuilt (%s, %s); take the one of "
            "the model's source",
            fields.get("tokenizer.ggml.model"),
            fields.get("tokenizer.ggml.pre"),
        )
    with replacing(directory, "import_gguf") as staged:
        weights = staged / "model.safetensors"
        change = write_file("load_gguf", weights, sources, structures, advance)
        prove_file(weights, sources, structures)
        config.quantization_config = quantization.to_dict()
        config.save_pretrained(staged)
        if tokenizer is not None:
            tokenizer.save_pretrained(staged)
        swap_skeleton(model, quantization)
        title = Path(directory).resolve().name
        (staged / "README.md").write_text(model_card(model, title), encoding="utf-8")
    return change


def _open(path: Path) -> GgufFile:
    require_gguf("load_gguf")
    if not path.is_file():
        raise ArgumentError(f"load_gguf: path must be a GGUF file, got {str(path)!r}")
    return read_gguf(path)


def _rope_factors(item: GgufTensor | None) -> Tensor | None:
    if item is None:
        return None
    if item.kind not in _FLOATS or len(item.shape) != 1:
        raise CheckpointError(
            f"load_gguf: {item.name} must be a vector of floats, got {item.kind} {list(item.shape)}"
        )
    return _Matrix(item, None)[:].float()


def _sources(
    model: PreTrainedModel, architecture: str, items: dict[str, GgufTensor]
) -> dict[str, Source]:
    """Returns the file's tensor of each parameter, or its tensors of experts' gate and up, by the
    model's name of it.
    """
    import gguf

    arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    known = gguf.get_tensor_name_map(arch, model.config.num_hidden_layers)
    stacks = {key for keys in experts_of(model).values() for key in keys}
    sources: dict[str, Source] = {}
    used = {_FACTORS}
    for key, parameter in model.state_dict().items():
        if key == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        layer = key.rpartition(".")[0]
        order = row_order(model.config, layer) if BY_NAME[architecture].pairs else None
        shift = shift_of(BY_NAME[architecture], key)
        held = []
        for ours, part in apart(key, parameter):
            item = _item(renamed(known, ours), items, tuple(part.shape), key in stacks)
            used.add(item.name)
            held.append(_Matrix(item, None if order is None else order.argsort(), shift))
        sources[key] = _joined(held) if key in stacks else held[0]
    further = sorted(set(items) - used)
    if further:
        raise CheckpointError(
            f"load_gguf: every tensor must be one that {type(model).__name__} has, "
            f"got {further[0]!r}\nRun the file with llama.cpp."
        )
    return sources


def _item(
    name: str, items: dict[str, GgufTensor], shape: tuple[int, ...], is_stack: bool
) -> GgufTensor:
    """Returns a tensor of the file that has to be of a shape."""
    if name not in items:
        raise CheckpointError(
            f"load_gguf: {name} must be in the file, got none\nThe file is incomplete."
        )
    item = items[name]
    if (1, *item.shape) == shape:
        # llama.cpp's own files have the one row of a shared expert's gate as a vector.
        item = replace(item, shape=shape, data=item.data.reshape(1, -1))
    if item.shape != shape:
        raise CheckpointError(
            f"load_gguf: {name} must be of shape {list(shape)}, got {list(item.shape)}"
        )
    if item.kind in TERNARY and len(shape) != 2 and not is_stack:
        raise CheckpointError(f"load_gguf: {name} must be of a float type, got {item.kind}")
    return item


def _joined(held: list[_Matrix]) -> Experts:
    """Returns the experts of a projection: of each, the matrices of these tensors."""
    return Experts([list(parts) for parts in zip(*map(_Matrix.experts, held), strict=True)])
