"""Which groups of inputs share a scale in a pretrained model, where nobody has said."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedModel

from bitcore.checks import GROUP_SIZES
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import experts_to_convert, stacks_of
from bitlab_hf.model.int8 import claim_int8
from bitlab_hf.model.left import reasons_to_leave
from bitlab_hf.model.replace import find_linears, skipped_modules


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
