"""Learned scales and added norms while a model loads: a float file has none of them, and packing
has to wait for scales.
"""

from __future__ import annotations

import re

import torch
from transformers import PreTrainedModel

from bitcore.errors import CheckpointError
from bitlab_hf.model.marks import tied_groups
from bitlab_hf.model.tree import Found, find_modules
from bitlayers import learned_experts
from bitlayers.base import BitLayerBase
from bitlayers.checks import check_deployable
from bitlayers.experts import BitExperts
from bitlayers.rmsnorm import InputRMSNorm, RMSNormBitLinear
from bitlayers.training import reset_learned_scale


def expect_learned_scales(
    model: PreTrainedModel, stored: set[str] | None
) -> list[BitLayerBase | BitExperts]:
    """Lets a load pass without the learned scales that a float checkpoint cannot have.

    Args:
        model: The skeleton with its latent layers and experts.
        stored: Names of the tensors of learned scales in the files; None for all.

    Returns:
        The layers and experts whose scales have to start from the weights, once these are loaded.

    Raises:
        CheckpointError: The files hold scales of layers that are tied to others.
    """
    lacking: list[BitLayerBase | BitExperts] = []
    missing = set(model._keys_to_ignore_on_load_missing or ())
    layers = find_modules(model, BitLayerBase)
    _check_tied(tied_groups(model, layers), stored or set())
    for found in layers:
        names = {f"{name}.learned_scale" for name in found.names}
        there = stored is None or not stored.isdisjoint(names)
        if found.module.learned_scale is not None and not there:
            lacking.append(found.module)
            missing |= {f"^{re.escape(name)}$" for name in names}
    for one in find_modules(model, BitExperts):
        leaves = learned_experts.names(one.module)
        names = {f"{name}.{leaf}" for name in one.names for leaf in leaves}
        if stored is not None and not names <= stored:
            lacking.append(one.module)
            missing |= {f"^{re.escape(name)}$" for name in names}
    if lacking:
        model._keys_to_ignore_on_load_missing = missing
    return lacking


def _check_tied(groups: list[list[Found[BitLayerBase]]], stored: set[str]) -> None:
    """Refuses files of earlier releases, which trained a scale for each of the layers that have one
    weight, and deployed all with one of them.
    """
    for group in groups:
        for found in group if len(group) > 1 else ():
            names = [f"{name}.learned_scale" for name in found.names]
            if found.module.learned_scale is None and not stored.isdisjoint(names):
                other = next(one for one in group if one is not found)
                raise CheckpointError(
                    f"{names[0]} must not be in the checkpoint, got one beside that of "
                    f"{other.names[0]}, which has the same weight\nAn earlier release trained a "
                    "scale for each, of which deploy can keep one; train again from the float "
                    "model."
                )


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
def start_fresh(layers: list[BitLayerBase | BitExperts], norms: list[InputRMSNorm]) -> None:
    """Starts what a file did not have: scales from their weights, norms from ones."""
    for layer in layers:
        if isinstance(layer, BitExperts):
            learned_experts.reset(layer, layer.stacks)
        else:
            reset_learned_scale(layer)
    for norm in norms:
        norm.weight.fill_(1.0)
    layers.clear()
    norms.clear()


def deploy_learned(layers: list[Found[BitLayerBase]], experts: list[Found[BitExperts]]) -> None:
    """Deploys what was loaded latent because weights and learned scales arrive apart.

    Raises:
        NonFiniteError: A weight is not finite, or a scale not finite and positive.
    """
    learned = [found for found in layers if found.module.learned_scale is not None]
    for found in learned:
        check_deployable(found.module, f"{found.names[0]}.weight")
    scaled = [one for one in experts if learned_experts.names(one.module)]
    for one in scaled:
        one.module.check_deployable(one.names[0])
    for found in learned:
        found.module.deploy()
    for one in scaled:
        one.module.deploy()
