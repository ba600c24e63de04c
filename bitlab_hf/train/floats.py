"""In which dtype the parameters train that are not ternary: embeddings, norms, biases, heads."""

from __future__ import annotations

import re
from itertools import chain
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import find_modules
from bitlayers.quantized import QuantizedModule


def training_dtype(config: BitLabConfig | None = None) -> Any:
    """Returns the ``dtype`` with which ``from_pretrained`` loads a model that is trained.

    That is float32, as the latent weights are: the steps of training are smaller than what bfloat16
    tells apart. What the products are computed in, autocast decides.

    Args:
        config: Of the model; with ``latent_dtype="keep"`` it keeps all of the file's dtypes.
    """
    return "auto" if config is not None and config.latent_dtype == "keep" else torch.float32


def teacher_dtype(device: str) -> Any:
    """Returns the ``dtype`` with which a teacher is loaded, which does not change while it teaches:
    float32 on a CPU, most of which multiply 16-bit floats slowly, the file's elsewhere.
    """
    return torch.float32 if device == "cpu" else "auto"


def computes_in_bf16(device: str, asked: bool | None) -> bool:
    """Returns whether a training's products are in bfloat16 (autocast): on GPUs that have it,
    unless asked otherwise; on CPUs where asked for.
    """
    if asked is not None:
        return asked
    return device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def round_floats(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Gives the floats that are saved the dtype that the original's file has, parameters and
    buffers, but for latent and packed weights, scales and what the architecture keeps in float32.

    Not ``model.to(dtype)``: that rounds the rotary frequencies too, which are not in the file and
    which a reload computes in float32.

    Args:
        model: A latent or a deployed model; changed in place.
        dtype: The dtype; None leaves all as it is.
    """
    if dtype is None:
        return
    owners: list[nn.Module] = [one.module for one in find_modules(model, QuantizedModule)]
    owners += [one.module for one in expert_modules(model)]
    own = {
        id(tensor)
        for owner in owners
        for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
        if not name.endswith("bias")
    }
    # As from_pretrained looks for them: patterns of names, in which a star is anything.
    kept = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    buffers = ((name, one) for name, one in model.named_buffers() if _is_saved(model, name))
    for name, tensor in chain(model.named_parameters(), buffers):
        rounds = tensor.is_floating_point() and id(tensor) not in own
        if rounds and not any(re.search(pattern, name) for pattern in kept):
            tensor.data = tensor.data.to(dtype)


def _is_saved(model: nn.Module, buffer: str) -> bool:
    module, _, name = buffer.rpartition(".")
    return name not in model.get_submodule(module)._non_persistent_buffers_set
