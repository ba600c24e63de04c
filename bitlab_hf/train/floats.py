"""In which dtype the parameters train that are not ternary: embeddings, norms, biases, heads."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import quantized_layers
from bitlayers.experts import BitExperts
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
    """Gives float parameters the dtype that the original's file has, but for latent weights,
    learned scales and what the architecture keeps in float32; the model computes as one that is
    loaded from its file.

    Not ``model.to(dtype)``: that rounds the rotary frequencies too, which a reload computes in
    float32.

    Args:
        model: A latent or a deployed model; changed in place.
        dtype: The dtype; None leaves all as it is.
    """
    if dtype is None:
        return
    owners: list[nn.Module] = [one.module for one in quantized_layers(model)]
    owners += [one.module for one in expert_modules(model)]
    latent = {
        id(parameter)
        for owner in owners
        for name, parameter in owner.named_parameters(recurse=False)
        if not name.endswith("bias")
    }
    # As from_pretrained looks for them: patterns of names, in which a star is anything.
    kept = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]

    def rounds(name: str) -> bool:
        return not any(re.search(pattern, name) for pattern in kept)

    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and id(parameter) not in latent and rounds(name):
            parameter.data = parameter.data.to(dtype)
    # Codes and latent weights have no such dtype; their modules know that of the file's weight.
    for name, module in model.named_modules():
        if isinstance(module, QuantizedModule) and rounds(f"{name}.weight"):
            module._set_dtype(dtype)
        elif isinstance(module, BitExperts):
            module.float_dtype = dtype
