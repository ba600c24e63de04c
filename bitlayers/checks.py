"""What a layer checks before it is built, deployed or loaded."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from bitcore.checks import MOST_MULTIPLIER, check_float, check_group_size, check_in_features
from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError, LifecycleError, NonFiniteError
from bitcore.ops import find_invalid_code, has_invalid_code
from bitlayers.stack import Stack
from bitlayers.state import SCALES, LayerState
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


def check_stack(module: nn.Module, stack: Stack, said: str) -> None:
    """Checks that the tensor of all experts' weights can be packed, changing nothing.

    Args:
        module: Who holds it.
        stack: How it lies there.
        said: What messages call it.

    Raises:
        LifecycleError: It is on the meta device, sharded or parametrized.
        ArgumentTypeError: It has a dtype that cannot be packed.
        NonFiniteError: It holds NaN or infinity; the message names the first such expert.
    """
    name = stack.name
    weight = module._parameters.get(name)
    if weight is None or {name, f"{name}_bias"} & vars(module).keys():
        raise LifecycleError(
            f"deploy: {said} and its bias must be Parameters, got one computed from others"
        )
    if type(weight.data) is not Tensor:
        raise LifecycleError(
            f"deploy: {said} must be a whole, plain tensor, got a sharded one\n"
            "Gather the weights first: save the full model, load it in one process, deploy there."
        )
    check_float("deploy", said, weight)
    if weight.is_meta:
        raise LifecycleError(f"deploy: {said} must hold data, got a tensor on the meta device")
    # They are NaN where any value is, and make nothing of the tensor's size.
    matrices = stack.apart(weight.detach())
    if all(math.isfinite(one) for one in matrices.aminmax()):
        return
    finite = torch.isfinite(matrices).flatten(1).all(1)
    raise NonFiniteError(
        f"deploy: {said} must be finite, got NaN or infinity in expert "
        f"{int((~finite).nonzero()[0])}; nothing changed"
    )


def stack_problem(
    module: nn.Module, stack: Stack, state_dict: Mapping[str, Any], prefix: str
) -> str | None:
    """Says what of one projection in a state dict contradicts the state of its experts."""
    name = prefix + stack.name
    if module._parameters.get(f"{stack.name}_qweight") is None:
        if f"{name}_qweight" in state_dict:
            return (
                f"{name}_qweight is packed, but the experts are latent; load the deployed "
                "checkpoint with from_pretrained, or into a deployed model"
            )
        return None
    weight = state_dict.get(name)
    if weight is not None and weight.numel():
        return (
            f"{name} is latent, but the experts are deployed; load it into a latent model and "
            "call deploy() again"
        )
    held = {leaf: state_dict.get(f"{name}_{leaf}") for leaf in ("qweight", *SCALES)}
    wanted = stack.packed_tensors()
    for leaf, tensor in held.items():
        if tensor is None or (leaf in wanted and tensor.dtype == wanted[leaf][0]):
            continue
        what = wanted[leaf][0] if leaf in wanted else f"left out for {stack.granularity} weights"
        return f"{name}_{leaf} must be {what}, got {tensor.dtype}"
    same = {
        leaf: tensor
        for leaf, tensor in held.items()
        if tensor is not None and not tensor.is_meta and tuple(tensor.shape) == wanted[leaf][1]
    }
    found = packed_problem(same)
    return None if found is None else f"{name}_{found[0]} {found[2]} in expert {found[1]}"


def packed_problem(held: Mapping[str, Tensor]) -> tuple[str, int, str] | None:
    """Says what in the packed tensors of all experts no writer produces; waits for them on a GPU.

    Args:
        held: ``qweight`` uint8 [E, R, K], ``qweight_scale`` and ``qweight_multiplier``, as far as
            they are there.

    Returns:
        The end of the tensor's name, the first expert, and the problem; or None.
    """
    qweight, scale = held.get("qweight"), held.get("qweight_scale")
    multiplier = held.get("qweight_multiplier")
    if qweight is not None and has_invalid_code(qweight):
        expert = find_invalid_code(list(qweight))
        return "qweight", expert or 0, "must hold the codes 0, 1 and 2, got the invalid code 3"
    if scale is not None and not scales_are_valid(scale):
        bad = ~(torch.isfinite(scale) & (scale > 0)).flatten(1).all(1)
        expert = int(bad.nonzero()[0])
        return "qweight_scale", expert, "must be finite and positive, got other values"
    for expert, one in enumerate(() if multiplier is None else multiplier):
        problem = multiplier_problem(one)
        if problem is not None:
            return "qweight_multiplier", expert, problem
    return None


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
