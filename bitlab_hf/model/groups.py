"""Which groups of inputs share a scale in a pretrained model, where nobody has said."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitcore.checks import GROUP_SIZES
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import expert_modules, experts_to_convert, stacks_of
from bitlab_hf.model.int8 import claim_int8
from bitlab_hf.model.left import reasons_to_leave
from bitlab_hf.model.replace import find_linears, skipped_modules
from bitlab_hf.model.tree import find_modules, quantized_layers
from bitlayers.bitlinear import BitLinear

logger = logging.getLogger("bitlab")
# What a pretrained model gets beside a size of groups, where nothing else was asked for.
PICKED = {"weight_granularity": "per_group", "weight_quantizer": "lsq"}


def pretrained_config(
    model: PreTrainedModel | str | os.PathLike[str], **fields: Any
) -> BitLabConfig:
    """Returns the configuration that suits a pretrained model: what BitLab's commands pick.

    A scale for each 128 inputs where 128 divides those of every converted layer, else for each 64,
    trained with the weights (``weight_quantizer="lsq"``). Layers whose inputs neither divides get
    one scale a row, by an override; all do where no layer fits::

        config = pretrained_config("my-model", head="int8")
        model = AutoModelForCausalLM.from_pretrained("my-model", quantization_config=config)

    Args:
        model: A float model, or the folder or hub name of a causal language model, of which only
            the configuration is read and no code is run.
        fields: Those of `BitLabConfig`; what is given wins. Nothing is picked beside another
            ``weight_granularity``.

    Raises:
        ArgumentError: The model is quantized already.
        ArgumentTypeError: It is neither a transformers model nor a path or name.
        ConfigError: A field is unknown or its value is not allowed.
    """
    if isinstance(model, PreTrainedModel):
        source: Any = model.config
    elif isinstance(model, (str, os.PathLike)):
        source = AutoConfig.from_pretrained(model, trust_remote_code=False)
    else:
        raise ArgumentTypeError(
            "pretrained_config: model must be a transformers model, a folder or a hub name, got "
            f"{type(model).__name__}"
        )
    swapped = isinstance(model, nn.Module) and (quantized_layers(model) or expert_modules(model))
    if swapped or getattr(source, "quantization_config", None) is not None:
        raise ArgumentError(
            "pretrained_config: model must be a float one, got one that is quantized already\n"
            "Its scheme was fixed when it was made: load it without a configuration."
        )
    given = {**PICKED, **fields}
    if given["weight_granularity"] != "per_group":
        return BitLabConfig(**fields)
    if given.get("group_size") is not None:
        return BitLabConfig(**given)
    skeleton: Any = model
    if not isinstance(model, PreTrainedModel):
        with torch.device("meta"):
            skeleton = AutoModelForCausalLM.from_config(source, trust_remote_code=False)
    config = BitLabConfig(**{**given, "group_size": GROUP_SIZES[0]})
    chosen = group_fields(skeleton, config)
    rows, asked = chosen.pop("overrides", {}), config.overrides
    # Later patterns win, so what was asked for comes last.
    overrides = {name: row for name, row in rows.items() if name not in asked}
    overrides |= {name: {**rows.get(name, {}), **values} for name, values in asked.items()}
    return BitLabConfig(**{**given, **chosen, "overrides": overrides})


def choose_groups(inputs: Mapping[str, int]) -> tuple[int | None, list[str]]:
    """Chooses the size of groups for a model's layers.

    Args:
        inputs: in_features of each layer that is converted, by its name.

    Returns:
        128 where it divides every layer's inputs that 64 divides, else 64, None where there are no
        such layers; and the names of the others.
    """
    rest = [name for name, count in inputs.items() if count % min(GROUP_SIZES)]
    fitting = [count for name, count in inputs.items() if name not in set(rest)]
    sizes = sorted(GROUP_SIZES, reverse=True)
    size = next((one for one in sizes if all(count % one == 0 for count in fitting)), None)
    return size if fitting else None, rest


def group_fields(model: PreTrainedModel, config: BitLabConfig) -> dict[str, Any]:
    """Returns the fields of a configuration that give a pretrained model scales of groups.

    Layers whose inputs no group divides get one scale a row, by an override.

    Args:
        model: The float model, or its skeleton.
        config: How it is made ternary otherwise.
    """
    skip = skipped_modules(model, config, defaults=True)
    found = find_linears(model, skip)
    reasons = reasons_to_leave(model, found, config)
    left = {name for layers in reasons.values() for layer in layers for name in layer.names}
    ternary, _ = claim_int8(model, [one for one in found if one.names[0] not in left], config)
    inputs = {layer.names[0]: layer.module.in_features for layer in ternary}
    for one in experts_to_convert(model, config, skip):
        stacks = stacks_of(model, one, config)
        inputs |= {f"{one.names[0]}.{stack.name}": stack.in_features for stack in stacks}
    size, rest = choose_groups(inputs)
    rows = {"weight_granularity": "per_channel", "group_size": None}
    if size is None:
        return rows
    return {
        "weight_granularity": "per_group",
        "group_size": size,
        "overrides": {name: dict(rows) for name in rest},
    }


def advise_groups(model: nn.Module) -> None:
    """Says in one warning how to get groups for a model that learns without any, though they would
    divide the inputs of its layers.
    """
    latent = [one for one in find_modules(model, BitLinear) if not one.module.is_deployed]
    kinds = {one.module.quant_config.weight_granularity for one in latent}
    size, _ = choose_groups({one.names[0]: one.module.in_features for one in latent})
    learns = any(one.module.weight.requires_grad for one in latent)
    if size is not None and learns and "per_group" not in kinds:
        logger.warning(
            "bitlab: the weights' scales are %s; a pretrained model loses far less with one for "
            "each %d inputs\nLoad the float model with "
            "quantization_config=bitlab_hf.pretrained_config(MODEL).",
            " and ".join(kind.replace("_", " ") for kind in sorted(kinds)), size,
        )  # fmt: skip


def scales_in_words(config: BitLabConfig) -> str:
    """Returns what scales a configuration gives the weights, in words."""
    kind = config.weight_granularity.replace("_", " ")
    if config.weight_granularity != "per_group":
        return kind
    levels = "float32" if config.group_scale_dtype == "float32" else "7-bit multipliers of a row's"
    text = f"{kind} of {config.group_size} ({levels})"
    names = list(config.overrides)
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        text += f"; per channel, since no group divides their inputs: {', '.join(names[:3])}{more}"
    return text
