"""What a checkpoint holds, read from the headers of its safetensors files before anything is
loaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from bitcore.errors import CheckpointError
from bitcore.ops import find_invalid_code
from bitlab_hf.checkpoint.files import own_safetensors
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.head import (
    Rows,
    check_supported,
    find_rows,
    input_embeddings,
    int8_modules,
    is_borrower,
)
from bitlab_hf.model.tree import Found
from bitlayers.base import BitLayerBase
from bitlayers.checks import int8_problem, scales_are_valid
from bitlayers.int8 import Int8Rows

# In the header of every file of a deployed checkpoint: the names of the converted layers, as JSON.
LAYERS_KEY = "bitlab_layers"
_SAFETENSORS_NAMES = {"F32": "float32", "U8": "uint8", "I8": "int8"}
_FLOATS = ("F32", "BF16", "F16")


@dataclass(frozen=True)
class TensorHeader:
    """A tensor of a file: the key it is stored under, its dtype as safetensors names it, its
    shape.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by the names that the model gives them.

    Attributes:
        tensors: Header of each tensor.
        layers: Names of the converted layers, as the model calls them; None where the file does
            not tell.
    """

    tensors: dict[str, TensorHeader]
    layers: set[str] | None

    def sentinels(self) -> list[str]:
        """Returns the names of the empty tensors that make a load without BitLab fail."""
        return [
            key
            for name, header in self.tensors.items()
            if name.endswith(".weight") and header.shape == (0,) and header.dtype == "U8"
            for key in {name, header.key}
        ]


def read_checkpoint(
    model: PreTrainedModel, files: list[str] | None, quantizer: Any
) -> Checkpoint | None:
    """Reads the headers of a checkpoint's files.

    Args:
        model: The skeleton that the checkpoint is loaded into; it decides how keys are renamed.
        files: The files, or None.
        quantizer: The HfQuantizer at work.

    Returns:
        What the files hold; None if there are no files, or not in safetensors.

    Raises:
        CheckpointError: A file is truncated, its header is damaged, or it lies elsewhere.
    """
    files = own_safetensors(model.name_or_path, files)
    if files is None:
        return None
    headers: list[TensorHeader] = []
    layers: set[str] | None = None
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = handle.metadata() or {}
                for key in handle.keys():  # noqa: SIM118  (not a mapping)
                    part = handle.get_slice(key)
                    headers.append(TensorHeader(key, part.get_dtype(), tuple(part.get_shape())))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{Path(file).name}: the file must be a whole safetensors file, got: {error}\n"
                "It is truncated or damaged; fetch or write it again."
            ) from error
        if LAYERS_KEY in metadata:
            try:
                layers = (layers or set()) | set(json.loads(metadata[LAYERS_KEY]))
            except (ValueError, TypeError) as error:
                raise CheckpointError(
                    f"{Path(file).name}: {LAYERS_KEY} must be a JSON list, got: {error}"
                ) from error
    rename = _Renamer(model, quantizer)
    tensors = {name: header for header in headers for name in rename(header.key)}
    if layers is not None:
        layers = {
            rename(f"{layer}.qweight")[0].removesuffix(".qweight") for layer in sorted(layers)
        }
    return Checkpoint(tensors, layers)


class _Renamer:
    """Names checkpoint keys as transformers does when it loads them."""

    def __init__(self, model: PreTrainedModel, quantizer: Any) -> None:
        mapping = get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self._converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._keys: dict[str, Any] = dict(model.state_dict())
        # Packed names are not in the skeleton yet; they follow the prefix of the weight they
        # replace.
        for name in list(self._keys):
            if name.endswith(".weight"):
                base = name.removesuffix("weight")
                self._keys.update({base + "qweight": True, base + "qweight_scale": True})

    def __call__(self, key: str) -> list[str]:
        renamed, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._keys
        )
        if pattern is None:
            return [renamed]
        converter = next(item for item in self._converters if pattern in item.source_patterns)
        first = converter.target_patterns[0]
        return [renamed.replace(first, target) for target in converter.target_patterns]


def split_by_presence(
    found: list[Found[nn.Linear]], checkpoint: Checkpoint, packed: bool, was_converted: bool
) -> tuple[list[Found[nn.Linear]], list[Found[nn.Linear]]]:
    """Tells converted layers from layers that the checkpoint does not know (new task heads).

    Args:
        found: Linear layers that would be converted.
        checkpoint: What the files hold.
        packed: Whether the files hold packed weights.
        was_converted: Whether the files were written by BitLab.

    Returns:
        The layers to convert, and those that the checkpoint lacks and that stay float.

    Raises:
        CheckpointError: A converted layer has no weight in the checkpoint.
    """
    leaf = "qweight" if packed else "weight"
    present: list[Found[nn.Linear]] = []
    lacking: list[Found[nn.Linear]] = []
    for layer in found:
        there = any(f"{name}.{leaf}" in checkpoint.tensors for name in layer.names)
        (present if there else lacking).append(layer)
    for layer in lacking:
        if checkpoint.layers is not None:
            expected = bool(checkpoint.layers.intersection(layer.names))
        else:
            # A new head stands alone; a lost layer leaves the rest of its block in the file.
            parent = layer.names[0].rpartition(".")[0]
            expected = (was_converted and parent != "") and any(
                name.startswith(f"{parent}.") for name in checkpoint.tensors
            )
        if expected:
            raise CheckpointError(
                f"{layer.names[0]}.{leaf} must be in the checkpoint, got none\n"
                "The checkpoint is incomplete; fetch or write it again."
            )
    return present, lacking


def check_format(checkpoint: Checkpoint, packed: bool, found: list[Found[nn.Linear]]) -> None:
    """Checks that ``weight_format`` in config.json is what the file holds.

    Raises:
        CheckpointError: The configuration says latent over packed tensors, or the reverse.
    """
    leaves = {True: "qweight", False: "weight"}
    full = {name for name, header in checkpoint.tensors.items() if header.shape != (0,)}
    held = {
        kind: any(f"{name}.{leaf}" in full for layer in found for name in layer.names)
        for kind, leaf in leaves.items()
    }
    if not held[packed] and held[not packed]:
        says, holds = ("packed", "latent") if packed else ("latent", "packed")
        raise CheckpointError(
            f"bitlab: weight_format must be {holds!r} for these tensors, got {says!r}\n"
            "config.json and the tensors do not belong together."
        )


def check_nothing_left_packed(model: nn.Module, checkpoint: Checkpoint) -> None:
    """Checks that no layer that is packed in the file is built as a plain one.

    Raises:
        CheckpointError: The configuration skips a layer that the file holds packed.
    """
    for name, module in model.named_modules():
        packed = f"{name}.qweight" in checkpoint.tensors or name in (checkpoint.layers or ())
        if packed and not isinstance(module, (BitLayerBase, Int8Rows)):
            raise CheckpointError(
                f"{name} must not be in modules_to_not_convert, got one that is packed in the "
                "checkpoint\nconfig.json and the tensors do not belong together."
            )


def check_float_header(name: str, header: TensorHeader, shape: tuple[int, ...]) -> None:
    """Checks a float weight that is to be packed.

    Raises:
        CheckpointError: It has another shape, or a dtype that cannot be packed.
    """
    if header.shape != shape or header.dtype not in _FLOATS:
        raise CheckpointError(
            f"{name} must be float32, bfloat16 or float16 {list(shape)} to be packed, "
            f"got {header.dtype} {list(header.shape)}"
        )


def ignore_unexpected(model: PreTrainedModel, names: list[str]) -> None:
    """Adds keys that a load may find without a word."""
    patterns = {f"^{re.escape(name)}$" for name in names}
    known = set(model._keys_to_ignore_on_load_unexpected or ())
    model._keys_to_ignore_on_load_unexpected = known | patterns


def check_packed_headers(layers: list[Found[BitLayerBase]], checkpoint: Checkpoint) -> None:
    """Checks that every packed layer has the tensors its configuration asks for.

    Args:
        layers: The packed layers.
        checkpoint: What the files hold.

    Raises:
        CheckpointError: A tensor is missing or has another dtype or shape; the message names it.
    """
    for found in layers:
        layer = found.module
        shape, scale_shape = layer.packed_shapes()
        wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            "qweight": (("U8",), shape),
            "qweight_scale": (("F32",), scale_shape),
        }
        if layer.bias is not None:
            wanted["bias"] = (_FLOATS, (layer.out_features,))
        _check_headers(
            found.names, wanted, checkpoint, f"{layer.quant_config.weight_granularity} weights"
        )


def _check_headers(
    names: list[str],
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]],
    checkpoint: Checkpoint,
    what: str,
) -> None:
    """Checks the tensors of one module, by its names: ``{leaf: (dtypes, shape)}``."""
    for leaf, (dtypes, expected) in wanted.items():
        headers = [checkpoint.tensors.get(f"{name}.{leaf}") for name in names]
        header = next((item for item in headers if item is not None), None)
        name = f"{names[0]}.{leaf}"
        if header is None:
            raise CheckpointError(
                f"{name} must be in the checkpoint, got none\n"
                "The checkpoint is incomplete; fetch or write it again."
            )
        if header.dtype not in dtypes or header.shape != expected:
            dtype = _SAFETENSORS_NAMES[dtypes[0]]
            raise CheckpointError(
                f"{name} must be {dtype} {list(expected)} for {what}, got {header.dtype} "
                f"{list(header.shape)}\nconfig.json and the tensors do not belong together."
            )


def stored_int8(model: PreTrainedModel, checkpoint: Checkpoint, config: BitLabConfig) -> list[Rows]:
    """Returns the output head, and the input embedding, where a deployed file holds them in int8.

    The header says which modules it holds so; a head that it does not list is a new one. A file
    whose header is lost is taken to hold what the configuration says.

    Raises:
        CheckpointError: A tensor is missing, has another dtype or shape, or should not be there.
        ConfigError: The model's head or embedding has no int8 form.
    """
    if config.head != "int8":
        return []
    head = model.get_output_embeddings()
    result: list[Rows] = []
    for module in (head, input_embeddings(model)):
        if not isinstance(module, (nn.Linear, nn.Embedding)) or any(
            module is found.module for rows in result for found in rows.members
        ):
            continue
        rows = find_rows(model, module)
        held = {
            leaf: [name for name in rows.names if f"{name}.{leaf}" in checkpoint.tensors]
            for leaf in ("weight", "qweight", "qweight_scale")
        }
        if checkpoint.layers is not None:
            expected = bool(checkpoint.layers.intersection(rows.names))
        else:
            tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
            expected = not held["weight"] and (module is head or tied)
        if not expected and not held["qweight"]:
            continue
        check_supported(model, rows)
        _check_int8_headers(rows, checkpoint)
        result.append(rows)
    return result


def _check_int8_headers(rows: Rows, checkpoint: Checkpoint) -> None:
    owner, *borrowers = rows.members
    shape = tuple(rows.tensor.shape)
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("I8",), shape),
        "qweight_scale": (("F32",), shape[:1]),
    }
    if getattr(owner.module, "bias", None) is not None:
        wanted["bias"] = (_FLOATS, shape[:1])
    _check_headers(owner.names, wanted, checkpoint, 'head="int8"')
    for name in (name for found in borrowers for name in found.names):
        for leaf in ("weight", *wanted):
            if f"{name}.{leaf}" in checkpoint.tensors:
                raise CheckpointError(
                    f"{name}.{leaf} must not be in the checkpoint, got one, though {name} is tied "
                    f"to {rows.owner}\nconfig.json and the tensors do not belong together."
                )


def verify_int8(model: PreTrainedModel) -> None:
    """Scans int8 tensors for what no writer produces.

    Raises:
        CheckpointError: A qweight holds -128, or a scale is not a finite positive number.
    """
    for found in int8_modules(model):
        if is_borrower(model, found):
            continue
        problem = int8_problem(
            f"{found.names[0]}.", found.module.qweight, found.module.qweight_scale
        )
        if problem is not None:
            raise CheckpointError(f"{problem}\nThe file is damaged; fetch or write it again.")


def with_tied(checkpoint: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """Counts a tied weight as present if the weight it is tied to is."""
    tensors = dict(checkpoint.tensors)
    for pair in model.all_tied_weights_keys.items():
        known = next((tensors[name] for name in pair if name in tensors), None)
        if known is not None:
            tensors.update({name: tensors.get(name, known) for name in pair})
    return Checkpoint(tensors, checkpoint.layers)


def verify_packed(layers: list[Found[BitLayerBase]]) -> None:
    """Scans packed tensors for what no writer produces.

    Raises:
        CheckpointError: A qweight holds the code 3, or a scale is not a finite positive number.
    """
    held = [(found.names[0], *found.module.packed()) for found in layers]
    held = [one for one in held if not one[1].is_meta]
    invalid = find_invalid_code([qweight for _, qweight, _ in held])
    if invalid is not None:
        raise CheckpointError(
            f"{held[invalid][0]}.qweight must hold the codes 0, 1 and 2, got the invalid code 3\n"
            "The file is damaged; fetch or write it again."
        )
    for name, _, scale in held:
        if not scales_are_valid(scale):
            raise CheckpointError(
                f"{name}.qweight_scale must be finite and positive, got other values\n"
                "The file is damaged; fetch or write it again."
            )
