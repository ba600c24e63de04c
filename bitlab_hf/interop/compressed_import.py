"""compressed-tensors ``pack-quantized`` checkpoints of two bits as deployed models.

The inverse of `export_compressed_tensors`, and of others' files where no weight has the code -2:
their structure is found by their values, as for floats that are ternary already.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitcore.quantize import dequantize
from bitlab_hf.checkpoint.card import CARD, model_card
from bitlab_hf.checkpoint.facts import Facts
from bitlab_hf.checkpoint.files import (
    FACTS_FILE,
    companions,
    read_config,
    shard_keys,
    weight_files,
)
from bitlab_hf.checkpoint.saving import replacing
from bitlab_hf.interop.compressed import FORMAT, METHOD, PACKED, SCALE, SHAPE, WORD, unpack_words
from bitlab_hf.interop.compressed_experts import model_names, names_of
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
from bitlab_hf.interop.skeleton import model_of
from bitlab_hf.interop.source import Experts, Source
from bitlab_hf.model.replace import find_linears

_OP = "import_compressed_tensors"
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BITS = torch.iinfo(torch.int32).bits
_OTHERS = "\nRun the checkpoint with the library that made it."


def load_compressed_tensors(
    path_or_repo: str | os.PathLike[str],
    *,
    activation_dtype: str | None = None,
    group_scale_dtype: str = "float32",
    auto_class: Any = AutoModelForCausalLM,
    **kwargs: Any,
) -> PreTrainedModel:
    """Loads a ternary ``pack-quantized`` checkpoint as a deployed model.

    It goes through a temporary folder, which needs the space of the packed model.

    Args:
        path_or_repo: Folder or hub name.
        activation_dtype: See `import_compressed_tensors`.
        group_scale_dtype: See `import_compressed_tensors`.
        auto_class: Which of transformers' auto classes loads it.
        kwargs: Passed to ``from_pretrained``.

    Returns:
        The model, with the checkpoint's codes and scales.

    Raises:
        ArgumentError, ConfigError, CheckpointError: See `import_compressed_tensors`.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "model"
        import_compressed_tensors(
            path_or_repo,
            folder,
            activation_dtype=activation_dtype,
            group_scale_dtype=group_scale_dtype,
        )
        # What is memory-mapped stays when its name goes.
        model: Any = auto_class.from_pretrained(folder, **kwargs)
    model.config._name_or_path = str(path_or_repo)
    return cast(PreTrainedModel, model)


def import_compressed_tensors(
    path_or_repo: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    activation_dtype: str | None = None,
    group_scale_dtype: str = "float32",
    advance: Callable[[int], None] | None = None,
) -> float:
    """Writes a ternary ``pack-quantized`` checkpoint as a deployed model, in place in one step.

    Args:
        path_or_repo: A folder or hub name: two bits, symmetric, scales of tensors, rows or groups.
        directory: The folder to write.
        activation_dtype: ``"int8"`` or ``"float32"``, see `BitLabConfig`. Default int8 where the
            checkpoint quantizes activations to int8 by token, else float32.
        group_scale_dtype: How scales of groups are kept: ``"float32"`` as they are, ``"uint8"`` as
            7-bit multipliers of one a row, which is smaller and faster; see `BitLabConfig`.
        advance: Called with the bytes of the source done; the sum is about its size.

    Returns:
        The largest relative change of a scale; 0 where all are the checkpoint's.

    Raises:
        ArgumentError: The folder holds no config.json, or an argument has another value.
        ConfigError: It is of another method or format, of other bits, rotated, or quantizes what
            BitLab does not.
        CheckpointError: A layer has the code -2; a tensor is missing, of another shape or dtype,
            or none that the model has; or the files are damaged.
    """
    check_group_scale_dtype(_OP, group_scale_dtype)
    advance = advance or (lambda size: None)
    source = Path(path_or_repo)
    if not source.is_dir():
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        source = Path(snapshot_download(str(path_or_repo), allow_patterns=patterns))
    if Path(directory).resolve() == source.resolve():
        raise ArgumentError(
            f"{_OP}: directory must not be the source, got {directory}\n"
            "Name another folder; the source stays as it is."
        )
    fields = read_config(source)
    quantizes = _check_configuration(fields.get("quantization_config"))
    keys = shard_keys(weight_files(source, _OP), _OP)
    model = model_of(source, len(keys), _OP)
    with ExitStack() as stack:
        handles: dict[Path, Any] = {
            file: stack.enter_context(safe_open(file, framework="pt")) for file in {*keys.values()}
        }
        known = model_names(model, list(keys))
        sources = _sources(
            model, {known[key]: _Stored(key, handles[file]) for key, file in keys.items()}
        )
        experts = {
            module: held
            for module, held in experts_of(model).items()
            if all(isinstance(sources[key], Experts) for key in held)
        }
        names = {
            f"{name}.weight": name
            for found in find_linears(model, [])
            for name in found.names
            if f"{name}.weight" in sources
        }
        found = find_structures(_OP, sources, names)
        found |= find_expert_structures(_OP, sources, experts)
        structures = {key: held.kept_as(group_scale_dtype) for key, held in found.items()}
        if not structures:
            raise CheckpointError(f"{_OP}: at least one linear layer must be ternary, got none")
        quantization = packed_configuration(
            model, names, structures, group_scale_dtype,
            activation_dtype or ("int8" if quantizes else "float32"), experts_of(model),
        )  # fmt: skip
        with replacing(directory, _OP) as staged:
            change = write_file(_OP, staged / "model.safetensors", sources, structures, advance)
            prove_file(staged / "model.safetensors", sources, structures)
            for file in companions(source):
                if file.name not in (CARD, FACTS_FILE, "config.json"):
                    shutil.copyfile(file, staged / file.name)
            fields["quantization_config"] = quantization.to_dict()
            (staged / "config.json").write_text(json.dumps(fields, indent=2) + "\n")
            swap_skeleton(model, quantization)
            # Activations may be other ones than where its perplexity was measured.
            facts = Facts.load(source).handed_down(computes_same=False)
            if facts is not None:
                facts.save(staged)
            title = Path(directory).resolve().name
            (staged / CARD).write_text(model_card(model, title, facts), encoding="utf-8")
    return change


def _check_configuration(held: Any) -> bool:
    """Refuses what is not two bits, symmetric; tells whether activations are int8 by token."""
    fields = held if isinstance(held, dict) else {}
    for name, required in (
        ("quant_method", METHOD),
        ("format", FORMAT),
        ("quantization_status", "compressed"),
    ):
        if fields.get(name) != required:
            raise ConfigError(f"{_OP}: {name} must be {required!r}, got {fields.get(name)!r:.80}")
    # Weights that were rotated compute nothing without the rotation of their inputs.
    for name in ("transform_config", "kv_cache_scheme", "sparsity_config"):
        if fields.get(name):
            raise ConfigError(f"{_OP}: {name} must be empty, got {fields[name]!r:.80}{_OTHERS}")
    groups = fields.get("config_groups")
    schemes = list(groups.values()) if isinstance(groups, dict) else []
    if not schemes or not all(isinstance(scheme, dict) for scheme in schemes):
        raise ConfigError(f"{_OP}: config_groups must hold schemes, got {groups!r:.80}")
    inputs = [_check_scheme(scheme) for scheme in schemes]
    if len({*inputs}) > 1:
        raise ConfigError(
            f"{_OP}: input_activations must be the same in all config_groups, got others{_OTHERS}"
        )
    return inputs[0]


def _check_scheme(scheme: dict[str, Any]) -> bool:
    weights, inputs = scheme.get("weights"), scheme.get("input_activations")
    problem = None
    if not isinstance(weights, dict):
        problem = f"weights must be quantized, got {weights!r:.80}"
    elif weights.get("num_bits") != 2 or weights.get("type", "int") != "int":
        problem = (
            f"weights must be of 2 bits, got {weights.get('num_bits')!r:.20} of the type "
            f"{weights.get('type')!r:.20}"
        )
    elif weights.get("symmetric", True) is not True:
        problem = "weights must be symmetric, got asymmetric ones"
    elif weights.get("actorder") not in (None, False):
        problem = f"actorder must be None, got {weights['actorder']!r:.80}"
    elif scheme.get("output_activations") is not None:
        problem = "output_activations must be None, got some"
    elif inputs is not None:
        wanted = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
        got = {name: inputs.get(name) for name in wanted} if isinstance(inputs, dict) else inputs
        if got != wanted or inputs.get("symmetric", True) is not True:
            problem = f"input_activations must be None or symmetric {wanted}, got {got!r:.200}"
    if problem is not None:
        raise ConfigError(f"{_OP}: {problem}{_OTHERS}")
    return inputs is not None


@dataclass(frozen=True)
class _Stored:
    """A tensor of a file: its key there, and the open file."""

    key: str
    handle: Any

    def part(self) -> Any:
        """Returns what gives rows of it."""
        return self.handle.get_slice(self.key)

    def whole(self) -> Tensor:
        """Returns it."""
        return cast(Tensor, self.handle.get_tensor(self.key))


class _Floats:
    """A float tensor of a file; see `source.Source`."""

    ternary = False

    def __init__(self, stored: _Stored) -> None:
        key, self._part = stored.key, stored.part()
        self.shape: tuple[int, ...] = tuple(self._part.get_shape())
        kind = self._part.get_dtype()
        if kind not in _FLOATS or not self.shape:
            raise CheckpointError(
                f"{_OP}: {key} must be a tensor of {'/'.join(_FLOATS)}, got {kind} "
                f"{list(self.shape)}"
            )
        self.dtype = _FLOATS[kind]
        self.n_bytes: int = self.numel() * self.dtype.itemsize

    def numel(self) -> int:
        """Returns the number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        return cast(Tensor, self._part[rows.start : rows.stop])


class _Codes:
    """A packed matrix as float32 values; see `source.Source`.

    Args:
        name: Of its layer.
        tensors: The checkpoint's, by the model's names of them.
    """

    ternary, dtype = True, torch.float32

    def __init__(self, name: str, tensors: dict[str, _Stored]) -> None:
        self._name = name
        for leaf in (SCALE, SHAPE):
            if f"{name}.{leaf}" not in tensors:
                raise CheckpointError(f"{_OP}: {name}.{leaf} must be in the checkpoint, got none")
        shape = tensors[f"{name}.{SHAPE}"].whole().tolist()
        self._words = tensors[f"{name}.{PACKED}"].part()
        self._scale = _Floats(tensors[f"{name}.{SCALE}"])
        words = list(self._words.get_shape())
        whole = len(shape) == 2 and words == [shape[0], (shape[1] + WORD - 1) // WORD]
        if not whole or self._words.get_dtype() != "I32" or min(shape) < 1:
            raise CheckpointError(
                f"{_OP}: {name}.{PACKED} must be I32 [rows, columns / {WORD}] of {shape}, got "
                f"{self._words.get_dtype()} {words}"
            )
        self.shape: tuple[int, ...] = tuple(shape)
        scales = self._scale.shape
        fits = len(scales) == 2 and scales[0] == shape[0] and shape[1] % max(1, scales[1]) == 0
        if not fits and scales != (1,):
            raise CheckpointError(
                f"{_OP}: {name}.{SCALE} must be [1], or one row of scales for each of {shape}, got "
                f"{list(scales)}"
            )
        self.n_bytes = math.prod(words) * _BITS // 8

    def numel(self) -> int:
        """Returns the number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: slice) -> Tensor:
        codes = unpack_words(self._words[rows.start : rows.stop], self.shape[1])
        if bool((codes < -1).any()):
            raise CheckpointError(
                f"{_OP}: {self._name}.{PACKED} must hold codes of -1, 0 and 1, got -2{_OTHERS}"
            )
        whole = self._scale.shape == (1,)
        scale = self._scale[slice(0, 1) if whole else rows].float()
        return dequantize(codes, scale, torch.float32)


def _sources(model: PreTrainedModel, tensors: dict[str, _Stored]) -> dict[str, Source]:
    """Returns the checkpoint's tensor of each of the model's, or those of each expert, by the
    model's name of it.

    Raises:
        CheckpointError: One is missing, of another shape or dtype, or none that the model has.
    """
    tied = model.all_tied_weights_keys
    stacks = {key for keys in experts_of(model).values() for key in keys}
    sources: dict[str, Source] = {}
    used: set[str] = set()
    for key, tensor in model.state_dict().items():
        parts = names_of(model, key) if key in stacks and key not in tensors else []
        if key in tied and f"{key.removesuffix('.weight')}.{PACKED}" not in tensors:
            # Whatever a file holds of it, the model takes the other.
            used.add(key)
        elif parts:
            shape = tensor.shape[1] // len(parts), tensor.shape[2]
            experts = [
                [_source(f"{part.format(at)}.weight", tensors, shape, used) for part in parts]
                for at in range(len(tensor))
            ]
            sources[key] = Experts(experts)
        else:
            sources[key] = _source(key, tensors, tuple(tensor.shape), used)
    further = sorted(set(tensors) - used)
    if further:
        raise CheckpointError(
            f"{_OP}: every tensor must be one that {type(model).__name__} has, "
            f"got {tensors[further[0]].key!r}{_OTHERS}"
        )
    return sources


def _source(
    key: str, tensors: dict[str, _Stored], shape: tuple[int, ...], used: set[str]
) -> Source:
    """Returns a weight, packed or not, or another tensor; notes what of the checkpoint it uses."""
    name = key.removesuffix(".weight")
    source: Source
    if f"{name}.{PACKED}" in tensors:
        source = _Codes(name, tensors)
        used |= {f"{name}.{leaf}" for leaf in (PACKED, SCALE, SHAPE)}
    elif key in tensors:
        source = _Floats(tensors[key])
        used.add(key)
    else:
        raise CheckpointError(
            f"{_OP}: {key} must be in the checkpoint, got none\n"
            "The checkpoint is incomplete; fetch or write it again."
        )
    if source.shape != shape:
        raise CheckpointError(
            f"{_OP}: {key} must be of shape {list(shape)}, got {list(source.shape)}\n"
            "config.json and the tensors do not belong together."
        )
    return source
