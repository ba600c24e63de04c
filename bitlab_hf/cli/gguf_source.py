"""A GGUF file as a float model: transformers unpacks it into a folder that lives as long as the
command.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bitcore.errors import CheckpointError
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.loading import is_gguf, load_whole

if TYPE_CHECKING:
    from bitlab_hf.interop.gguf_file import GgufFile

# Types whose values bfloat16 does not hold; quantized ones carry a rounding of their own.
_WIDE = ("F32", "F16")


@contextmanager
def as_folder(source: str) -> Iterator[str]:
    """Gives a model's folder or hub name; of a GGUF file, a temporary folder with its floats.

    Args:
        source: What `find_scheme` has checked.

    Raises:
        CheckpointError: See `unpack`.
        MissingExtraError: The package ``gguf`` is not installed.
    """
    if not is_gguf(source):
        yield source
        return
    with tempfile.TemporaryDirectory(prefix="bitlab-") as scratch:
        folder = Path(scratch) / "model"
        unpack(Path(source), folder)
        yield str(folder)


def unpack(file: Path, folder: Path) -> None:
    """Writes a GGUF file's floats and tokenizer into a folder.

    Args:
        file: The file.
        folder: A new folder.

    Raises:
        CheckpointError: The file is damaged, a part of a model, or holds a tensor of a type that
            cannot be dequantized.
        DiskFullError: There is no room for it.
        MissingExtraError: The package ``gguf`` is not installed.
    """
    from bitlab_hf.interop.gguf_file import require_gguf

    require_gguf(str(file))
    # Of a folder that holds a tokenizer, or another model, transformers would take parts of these.
    with tempfile.TemporaryDirectory(prefix="bitlab-") as scratch:
        _unpack(file, Path(scratch), folder)


def _unpack(file: Path, alone: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers import modeling_gguf_pytorch_utils as unpacking

    held = _read(file)
    # A bar that none of transformers' settings hides.
    vars(unpacking)["tqdm"] = lambda items, **_options: items
    (alone / file.name).symlink_to(file.resolve())
    dtype = torch.float32 if _is_wide(held) else torch.bfloat16
    model: Any = load_whole(
        AutoModelForCausalLM.from_pretrained,
        str(file),
        str(alone),
        gguf_file=file.name,
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
    )
    # What is saved is a float model.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    with doing(f"unpacking {file} into {folder}", "Set TMPDIR to a folder with more space."):
        model.save_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(alone), gguf_file=file.name, trust_remote_code=False
        )
    except Exception:  # a file without one; whoever needs it says so
        return
    tokenizer.save_pretrained(folder)


def _read(file: Path) -> GgufFile:
    """Returns what a file holds, which is a whole model that can be unpacked.

    Raises:
        CheckpointError: See `unpack`.
    """
    from bitlab_hf.interop.gguf_file import read_gguf

    with doing(f"reading {file}", "It is damaged; fetch or write it again.", str(file)):
        held = read_gguf(file)
        split = held.fields.get("split.count")
        if isinstance(split, int) and split > 1:
            raise CheckpointError(
                f"{file}: the model must be in one file, got a part of one\n"
                "Merge the parts with llama.cpp's gguf-split."
            )
        _check_types(file, held)
    return held


def _check_types(file: Path, held: GgufFile) -> None:
    """Checks that there are floats of every tensor.

    Raises:
        CheckpointError: A tensor's type cannot be dequantized.
    """
    from bitlab_hf.interop.gguf_import import TERNARY

    known: dict[str, bool] = {}
    for item in held.tensors.values():
        if item.kind not in known:
            known[item.kind] = _is_dequantized(item.kind)
        if not known[item.kind]:
            fix = "Fetch or write the model in another type, such as Q8_0 or F16."
            if item.kind in TERNARY:
                fix = "`bitlab import` makes a deployed model of a file of this type."
            raise CheckpointError(
                f"{file}: {item.name} must be of a type that can be dequantized, got {item.kind}"
                f"\n{fix}"
            )


def _is_dequantized(kind: str) -> bool:
    """Tells whether the package ``gguf``, with which transformers unpacks, dequantizes a type."""
    import gguf
    import numpy as np

    if kind not in gguf.GGMLQuantizationType.__members__:
        return False
    number = gguf.GGMLQuantizationType[kind]
    # The package has no list of them; a block of zeros is of every type.
    block = np.zeros((1, gguf.GGML_QUANT_SIZES[number][1]), np.uint8)
    try:
        gguf.quants.dequantize(block, number)
    except NotImplementedError:
        return False
    return True


def _is_wide(held: GgufFile) -> bool:
    """Tells whether a file's matrices are in floats that bfloat16 does not hold."""
    return any(len(item.shape) > 1 and item.kind in _WIDE for item in held.tensors.values())
