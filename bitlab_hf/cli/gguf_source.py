"""A GGUF file as a float model: transformers unpacks it into a folder that lives as long as the
command.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bitcore.errors import CheckpointError
from bitlab_hf.cli.errors import doing
from bitlab_hf.cli.loading import is_gguf, load_whole

# Types whose values bfloat16 does not hold; quantized ones carry a rounding of their own.
_WIDE = ("F32", "F16", "F64")


@contextmanager
def as_folder(source: str) -> Iterator[str]:
    """Gives a model's folder or hub name; of a GGUF file, a temporary folder with its floats.

    Args:
        source: What `find_scheme` has checked.

    Raises:
        CheckpointError: The file is damaged, or holds a tensor that cannot be unpacked.
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
        CheckpointError: The file is damaged, a part of a model, or of types that are not known.
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

    # A bar that none of transformers' settings hides.
    vars(unpacking)["tqdm"] = lambda items, **_options: items
    (alone / file.name).symlink_to(file.resolve())
    dtype = torch.float32 if _is_wide(file) else torch.bfloat16
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


def _is_wide(file: Path) -> bool:
    """Tells whether a file's matrices are in floats that bfloat16 does not hold.

    Raises:
        CheckpointError: The file is damaged, or a part of a model.
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
        return any(len(item.shape) > 1 and item.kind in _WIDE for item in held.tensors.values())
