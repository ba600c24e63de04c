"""Learned scales and added norms while a model loads: a float file has none of them, and packing
has to wait for scales.
"""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from bitcore.errors import CheckpointError
from bitlab_hf.model.tree import Found, find_modules
from bitlayers.base import BitLayerBase
from bitlayers.checks import check_deployable
from bitlayers.rmsnorm import InputRMSNorm, RMSNormBitLinear
from bitlayers.training import reset_learned_scale


def expect_learned_scales(model: PreTrainedModel, stored: set[str] | None) -> list[BitLayerBase]:
    """Lets a load pass without the learned scales that a float checkpoint cannot have.

    Args:
        model: The skeleton with its latent layers.
        stored: Names of the layers whose scale is in the files; None for all.

    Returns:
        The layers whose scale has to start from the weight, once that is loaded.
    """
    lacking = []
    missing = set(model._keys_to_ignore_on_load_missing or ())
    for found in find_modules(model, BitLayerBase):
        there = stored is None or not stored.isdisjoint(found.names)
        if found.module.learned_scale is not None and not there:
            lacking.append(found.module)
            missing |= {f"^{re.escape(name)}.learned_scale$" for name in found.names}
    if lacking:
        model._keys_to_ignore_on_load_missing = missing
    return lacking


def expect_sub_norms(
    model: PreTrainedModel, stored: set[str] | None, was_converted: bool
) -> list[InputRMSNorm]:
    """Lets a load pass without the norms that a float checkpoint does not have.

    Args:
        model: The skeleton with its quantized layers.
        stored: Names of the layers whose norm is in the files; None for all.
        was_converted: Whether BitLab wrote the files.

    Returns:
        The norms whose weights have to be set to one.

    Raises:
        CheckpointError: A checkpoint of BitLab's lacks one.
    """
    lacking = []
    missing = set(model._keys_to_ignore_on_load_missing or ())
    for found in find_modules(model, RMSNormBitLinear):
        for module in (found.module, found.module.rms_norm):
            # The model's own initialization takes both for norms of its own; Gemma's start at zero.
            module._is_hf_initialized = True
        names = [f"{name}.rms_norm.weight" for name in found.names]
        if stored is None or not stored.isdisjoint(found.names):
            continue
        if was_converted:
            raise CheckpointError(
                f"{names[0]} must be in the checkpoint, got none\n"
                "The checkpoint is incomplete; fetch or write it again."
            )
        lacking.append(found.module.rms_norm)
        missing |= {f"^{re.escape(name)}$" for name in names}
    if lacking:
        model._keys_to_ignore_on_load_missing = missing
    return lacking


@torch.no_grad()
def start_fresh(layers: list[BitLayerBase], norms: list[InputRMSNorm]) -> None:
    """Starts what a file did not have: scales from their weights, norms from ones."""
    for layer in layers:
        reset_learned_scale(layer)
    for norm in norms:
        norm.weight.fill_(1.0)
    layers.clear()
    norms.clear()


def deploy_learned(layers: list[Found[BitLayerBase]]) -> None:
    """Deploys the layers that were loaded latent because their weight and their scale arrive apart.

    Raises:
        NonFiniteError: A weight is not finite, or a scale not finite and positive.
    """
    learned = [found for found in layers if found.module.learned_scale is not None]
    for found in learned:
        check_deployable(found.module, f"{found.names[0]}.weight")
    for found in learned:
        found.module.deploy()
