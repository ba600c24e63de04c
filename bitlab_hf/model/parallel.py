"""Tensor parallel: transformers' plan for a model becomes BitLab's, or is refused before anything
is loaded or trained.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.experts import BitExperts
from bitlayers.quantized import QuantizedModule

# Styles of a layer whose output every process has whole: so is the layer.
_GATHERED = ("colwise_gather_output", "colwise_rep")
_SPLIT = ("colwise", "rowwise")
_LANES = 16


def check_no_tensor_parallel(op: str, distributed: Any) -> None:
    """Checks that no layer is to be split by a plan that is not BitLab's.

    The scale of a split latent weight would be that of a part of it, and rows of packed weights
    lie four to a byte: both would give wrong numbers without an error.

    Args:
        op: Who asks, for the message.
        distributed: accelerate's ParallelismConfig, or None.

    Raises:
        ArgumentError: Its tp_size is above 1.
    """
    size = getattr(distributed, "tp_size", None) or 1
    if size > 1:
        raise ArgumentError(
            f"{op}: tp_size must be 1 in parallelism_config, got {size}\nTrain with DDP or FSDP2, "
            "or load the model with from_pretrained(..., tp_plan='auto')."
        )


def plan_parallel(
    model: PreTrainedModel, plan: dict[str, str], packs: bool, int8: set[str]
) -> None:
    """Makes a model's plan for tensor parallel one that ternary layers can follow, in place.

    Layers whose style is colwise or rowwise get BitLab's; what is int8, ternary experts, and layers
    whose output is gathered stay whole in every process; float modules keep their styles.

    Args:
        model: The skeleton, with its layers in place.
        plan: Styles by names with ``*`` for numbers.
        packs: Whether the layers will be packed once loaded.
        int8: Names of the modules that will be int8 once loaded.

    Raises:
        ArgumentError: Sizes do not divide, or a layer cannot be split as the plan says.
    """
    distributed = getattr(model.config, "distributed_config", None)
    size = getattr(distributed, "tp_size", None) or 1
    _check_sizes(distributed, size)
    if size == 1:
        plan.clear()
        return
    _check_heads(model, size)
    # It registers styles with transformers, which only this needs.
    from bitlab_hf.model.parallel_styles import STYLES

    modules: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        modules.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append((name, module))
    for key, style in list(plan.items()):
        named = modules.get(key) or modules.get(key.rpartition(".")[0], [])
        layers = [(name, one) for name, one in named if isinstance(one, BitLayerBase)]
        whole = layers and style in _GATHERED
        if whole or any(name in int8 or _stays_whole(one) for name, one in named):
            del plan[key]
            continue
        for name, layer in layers:
            _check_layer(name, layer, style, size, packs)
        if layers:
            plan[key] = STYLES[packs, style]


def _stays_whole(module: nn.Module) -> bool:
    quantized = isinstance(module, QuantizedModule) and not isinstance(module, BitLayerBase)
    return quantized or isinstance(module, BitExperts)


def _check_sizes(distributed: Any, size: int) -> None:
    for name in ("ep_size", *(("pp_size", "dp_size") if size > 1 else ())):
        other = getattr(distributed, name, None) or 1
        if other > 1:
            beside = f" beside tp_size={size}" if size > 1 else ""
            raise ArgumentError(
                f"bitlab: {name} must be 1{beside}, got {other}\nTernary layers are split by "
                "tp_size alone; train with DDP or FSDP2, run with device_map."
            )
    for name in ("tp_plan", "ep_plan"):
        given = getattr(distributed, name, None)
        if size > 1 and isinstance(given, dict) and given:
            raise ArgumentError(
                f"bitlab: {name} must be 'auto', got {given}\n"
                "Ternary layers are split by the model's own plan; leave it out."
            )


def _check_heads(model: PreTrainedModel, size: int) -> None:
    config = model.config.get_text_config()
    for name in ("num_attention_heads", "num_key_value_heads"):
        heads = getattr(config, name, None)
        if isinstance(heads, int) and heads % size:
            raise ArgumentError(
                f"bitlab: tp_size must divide {name}, got {size} for {heads}\n"
                "Use fewer processes, or one with device_map."
            )


def _check_layer(name: str, layer: BitLayerBase, style: str, size: int, packs: bool) -> None:
    config = layer.quant_config
    fix = "Use another tp_size, or one process with device_map."
    if style not in _SPLIT:
        raise ArgumentError(
            f"bitlab: the style of {name} must be one of {list(_SPLIT)}, got {style!r}\n"
            "Run the model in one process with device_map."
        )
    if type(layer) is not BitLinear or layer.packs_itself:
        raise ArgumentError(
            f"bitlab: {name} must be a BitLinear in tensor parallel, got {type(layer).__name__}\n"
            "Run the model in one process with device_map."
        )
    if not packs and config.weight_quantizer != "absmean":
        raise ArgumentError(
            f"bitlab: weight_quantizer of {name} must be 'absmean' to train in tensor parallel, "
            f"got {config.weight_quantizer!r}\nTrain it with DDP or FSDP2."
        )
    split = "out_features" if style == "colwise" else "in_features"
    features = layer.out_features if style == "colwise" else layer.in_features
    if features % size:
        raise ArgumentError(
            f"bitlab: tp_size must divide {split} of {name}, got {size} for {features}\n{fix}"
        )
    if style == "colwise":
        return
    unit = config.group_size or (1 if packs else _LANES)
    if features // size % unit:
        what = "whole groups of" if config.group_size else "a multiple of"
        raise ArgumentError(
            f"bitlab: tp_size must leave {what} {unit} inputs of {name} to each process, got "
            f"{size} for {features}\n{fix}"
        )
