"""Tensor and expert parallel: transformers' plans for a model become BitLab's or are refused before
anything is loaded or trained.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import ArgumentError
from bitlab_hf.model.expert_forms import FORMS
from bitlab_hf.model.parts import parts
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.experts import BitExperts
from bitlayers.quantized import QuantizedModule

# Styles of a layer whose output every process has whole: so is the layer.
_GATHERED = ("colwise_gather_output", "colwise_rep")
_SPLIT = ("colwise", "rowwise")
_LANES = 16
# transformers' names: who gets which token, and tensors with whole experts in each process.
_DISPATCH, _WHOLE_EXPERTS = "ep_dispatch_experts", "grouped_gemm"


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
    model: PreTrainedModel,
    plan: dict[str, str],
    packs: bool,
    int8: set[str],
    int8_layers: Sequence[str] = (),
) -> None:
    """Makes a model's plan for tensor parallel one that ternary layers can follow, in place.

    Layers whose style is colwise or rowwise get BitLab's; what is int8, ternary experts, and layers
    whose output is gathered stay whole in every process; float modules keep their styles.

    Args:
        model: The skeleton, with its layers in place.
        plan: Styles by names with ``*`` for numbers.
        packs: Whether the layers will be packed once loaded.
        int8: Names of the modules that will be int8 once loaded.
        int8_layers: Names of the linear layers that are int8, or will be once deployed.

    Raises:
        ArgumentError: Sizes do not divide, or a layer cannot be split as the plan says.
    """
    distributed = getattr(model.config, "distributed_config", None)
    size = getattr(distributed, "tp_size", None) or 1
    _check_sizes(distributed, size, packs)
    if size == 1:
        plan.clear()
        return
    if int8_layers:
        raise ArgumentError(
            f"bitlab: int8_layers must be empty in tensor parallel, got {int8_layers[0]}"
            + (f" and {len(int8_layers) - 1} more" if len(int8_layers) > 1 else "")
            + "\nRun the model in one process with device_map; train it with DDP or FSDP2."
        )
    _check_heads(model, size)
    # It registers styles with transformers, which only this needs.
    from bitlab_hf.model.parallel_styles import STYLES

    modules = _by_pattern(model)
    for key, style in list(plan.items()):
        named = modules.get(key) or modules.get(key.rpartition(".")[0], [])
        layers = [(name, one) for name, one in named if isinstance(one, BitLayerBase)]
        whole = layers and style in _GATHERED
        if whole or any(name in int8 or _stays_whole(one) for name, one in named):
            del plan[key]
            if key not in modules:
                # The style of a tensor: transformers refuses a plan that has come out empty.
                plan[key] = "replicate"
            continue
        for name, layer in layers:
            _check_layer(name, layer, style, size, packs)
        if layers:
            plan[key] = STYLES[packs, style]


def plan_experts(model: PreTrainedModel, plan: dict[str, str], packs: bool) -> None:
    """Makes a model's plan for expert parallel one that ternary experts can follow, in place.

    Each process has some of the experts of a layer, whole, and tokens are sent to them and back:
    their sums are added up in the order of one process. Float experts keep their styles.

    Args:
        model: The skeleton, with its experts in place.
        plan: Styles by names with ``*`` for numbers.
        packs: Whether they will be packed once loaded.

    Raises:
        ArgumentError: The experts do not divide, or cannot be split as the plan says.
    """
    distributed = getattr(model.config, "distributed_config", None)
    size = getattr(distributed, "ep_size", None) or 1
    if size == 1:
        plan.clear()
        return
    from bitlab_hf.model.parallel_styles import EXPERT_STYLES

    modules = _by_pattern(model)
    planned: dict[str, list[tuple[str, BitExperts]]] = {}
    for key, style in list(plan.items()):
        owner = key if key in modules else key.rpartition(".")[0]
        found = [(name, one) for name, one in modules.get(owner, []) if isinstance(one, BitExperts)]
        if not found:
            continue
        expected = _DISPATCH if owner == key else _WHOLE_EXPERTS
        if style != expected:
            raise ArgumentError(
                f"bitlab: the style of {key} must be {expected!r} for ternary experts, got "
                f"{style!r}\nLeave ep_plan out, or run the model with ep_size=1."
            )
        if owner == key:
            planned[key] = found
        else:
            del plan[key]
    for key, found in planned.items():
        for name, experts in found:
            _check_experts(name, experts, size, packs)
            # Biases too, of which not every plan speaks.
            held = [leaf for leaf, one in experts._parameters.items() if one is not None]
            plan.update({f"{key}.{leaf}": EXPERT_STYLES[packs] for leaf in held})


def finish_parallel(model: PreTrainedModel) -> None:
    """Completes what transformers has made of the plans, once a model is loaded."""
    if any(isinstance(found.module, BitExperts) for found in parts(model)):
        from bitlab_hf.model.parallel_styles import send_tokens

        send_tokens(model)


def _by_pattern(model: nn.Module) -> dict[str, list[tuple[str, nn.Module]]]:
    """Returns a model's modules by their names with ``*`` for numbers."""
    modules: dict[str, list[tuple[str, nn.Module]]] = {}
    for name, module in model.named_modules():
        modules.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", name), []).append((name, module))
    return modules


def _check_experts(name: str, experts: BitExperts, size: int, packs: bool) -> None:
    if experts.float_class().__name__ in FORMS:
        raise ArgumentError(
            f"bitlab: {name} must hold experts that tokens can be sent to, got "
            f"{experts.float_class().__name__}\nRun the model with ep_size=1."
        )
    count = next(iter(experts.stacks.values())).experts
    if count % size:
        raise ArgumentError(
            f"bitlab: ep_size must divide the number of experts of {name}, got {size} for {count}\n"
            "Use another ep_size, or 1."
        )
    if not packs and any(True for one in experts.children() for _ in one.parameters()):
        # Each process would have a gradient from its own tokens.
        raise ArgumentError(
            f"bitlab: {name} must have no weights beside its experts' to train in expert parallel, "
            f"got {type(experts).__name__}\nTrain it with ep_size=1."
        )


def _stays_whole(module: nn.Module) -> bool:
    quantized = isinstance(module, QuantizedModule) and not isinstance(module, BitLayerBase)
    return quantized or isinstance(module, BitExperts)


def _check_sizes(distributed: Any, size: int, packs: bool) -> None:
    sizes = {"tp_size": size, "ep_size": getattr(distributed, "ep_size", None) or 1}
    split = [f"{name}={one}" for name, one in sizes.items() if one > 1]
    # Packed parts are cut out of whole layers, which shards are not.
    others = ["pp_size"] + (["fsdp_size", "dp_replicate_size"] if packs else [])
    for name in others if split else ():
        other = getattr(distributed, name, None) or 1
        if other > 1:
            where = "to run a model" if packs else "to train one"
            raise ArgumentError(
                f"bitlab: {name} must be 1 beside {split[0]} {where}, got {other}\n"
                "Leave one of them out, or run the model with device_map."
            )
    for name in ("tp_plan", "ep_plan"):
        given = getattr(distributed, name, None)
        if split and isinstance(given, dict):
            raise ArgumentError(
                f"bitlab: {name} must be the model's own, got {given}\n"
                "Ternary layers and experts are split by it alone; leave it out."
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
