"""Swaps linear layers for quantized ones, through the layer registry.

Also for models outside transformers: `replace_linear` needs nothing but a module tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

from bitcore.errors import ArgumentError, ConfigError
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import (
    experts_to_convert,
    swap_experts,
    tied_tensors,
)
from bitlab_hf.model.int8 import (
    HEAD_ATTRIBUTE,
    LAYERS_ATTRIBUTE,
    claim_int8,
    find_head,
    layer_rows,
)
from bitlab_hf.model.left import check_found, leave_float
from bitlab_hf.model.reads import find_reads
from bitlab_hf.model.schemes import Naming, check_names, check_overrides, layer_schemes
from bitlab_hf.model.tree import (
    Found,
    aliases_of,
    find_modules,
    quantized_layers,
    set_module,
    take_hooks,
)
from bitlab_hf.model.vocabulary import guard_vocabulary
from bitlayers.base import BitLayerBase
from bitlayers.bitlinear import BitLinear
from bitlayers.deployment import expect_own, meta_twin
from bitlayers.registry import get_layer

# Tensors that a layer registered when it packed itself: dtype and shape by name.
OwnTensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def find_linears(model: nn.Module, skip: list[str]) -> list[Found[nn.Linear]]:
    """Returns the plain ``nn.Linear`` modules that no pattern of ``skip`` names."""
    # Subclasses are left alone: what uses them may read their weight itself.
    return [
        found
        for found in find_modules(model, nn.Linear)
        if type(found.module) is nn.Linear
        and all(
            should_convert_module(alias, skip)
            for name in found.names
            for alias in aliases_of(model, name)
        )
    ]


def skipped_modules(model: PreTrainedModel, config: BitLabConfig, defaults: bool) -> list[str]:
    """Returns the patterns of modules to leave alone in a transformers model.

    Args:
        model: The model.
        config: Whose ``modules_to_not_convert`` and ``head`` count.
        defaults: Whether to add what transformers skips by default (a file of ours holds them).
    """
    given = [*(config.modules_to_not_convert or []), *sorted(model._keep_in_fp32_modules or ())]
    # A copy of what was given: transformers returns it with its own additions.
    names = HfQuantizer.get_modules_to_not_convert(model, [], None, add_default_skips=defaults)
    # transformers leaves out whatever is tied, for the sake of embeddings.
    names = [*given, *(set(names) - _tied_linears(model) - tied_tensors(model))]
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    stripped = {name: name.removesuffix(".weight").removesuffix(".bias") for name in names}
    # transformers names parameters; one that is no linear layer's must not skip its whole parent.
    names = [short if short in linears else name for name, short in stripped.items()]
    output = model.get_output_embeddings()
    head = {name for name, module in model.named_modules() if module is output}
    if config.head == "ternary":
        return sorted(set(names) - head)
    return sorted(set(names) | head)


def _tied_linears(model: PreTrainedModel) -> set[str]:
    """Returns the names of linear layers that are tied to nothing but linear layers."""
    modules = dict(model.named_modules(remove_duplicate=False))
    head = model.get_output_embeddings()
    pairs = [
        {name.removesuffix(".weight") for name in pair}
        for pair in (model.all_tied_weights_keys or {}).items()
        if pair[0].endswith(".weight")
    ]
    alone = {
        name
        for pair in pairs
        for name in pair
        if type(modules.get(name)) is nn.Linear and modules[name] is not head
    }
    others = {name for pair in pairs for name in pair} - alone
    for _ in pairs:
        # What is tied to something else takes those with it that are tied to it.
        spread = {name for pair in pairs if pair & others for name in pair} - others
        if not spread:
            break
        others |= spread
    return alone - others


def replace_linear(model: nn.Module, config: BitLabConfig | None = None) -> nn.Module:
    """Swaps the linear layers of any model for latent quantized ones that share their weights, and
    makes experts that are kept as tensors ternary where they lie.

    Weights become float32 unless ``config.latent_dtype == "keep"``; two layers that shared a
    weight share it still. A model outside transformers has no known output head: name it in
    ``config.modules_to_not_convert``.

    Args:
        model: Any module tree; it is changed in place.
        config: What to convert, and how; default `BitLabConfig()`.

    Returns:
        The model.

    Raises:
        ConfigError: Nothing was found to convert, or a layer cannot be quantized as asked.
    """
    config = BitLabConfig() if config is None else config
    if isinstance(model, nn.Linear):
        raise ConfigError(
            "replace_linear: model must hold linear layers, got one itself\n"
            "Use BitLinear.from_linear(linear)."
        )
    skip = list(config.modules_to_not_convert or [])
    if isinstance(model, PreTrainedModel):
        skip = skipped_modules(model, config, defaults=True)
    _check_int8(model, config)
    linears = find_linears(model, skip)
    left = leave_float(model, linears, config)
    linears = [found for found in linears if found not in left]
    names: list[str] = []
    if isinstance(model, PreTrainedModel):
        linears, int8 = claim_int8(model, linears, config)
        names = [name for rows in layer_rows(model, int8) for name in rows.names]
    experts = experts_to_convert(model, config, skip)
    _check_in_place(linears)
    check_names(model, linears, config)
    swap_latent(model, linears, config, experts)
    # Such a model has no quantization config of its own; `deploy` looks here.
    if config.head == "int8":
        setattr(model, HEAD_ATTRIBUTE, config.head)
    if names:
        setattr(model, LAYERS_ATTRIBUTE, names)
    return model


def _check_in_place(linears: list[Found[nn.Linear]]) -> None:
    """Refuses layers whose forward, or weights, are in the hands of accelerate's hooks."""
    for found in linears:
        if "forward" in vars(found.module) or found.module.weight.is_meta:
            raise ConfigError(
                f"replace_linear: {found.names[0]} must hold its weight and its own forward, got a "
                "layer that accelerate dispatches or offloads\nConvert while loading, "
                "from_pretrained(..., quantization_config=BitLabConfig(), device_map=...), or "
                "before dispatching."
            )


def _check_int8(model: nn.Module, config: BitLabConfig) -> None:
    """Refuses int8 of what `deploy` knows no head and no ties of."""
    if config.int8_layers and not isinstance(model, PreTrainedModel):
        raise ConfigError(
            "replace_linear: int8_layers must be asked of a transformers model, got "
            f"{type(model).__name__}\nPut bitlayers.Int8Linear.from_linear(linear) in yourself."
        )
    if config.head != "int8":
        return
    if not isinstance(model, PreTrainedModel) or find_head(model) is None:
        raise ConfigError(
            'replace_linear: head="int8" must be asked of a transformers model with an output '
            f"head, got {type(model).__name__}"
        )


def swap_latent(
    model: nn.Module,
    linears: list[Found[nn.Linear]],
    config: BitLabConfig,
    experts: Sequence[Found[nn.Module]],
) -> None:
    """Swaps these layers for latent ones, and makes these experts latent ternary ones."""
    check_found(model, linears, experts)
    check_overrides(model, linears, config, experts)
    weights: dict[int, nn.Parameter] = {}
    scales: dict[int, nn.Parameter] = {}
    layers = []
    for found, scheme in zip(linears, layer_schemes(model, linears, config), strict=True):
        linear = found.module
        weight: torch.Tensor = linear.weight
        if config.latent_dtype == "float32" and weight.dtype != torch.float32:
            if id(weight) not in weights:
                weights[id(weight)] = nn.Parameter(weight.detach().float(), weight.requires_grad)
            weight = weights[id(weight)]
        with Naming(found.names[0]):
            aliases = aliases_of(model, found.names[0])
            layer_class = get_layer(config.layer_name(*aliases))
            layer = layer_class.from_linear(linear, scheme)
        layer.weight = weight
        layer.latent_dtype, layer.float_dtype = weight.dtype, linear.weight.dtype
        if layer.learned_scale is not None:
            # What shares a weight shares the scale that is trained with it.
            layer.learned_scale = scales.setdefault(id(weight), layer.learned_scale)
        layers.append(layer)
    _, dtypes = find_reads(model)
    for found, layer in zip(linears, layers, strict=True):
        # A packed layer's `weight` has the dtype that the float one had; a latent one can be wider.
        layer.casts_input = bool(dtypes.intersection(found.names))
    swap_experts(model, experts, config)
    _swap(model, linears, layers)


def swap_packed(
    model: nn.Module,
    linears: list[Found[nn.Linear]],
    config: BitLabConfig,
    own: dict[str, OwnTensors] | None = None,
    experts: Sequence[Found[nn.Module]] = (),
) -> None:
    """Swaps these layers for deployed ones whose packed tensors a loader fills.

    Args:
        model: The skeleton.
        linears: The layers.
        config: How they are quantized.
        own: By the first name of a layer that packed itself, the tensors that it registered.
        experts: What becomes deployed ternary experts.
    """
    check_found(model, linears, experts)
    layers = []
    first: dict[tuple[Any, ...], BitLayerBase] = {}
    for found in linears:
        linear = found.module
        with Naming(found.names[0]):
            aliases = aliases_of(model, found.names[0])
            sizes = linear.in_features, linear.out_features, linear.bias is not None
            scheme = config.layer_config(*aliases), linear.weight.device, linear.weight.dtype
            kind = get_layer(config.layer_name(*aliases))
            alike = first.get((kind, sizes, scheme))
            tensors = (own or {}).get(found.names[0])
            if alike is None or tensors is not None:
                layer = kind.packed_skeleton(*sizes, *scheme)
            else:
                layer = meta_twin(alike)
            if tensors is not None:
                expect_own(layer, tensors)
            elif kind is BitLinear and linear.weight.is_meta:
                first.setdefault((kind, sizes, scheme), layer)
        layers.append(layer)
    swap_experts(model, experts, config, packed=True)
    _swap(model, linears, layers)


def _swap(model: nn.Module, linears: list[Found[nn.Linear]], layers: list[BitLayerBase]) -> None:
    # All layers were built before the first is put in: an error above changes nothing.
    for found, layer in zip(linears, layers, strict=True):
        take_hooks(found.module, layer)
        for name in found.names:
            set_module(model, name, layer)
    guard_vocabulary(model)


__all__ = [
    "find_linears",
    "quantized_layers",
    "replace_linear",
    "skipped_modules",
    "swap_latent",
    "swap_packed",
]


def check_single_weight(found: list[Found[BitLayerBase]]) -> dict[int, list[Found[BitLayerBase]]]:
    """Groups latent layers by the weight they hold; layers that share one must be quantized alike.

    Raises:
        ArgumentError: Two layers share a weight but not a configuration, or not a learned scale.
    """
    groups: dict[int, list[Found[BitLayerBase]]] = {}
    for layer in found:
        weight = layer.module._parameters.get("weight")
        groups.setdefault(id(layer.module if weight is None else weight), []).append(layer)
    for group in groups.values():
        configs = {layer.module.quant_config for layer in group}
        if len(configs) > 1:
            raise ArgumentError(
                f"deploy: {', '.join(layer.names[0] for layer in group)} share one weight and "
                "must have one configuration, got different ones"
            )
        first, *others = [layer.module.learned_scale for layer in group]
        if first is not None and any(
            one is not None and one is not first and not torch.equal(one, first) for one in others
        ):
            raise ArgumentError(
                f"deploy: {', '.join(layer.names[0] for layer in group)} share one weight and "
                "must have one learned scale, got different ones\nGive all the learned_scale of "
                "the first before they are trained."
            )
    return groups
