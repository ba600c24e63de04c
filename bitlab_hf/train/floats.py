"""In which dtype the parameters train that are not ternary: embeddings, norms, biases, heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import quantized_layers


def training_dtype(device: str, config: BitLabConfig | None = None) -> Any:
    """Returns the ``dtype`` with which ``from_pretrained`` loads what is trained, or a teacher.

    On a CPU that is float32: most multiply 16-bit floats slowly, and the steps of training are
    smaller than what bfloat16 tells apart. On a GPU it is that of the file.

    Args:
        device: ``"cpu"`` or another.
        config: Of the model; with ``latent_dtype="keep"`` it keeps all of the file's dtypes.
    """
    keeps = config is not None and config.latent_dtype == "keep"
    return "auto" if keeps or device != "cpu" else torch.float32


def round_floats(model: nn.Module, dtype: torch.dtype | None) -> None:
    """Gives float parameters the dtype that the original's file has, but for latent weights and
    learned scales.

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
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in latent:
            parameter.data = parameter.data.to(dtype)
