"""What a checkpoint holds, read from the headers of its safetensors files before anything is
loaded.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from bitcore.errors import CheckpointError
from bitlab_hf.checkpoint.files import claim_keys, own_safetensors
from bitlab_hf.model.experts import tensor_names
from bitlayers.state import SCALES

# In the header of every file of a deployed checkpoint: the names of the converted layers, as JSON.
LAYERS_KEY = "bitlab_layers"
# There too: whose names the tensors have. Most architectures' files are renamed, fused or split on
# their way into the model; packed tensors cannot be, so BitLab writes the names of the model.
NAMES_KEY = "bitlab_names"
MODEL_NAMES = "model"
FLOATS = ("F32", "BF16", "F16")
_INTEGERS = ("I", "U", "BOOL")


@dataclass(frozen=True)
class TensorHeader:
    """A tensor of a file: the key it is stored under, its dtype as safetensors names it, its
    shape.

    Attributes:
        converted: Whether transformers splits it, joins it with others or rearranges its values:
            the shape is that of the stored one.
    """

    key: str
    dtype: str
    shape: tuple[int, ...]
    converted: bool = False


@dataclass(frozen=True)
class Checkpoint:
    """The tensors of a checkpoint by the names that the model gives them.

    Attributes:
        tensors: Header of each tensor.
        layers: Names of the converted layers, as the model calls them; None where the file does
            not tell.
        own_names: Whether the file has the model's own names throughout.
        sources: All stored tensors that one is put together from, by its name.
        files: The files' paths.
    """

    tensors: dict[str, TensorHeader]
    layers: set[str] | None
    own_names: bool = False
    sources: dict[str, list[TensorHeader]] = field(default_factory=dict)
    files: tuple[str, ...] = ()

    @cached_property
    def _by_module(self) -> dict[str, dict[str, TensorHeader]]:
        found: dict[str, dict[str, TensorHeader]] = {}
        for name, header in self.tensors.items():
            parts = name.split(".")
            for end in range(1, len(parts) if header.shape != (0,) else 0):
                module, leaf = ".".join(parts[:end]), ".".join(parts[end:])
                found.setdefault(module, {})[leaf] = header
        return found

    def leaves(self, names: list[str]) -> dict[str, TensorHeader]:
        """Returns what is stored of a module, by the names of its tensors within it."""
        return {
            leaf: item for name in names for leaf, item in self._by_module.get(name, {}).items()
        }

    def sentinels(self) -> list[str]:
        """Returns the names of the empty tensors that make a load without BitLab fail."""
        return [
            key
            for name, header in self.tensors.items()
            if name.endswith((".weight", "up_proj", "down_proj"))
            and header.shape == (0,)
            and header.dtype == "U8"
            for key in {name, header.key}
        ]


def read_checkpoint(
    model: PreTrainedModel, files: list[str] | None, quantizer: Any, folder: str | None = None
) -> Checkpoint | None:
    """Reads the headers of a checkpoint's files.

    Args:
        model: The skeleton that the checkpoint is loaded into; it decides how keys are renamed.
        files: The files, or None.
        quantizer: The HfQuantizer at work.
        folder: Where the files are to lie; default: where the model says that it comes from.

    Returns:
        What the files hold; None if there are no files, or not in safetensors.

    Raises:
        CheckpointError: A file is truncated, its header is damaged, or it lies elsewhere.
    """
    files = own_safetensors(folder or model.name_or_path, files)
    if files is None:
        return None
    headers: dict[str, TensorHeader] = {}
    owners: dict[str, str] = {}
    layers: set[str] | None = None
    own_names = False
    for file in files:
        try:
            with safe_open(file, framework="pt") as handle:
                metadata = handle.metadata() or {}
                claim_keys(owners, handle.keys(), file)
                for key in handle.keys():  # noqa: SIM118  (not a mapping)
                    part = handle.get_slice(key)
                    shape = tuple(part.get_shape())
                    headers[key] = TensorHeader(key, part.get_dtype(), shape)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{Path(file).name}: the file must be a whole safetensors file, got: {error}\n"
                "It is truncated or damaged; fetch or write it again."
            ) from error
        own_names = own_names or metadata.get(NAMES_KEY) == MODEL_NAMES
        if LAYERS_KEY in metadata:
            layers = (layers or set()) | _listed(Path(file).name, metadata[LAYERS_KEY])
    rename = _Renamer(model, None if own_names else quantizer, own_names)
    tensors: dict[str, TensorHeader] = {}
    sources: dict[str, list[TensorHeader]] = {}
    for key in headers:
        for name, header in rename.header(headers[key]):
            tensors[name] = header
            if header.converted:
                sources.setdefault(name, []).append(header)
    if layers is not None:
        layers = {rename.layer(name) for name in layers}
    return Checkpoint(tensors, layers, own_names, sources, tuple(files))


def check_floats(model: PreTrainedModel, tensors: dict[str, TensorHeader]) -> None:
    """Checks that what the model holds in floats is stored in floats: others would be cast.

    Raises:
        CheckpointError: A tensor is stored in integers.
    """
    floats = {name for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
    for name in sorted(floats & tensors.keys()):
        header = tensors[name]
        if header.dtype.startswith(_INTEGERS) and header.shape != (0,):
            raise CheckpointError(
                f"{name} must be stored in floats, got {header.dtype} {list(header.shape)}\n"
                "The file is damaged; fetch or write it again."
            )


def _listed(file: str, text: str) -> set[str]:
    """Returns the names of layers that a header lists."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: {LAYERS_KEY} must be a JSON list, got: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise CheckpointError(f"{file}: {LAYERS_KEY} must be a JSON list of names, got {text:.80}")
    return set(names)


class _Renamer:
    """Names checkpoint keys as transformers does when it loads them."""

    def __init__(self, model: PreTrainedModel, quantizer: Any, own_names: bool) -> None:
        mapping = [] if own_names else get_model_conversion_mapping(model, None, quantizer)
        self._renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
        self._converters = [item for item in mapping if isinstance(item, WeightConverter)]
        self._prefix = model.base_model_prefix
        self._keys: dict[str, Any] = dict(model.state_dict())
        # Packed names are not in the skeleton yet; they follow the prefix of the weight they
        # replace.
        for name in list(self._keys):
            if name.endswith(".weight"):
                base = name.removesuffix("weight")
                self._keys.update({base + leaf: True for leaf in ("qweight", *SCALES)})
        for name in tensor_names(model):
            self._keys.update({f"{name}_{leaf}": True for leaf in ("qweight", *SCALES)})

    def _renamed(self, key: str) -> tuple[str, str | None]:
        renamed, pattern = rename_source_key(
            key, self._renamings, self._converters, self._prefix, self._keys
        )
        if renamed not in self._keys and key in self._keys:
            # As transformers has it: what has the model's name already is not renamed.
            renamed, pattern = rename_source_key(key, [], [], self._prefix, self._keys)
        return renamed, pattern

    def header(self, header: TensorHeader) -> list[tuple[str, TensorHeader]]:
        """Returns the names that a stored tensor has in the model, each with its header."""
        renamed, pattern = self._renamed(header.key)
        if pattern is None:
            return [(renamed, header)]
        converter = next(item for item in self._converters if pattern in item.source_patterns)
        first = converter.target_patterns[0]
        header = replace(header, converted=True)
        return [(renamed.replace(first, target), header) for target in converter.target_patterns]

    def layer(self, name: str) -> str:
        """Returns the model's name of a layer that a header lists."""
        return self._renamed(f"{name}.qweight")[0].removesuffix(".qweight")


def with_tied(checkpoint: Checkpoint, model: PreTrainedModel) -> Checkpoint:
    """Counts a tied weight as present if the weight it is tied to is."""
    tensors = dict(checkpoint.tensors)
    for pair in model.all_tied_weights_keys.items():
        known = next((tensors[name] for name in pair if name in tensors), None)
        if known is not None:
            tensors.update({name: tensors.get(name, known) for name in pair})
    return replace(checkpoint, tensors=tensors)


_SAFETENSORS_NAMES = {"F32": "float32", "U8": "uint8", "I8": "int8"}


def check_headers(
    names: list[str],
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]],
    known: Checkpoint,
    what: str,
) -> None:
    """Checks the tensors of one module, by its names: ``{leaf: (dtypes, shape)}``.

    Raises:
        CheckpointError: One is missing or has another dtype or shape; the message names it.
    """
    for leaf, (dtypes, expected) in wanted.items():
        headers = [known.tensors.get(f"{name}.{leaf}") for name in names]
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


def check_no_multiplier(names: list[str], known: Checkpoint, what: str) -> None:
    """Checks that the files hold no multipliers of a module, by its names, that has none.

    Raises:
        CheckpointError: They do; the message names the tensor.
    """
    for name in (f"{name}.qweight_multiplier" for name in names):
        if name in known.tensors:
            raise CheckpointError(
                f"{name} must not be in the checkpoint for {what}, got one\n"
                "config.json and the tensors do not belong together."
            )
