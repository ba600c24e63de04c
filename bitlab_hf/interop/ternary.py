"""Checkpoints that are ternary already, but stored as floats.

In such a file every weight is exactly 0 or plus or minus the scale of its matrix, row or group. The
structure is found by looking at the values, the codes are packed without loss, and what was written
is read back and compared with the source, value for value. One part of one tensor is in memory at a
time.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError, CheckpointError, ConfigError
from bitlab_hf.checkpoint.card import CARD, model_card
from bitlab_hf.checkpoint.facts import Facts
from bitlab_hf.checkpoint.files import (
    FACTS_FILE,
    INDEX,
    read_config,
    shard_keys,
    weight_files,
)
from bitlab_hf.checkpoint.headers import LAYERS_KEY, Checkpoint, read_checkpoint, with_tied
from bitlab_hf.checkpoint.previous import weights_of
from bitlab_hf.checkpoint.saving import replacing
from bitlab_hf.interop.packed_configuration import packed_configuration, swap_skeleton
from bitlab_hf.interop.packed_stream import (
    check_group_scale_dtype,
    packed_entries,
    same_values,
    write_packed,
)
from bitlab_hf.interop.skeleton import model_of
from bitlab_hf.interop.stream import Entry, StreamWriter
from bitlab_hf.interop.structure import Structure, find_structure
from bitlab_hf.model.embedding import packable_embedding
from bitlab_hf.model.replace import find_linears
from bitlab_hf.model.rows import Rows

Advance = Callable[[int], None]
_FLOATS = ("F32", "BF16", "F16")
# What older files hold although it follows from the configuration.
_LEFT_OVER = (r"rotary_emb\.inv_freq$", r"\.masked_bias$")
# An adapter's, and what need not be true of the output.
_NOT_OF_THE_OUTPUT = ("adapter_config.json", FACTS_FILE)


@dataclass
class Conversion:
    """What `convert_ternary` did.

    Attributes:
        packed: Scheme of each layer that was packed, and of the embedding, by the model's name of
            it.
        kept: Why each other matrix stayed as it was, by the file's key.
        bytes_before: Size of the source's weight files.
        bytes_after: Size of the written ones.
        scale_change: The largest relative change of a scale; 0 where all are as they were.
    """

    packed: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    bytes_before: int = 0
    bytes_after: int = 0
    scale_change: float = 0.0


def convert_ternary(
    path_or_repo: str | os.PathLike[str],
    directory: str | os.PathLike[str],
    *,
    keep_inexact: bool = False,
    group_scale_dtype: str = "float32",
    advance: Advance | None = None,
) -> Conversion:
    """Packs a float checkpoint whose linear layers are exactly ternary into a deployed one.

    Activations stay unquantized (``activation_dtype="float32"``): such models are weight-only. The
    output head and the input embedding are packed where they are exactly ternary, tied to each
    other or not, and stay as they are otherwise. Signs of zeros are not kept: -0.0 becomes 0.0.

    Args:
        path_or_repo: A folder with safetensors files, or a hub name.
        directory: Where to write; put in place in one step at the end.
        keep_inexact: Whether layers that are not exactly ternary stay float instead of being
            refused.
        group_scale_dtype: How scales of groups are kept: ``"float32"`` as they are, ``"uint8"`` as
            7-bit multipliers of one a row, which is smaller and faster; see `BitLabConfig`.
        advance: Called with the bytes of the source done; the sum is twice its size.

    Returns:
        What was packed, and what was kept and why.

    Raises:
        ArgumentError: The folder holds no config.json, or group_scale_dtype is another.
        ConfigError: The checkpoint is quantized already, or rotated.
        CheckpointError: A layer is not exactly ternary (the message says by how much), none is; a
            parameter of the model is in no file, in two, or of another shape; a tensor is none
            that the model has; or the files are damaged.
    """
    check_group_scale_dtype("convert_ternary", group_scale_dtype)
    source = Path(path_or_repo)
    if not source.is_dir():
        patterns = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
        source = Path(snapshot_download(str(path_or_repo), allow_patterns=patterns))
    if Path(directory).resolve() == source.resolve():
        raise ArgumentError(
            f"convert_ternary: directory must not be the source, got {directory}\n"
            "Name another folder; the source stays as it is."
        )
    fields = read_config(source)
    held = fields.get("quantization_config")
    files = weight_files(source, "convert_ternary")
    if held is not None:
        method = held.get("quant_method") if isinstance(held, dict) else held
        raise ConfigError(
            f"convert_ternary: the checkpoint must be a float one, got quant_method {method!r:.80}"
        )
    places = shard_keys(files, "convert_ternary")
    model = model_of(source, len(places), "convert_ternary")
    checkpoint = read_checkpoint(model, [str(file) for file in files], None)
    assert checkpoint is not None
    _check_whole(model, with_tied(checkpoint, model))
    _check_nothing_more(model, checkpoint)
    tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    names = {
        checkpoint.tensors[f"{name}.weight"].key: name
        for found in find_linears(model, [])
        for name in found.names
        if f"{name}.weight" in checkpoint.tensors and f"{name}.weight" not in tied
    }
    embedding = packable_embedding(model)
    vocabulary, copies = _vocabulary(embedding, checkpoint, places)
    report = Conversion(bytes_before=sum(file.stat().st_size for file in files))
    found = _examine(
        model, files, names, vocabulary, keep_inexact, report, advance or (lambda size: None)
    )
    if not vocabulary.keys() & found.keys():
        copies = set()
    for key in copies:
        # One with what is packed, and no longer in the files.
        del report.kept[key]
    if vocabulary.keys() >= found.keys():
        raise CheckpointError(
            "convert_ternary: at least one linear layer must be exactly ternary, got none; "
            + "; ".join(f"{key} is {why}" for key, why in list(report.kept.items())[:1])
        )
    structures = {key: held.kept_as(group_scale_dtype) for key, held in found.items()}
    config = packed_configuration(
        model, names | vocabulary, structures, group_scale_dtype, embedding=embedding
    )
    # Without BitLab, this key makes a load fail instead of giving random weights.
    sentinel = next(key for key in names if key in structures)
    with replacing(directory, "convert_ternary") as staged:
        weight_map: dict[str, str] = {}
        for index, file in enumerate(files):
            # The source's index may give any names, and name a single file too.
            shard = f"model-{index + 1:05d}-of-{len(files):05d}.safetensors"
            target = staged / (shard if len(files) > 1 else "model.safetensors")
            own_sentinel = sentinel if index == 0 else None
            keys, change = _write(file, target, structures, copies, own_sentinel)
            report.scale_change = max(report.scale_change, change)
            weight_map.update(dict.fromkeys(keys, target.name))
            _prove(file, target, structures, copies, advance or (lambda size: None))
            report.bytes_after += target.stat().st_size
        if len(files) > 1:
            metadata = {"total_size": report.bytes_after}
            index_file = {"metadata": metadata, "weight_map": weight_map}
            (staged / INDEX).write_text(json.dumps(index_file, indent=2) + "\n")
        for file in source.iterdir():
            beside = file.suffix in (".json", ".txt", ".model", ".jinja") and file.is_file()
            if beside and not weights_of(file.name) and file.name not in _NOT_OF_THE_OUTPUT:
                shutil.copyfile(file, staged / file.name)
        written = read_config(source)
        written["quantization_config"] = config.to_dict()
        (staged / "config.json").write_text(json.dumps(written, indent=2) + "\n")
        swap_skeleton(model, config)
        facts = Facts.load(source).handed_down(computes_same=not report.scale_change)
        if facts is not None:
            facts.save(staged)
        title = Path(directory).resolve().name
        (staged / CARD).write_text(model_card(model, title, facts), encoding="utf-8")
    return report


def _check_whole(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Checks that the files hold every tensor of the model, and the linear layers' as they are.

    Raises:
        CheckpointError: A tensor is in no file, has another shape, or is of no float type.
    """
    linears = {name for found in find_linears(model, []) for name in found.names}
    optional = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    held: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        held.setdefault(id(tensor), (tensor, []))[1].append(name)
    for tensor, names in held.values():
        found = next((name for name in names if name in checkpoint.tensors), None)
        if found is None:
            if any(pattern.search(name) for pattern in optional for name in names):
                continue
            raise CheckpointError(
                f"convert_ternary: {names[0]} must be in the checkpoint, got none\n"
                "The checkpoint is incomplete; fetch or write it again."
            )
        header, layer = checkpoint.tensors[found], found.rpartition(".")[0] in linears
        # What transformers makes of several tensors has another name, and another shape.
        alone = layer or header.key.rpartition(".")[2] == found.rpartition(".")[2]
        # Integers would be taken for floats of their values.
        kind = header.dtype in _FLOATS if layer else header.dtype.startswith(("F", "BF"))
        fits = header.shape == tuple(tensor.shape) and (kind or not tensor.is_floating_point())
        if alone and not fits:
            raise CheckpointError(
                f"convert_ternary: {header.key} must be {_kind(tensor)} {list(tensor.shape)} as "
                f"{found}, got {header.dtype} {list(header.shape)}\n"
                "config.json and the tensors do not belong together."
            )


def _check_nothing_more(model: PreTrainedModel, checkpoint: Checkpoint) -> None:
    """Checks that the model has a place for every tensor: without it, it computes something else.

    Raises:
        CheckpointError: It has none for one, which may rotate or scale what a layer gets.
    """
    ignored = [*(model._keys_to_ignore_on_load_unexpected or ()), *_LEFT_OVER]
    places = {*model.state_dict(), *model.all_tied_weights_keys}
    for name, header in checkpoint.tensors.items():
        if name not in places and not any(re.search(pattern, name) for pattern in ignored):
            raise CheckpointError(
                f"convert_ternary: every tensor must be one that {type(model).__name__} has, got "
                f"{header.key!r}\nWhat it does to the others, such as a rotation, would be left "
                "out; run the checkpoint with the library that made it."
            )


def _vocabulary(
    embedding: Rows | None, checkpoint: Checkpoint, places: dict[str, Path]
) -> tuple[dict[str, str], set[str]]:
    """Returns the model's name of the input embedding by the file's key of it, and the keys of
    copies of it under names that are tied to it.

    Nothing where it cannot be packed: there is no embedding, it is not in floats, or what the files
    hold under tied names differs.
    """
    names = [] if embedding is None else [f"{name}.weight" for name in embedding.names]
    held = [checkpoint.tensors[name] for name in names if name in checkpoint.tensors]
    if embedding is None or not held or held[0].dtype not in _FLOATS:
        return {}, set()
    key, *copies = [header.key for header in held]
    with safe_open(places[key], "pt") as source:
        tensor = source.get_tensor(key)
        for copy in copies:
            with safe_open(places[copy], "pt") as other:
                if not torch.equal(tensor, other.get_tensor(copy)):
                    return {}, set()
    return {key: embedding.owner}, set(copies)


def _kind(tensor: Tensor) -> str:
    return "float" if tensor.is_floating_point() else str(tensor.dtype).removeprefix("torch.")


def _examine(
    model: PreTrainedModel,
    files: list[Path],
    names: dict[str, str],
    vocabulary: dict[str, str],
    keep_inexact: bool,
    report: Conversion,
    advance: Advance,
) -> dict[str, Structure]:
    """Finds the structure of every matrix; fills the report."""
    head = model.get_output_embeddings()
    heads = {name for name, module in model.named_modules() if module is head}
    structures: dict[str, Structure] = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118  (not a mapping)
                tensor = handle.get_tensor(key)
                if tensor.dim() == 2 and tensor.is_floating_point() and tensor.numel():
                    structure = find_structure(tensor)
                    name = names.get(key, vocabulary.get(key))
                    if name is not None and structure.scheme is not None:
                        structures[key] = structure
                        report.packed[name] = structure.label
                    elif structure.scheme is not None:
                        report.kept[key] = (
                            f"exactly ternary {structure.label}, but no linear layer or input "
                            "embedding that can be packed"
                        )
                    else:
                        report.kept[key] = structure.label
                        # Without its own prefix a layer is a head of the task.
                        body = key in names and names[key] not in heads and "." in names[key]
                        if body and not keep_inexact:
                            raise CheckpointError(
                                f"{key} must be exactly ternary, got {structure.label}\n"
                                "Pass keep_inexact=True (--keep-inexact) to leave such layers "
                                "float."
                            )
                advance(tensor.numel() * tensor.element_size())
    return structures


def _write(
    file: Path,
    target: Path,
    structures: dict[str, Structure],
    left_out: set[str],
    sentinel: str | None,
) -> tuple[list[str], float]:
    """Writes one weight file; returns its keys, and the largest relative change of a scale."""
    change = 0.0
    with safe_open(file, framework="pt") as handle:
        keys = [key for key in handle.keys() if key not in left_out]  # noqa: SIM118
        mine = {key: structures[key] for key in keys if key in structures}
        entries: list[Entry] = []
        for key in keys:
            part = handle.get_slice(key)
            shape = tuple(part.get_shape())
            if key not in mine:
                entries.append(Entry(key, part.get_dtype(), shape))
                continue
            entries += packed_entries(key, shape, mine[key])
        layers = [key.removesuffix(".weight") for key in mine]
        if sentinel is not None:
            entries.append(Entry(sentinel, "U8", (0,)))
        with StreamWriter(target, entries, {"format": "pt", LAYERS_KEY: json.dumps(layers)}) as out:
            for key in keys:
                tensor = handle.get_tensor(key)
                if key not in mine:
                    for block in tensor.reshape(-1).split(2**22):
                        out.write(key, block)
                    continue
                change = max(change, write_packed(out, key, tensor, mine[key]))
    return [entry.name for entry in entries], change


def _prove(
    file: Path,
    target: Path,
    structures: dict[str, Structure],
    left_out: set[str],
    advance: Advance,
) -> None:
    """Reads what was written back and compares it with the source, value for value."""
    with safe_open(file, "pt") as source, safe_open(target, "pt") as written:
        for key in source.keys():  # noqa: SIM118  (not a mapping)
            tensor = source.get_tensor(key)
            if key in left_out:
                # Compared with the one that is kept before anything was written.
                same = True
            elif key not in structures:
                # As bytes: a NaN equals itself.
                same = torch.equal(
                    tensor.reshape(-1).view(torch.uint8),
                    written.get_tensor(key).reshape(-1).view(torch.uint8),
                )
            else:
                same = same_values(written, key, tensor, structures[key])
            if not same:
                raise CheckpointError(f"{key} must come back as it was, got other values")
            advance(tensor.numel() * tensor.element_size())
