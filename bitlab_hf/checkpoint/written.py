"""A last look at a checkpoint before it takes another's place: would the model load from it?"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from transformers import PreTrainedModel

from bitcore.errors import CheckpointError
from bitlab_hf.checkpoint.headers import Checkpoint, read_checkpoint, with_tied
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.parts import whole_shapes
from bitlab_hf.model.rows import with_scales
from bitlab_hf.model.tree import quantized_layers

_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def check_written(model: PreTrainedModel, folder: Path, given: bool) -> None:
    """Compares the headers of what was written with the model.

    Of a deployed model every tensor must be there, under its name, in its dtype and shape; of a
    latent one the weights of its quantized layers, under the names that the architecture's files
    have. What else belongs to the model is transformers' to write.

    Args:
        model: The model.
        folder: Where it was written.
        given: Whether a state dict was given in place of the model's own, which may be in parts.

    Raises:
        CheckpointError: A tensor is missing, or differs.
    """
    files = sorted(str(file) for file in folder.glob("model*.safetensors"))
    layers = quantized_layers(model)
    experts = expert_modules(model)
    if not files or not (layers or experts):
        return
    checkpoint = read_checkpoint(model, files, getattr(model, "hf_quantizer", None), str(folder))
    assert checkpoint is not None
    known = with_tied(checkpoint, model)
    pairs = (model.all_tied_weights_keys or {}).items()
    tied = with_scales(name for pair in pairs for name in pair)
    for found in layers:
        if found.module.packs_itself or (found.module.is_deployed and not checkpoint.own_names):
            # What another format calls the packed weights is for its writer to know.
            continue
        for leaf in found.module.packed_tensors() if found.module.is_deployed else ("weight",):
            names = {f"{name}.{leaf}" for name in found.names}
            if given:
                # As compressed-tensors calls the weight.
                names |= {f"{name}.weight_packed" for name in found.names}
            if not names & (known.tensors.keys() | tied):
                raise _unreadable(f"{found.names[0]}.{leaf}", "must be in the files, got none")
    for one in experts:
        leaves = one.module.packed_tensors() if one.module.is_deployed else one.module.stacks
        # As compressed-tensors has them, each expert's apart.
        apart = tuple(f"{name}." for name in one.names)
        if given and any(
            key.startswith(apart) and key.endswith(".weight_packed") for key in known.tensors
        ):
            continue
        for leaf in leaves:
            if not {f"{name}.{leaf}" for name in one.names} & (known.tensors.keys() | tied):
                raise _unreadable(f"{one.names[0]}.{leaf}", "must be in the files, got none")
    if checkpoint.own_names and not given:
        _check_all(model, known, tied)


def _check_all(model: PreTrainedModel, known: Checkpoint, tied: set[str]) -> None:
    ignored = set(model._keys_to_ignore_on_save or ())
    ignored |= set(model._keys_to_ignore_on_load_missing or ())
    canonical = {name for name, _ in model.named_parameters()}
    canonical |= {name for name, _ in model.named_buffers()}
    whole = whole_shapes(model)
    for name, tensor in model.state_dict().items():
        header = known.tensors.get(name)
        shape = whole.get(name, tuple(tensor.shape))
        if header is None:
            if name in tied or name not in canonical:
                continue
            if any(re.search(pattern, name) for pattern in ignored):
                continue
            raise _unreadable(name, "must be in the files, got none")
        if header.shape != shape or header.dtype != _DTYPES.get(tensor.dtype):
            if header.shape == (0,):
                # The sentinel, in a layer that packed itself and kept a weight.
                continue
            raise _unreadable(
                name,
                f"must be {tensor.dtype} {list(shape)} in the files, got {header.dtype} "
                f"{list(header.shape)}",
            )


def _unreadable(name: str, problem: str) -> CheckpointError:
    return CheckpointError(
        f"save: {name} {problem}\nThe checkpoint could not be loaded again, and what was there "
        "before is as it was."
    )
