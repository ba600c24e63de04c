"""What a layer checks before it is built, deployed or loaded."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.checks import MOST_MULTIPLIER, check_float, check_group_size, check_in_features
from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError, LifecycleError, NonFiniteError
from bitcore.ops import has_invalid_code
from bitlayers.state import LayerState
from bitlayers.training import check_learned_scale


def check_sizes(name: str, in_features: int, out_features: int, config: BitQuantConfig) -> None:
    """Checks the sizes of a layer against each other and its configuration.

    Raises:
        ArgumentError: A size is no int, is below 1 or too large, or groups do not divide it.
    """
    for argument, value in (("in_features", in_features), ("out_features", out_features)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ArgumentError(f"{name}: {argument} must be an int of at least 1, got {value!r}")
    check_in_features(name, in_features)
    check_group_size(name, in_features, config.granularity, config.group_size or 0)


def check_deployable(layer: LayerState, name: str) -> None:
    """Checks that a layer can be deployed, changing nothing.

    Args:
        layer: The layer.
        name: What messages call its weight.

    Raises:
        LifecycleError: The layer is deployed, on the meta device, sharded or parametrized.
        ArgumentTypeError: The weight has a dtype that cannot be packed.
        NonFiniteError: The weight or a learned scale holds NaN or infinity.
    """
    if layer.is_deployed:
        raise LifecycleError(f"deploy: {name} must be latent, got a layer that is deployed already")
    check_whole(layer, name)
    weight = layer._parameters.get("weight")
    if weight is not None and not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"deploy: {name} must be finite, got NaN or infinity; nothing changed")
    check_learned_scale(layer, name)


def check_whole(module: nn.Module, name: str) -> None:
    """Checks that the weight of a module, if it has one, is a plain tensor that holds data.

    Args:
        module: The module.
        name: What messages call its weight.

    Raises:
        LifecycleError: The weight is on the meta device, sharded or parametrized.
        ArgumentTypeError: It has a dtype that cannot be quantized.
    """
    weight = module._parameters.get("weight")
    # torch's pruning, weight_norm and spectral_norm put a tensor in the Parameter's place.
    if hasattr(module, "parametrizations") or {"weight", "bias"} & vars(module).keys():
        raise LifecycleError(
            f"deploy: {name} and its bias must be Parameters, got one computed from others "
            "(pruned, normed or parametrized)\nMake it permanent first: torch.nn.utils's "
            "prune.remove, remove_weight_norm or parametrize.remove_parametrizations."
        )
    if weight is not None and type(weight.data) is not Tensor:
        raise LifecycleError(
            f"deploy: {name} must be a whole, plain tensor, got a sharded one\n"
            "Gather the weights first: save the full model, load it in one process, deploy there."
        )
    if weight is None:
        return
    check_float("deploy", name, weight)
    if weight.is_meta:
        raise LifecycleError(f"deploy: {name} must hold data, got a tensor on the meta device")


def load_problem(layer: LayerState, state_dict: Mapping[str, Any], prefix: str) -> str | None:
    """Says what in a state dict contradicts the state of the layer, whether strict or not."""
    if not layer.is_deployed:
        if prefix + "qweight" in state_dict:
            return (
                f"{prefix}qweight is packed, but the layer is latent; load the deployed "
                "checkpoint with from_pretrained, or into a deployed model"
            )
        return None
    weight = state_dict.get(prefix + "weight")
    if weight is not None and weight.numel():
        return (
            f"{prefix}weight is latent, but the layer is deployed; load it into a latent model "
            "and call deploy() again"
        )
    for name, (dtype, _) in layer.packed_tensors().items():
        tensor = state_dict.get(prefix + name)
        if tensor is not None and tensor.dtype != dtype:
            return f"{prefix}{name} must be {dtype}, got {tensor.dtype}"
    multiplier = state_dict.get(prefix + "qweight_multiplier")
    if multiplier is not None:
        held = layer._buffers.get("qweight_multiplier")
        if held is None:
            return (
                f"{prefix}qweight_multiplier belongs to groups with scales in two levels, but the "
                f"layer's weights are {layer.quant_config.granularity}"
            )
        # Another shape is torch's to refuse.
        same = not multiplier.is_meta and multiplier.shape == held.shape
        problem = multiplier_problem(multiplier) if same else None
        if problem is not None:
            return f"{prefix}qweight_multiplier {problem}"
    qweight = state_dict.get(prefix + "qweight")
    if qweight is not None and not qweight.is_meta and has_invalid_code(qweight):
        return f"{prefix}qweight holds the invalid code 3; the data is damaged"
    return None


def multiplier_problem(multiplier: Tensor) -> str | None:
    """Says what in multipliers, uint8 [N, K / G], no writer produces; waits for them on a GPU."""
    most = int(multiplier.amax())
    if most > MOST_MULTIPLIER:
        return f"must hold multipliers of 0 to {MOST_MULTIPLIER}, got {most}; the data is damaged"
    # Rows cost a hundred times a minimum, and what BitLab makes has no 0.
    if int(multiplier.amin()) > 0:
        return None
    empty = (multiplier.amax(1) == 0).nonzero()
    if not len(empty):
        return None
    return (
        f"must hold a multiplier above 0 in every row, got none in row {int(empty[0])}; the data "
        "is damaged"
    )


def int8_problem(name: str, qweight: Tensor | None, scale: Tensor | None) -> str | None:
    """Says what in int8 weights and their scales no writer produces.

    Args:
        name: What messages call the module, with a dot at its end.
        qweight: int8 [V, K], or None.
        scale: float32 [V], or None.
    """
    # A minimum makes nothing of the matrix's size.
    if qweight is not None and not qweight.is_meta and int(qweight.amin()) < -127:
        return f"{name}qweight must hold codes of -127 to 127, got -128"
    if scale is None or scale.is_meta or scales_are_valid(scale):
        return None
    return f"{name}qweight_scale must be finite and positive, got other values"


def scales_are_valid(scale: Tensor) -> bool:
    """Tells whether all scales are finite and positive; waits for them on a GPU."""
    return bool((torch.isfinite(scale) & (scale > 0)).all())


@cache
def log_deployed_stays() -> None:
    """Says, once a process, that a deployed layer does not train."""
    logging.getLogger("bitlab").warning(
        "bitlab: train() leaves deployed layers in inference mode; train adapters on them, or the "
        "latent model"
    )
