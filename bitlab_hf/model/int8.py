"""What of a model is int8: the output head with what is tied to it, and linear layers that the user
names. Found, checked, swapped, tied again.

transformers ties parameters by name (``_tied_weights_keys``, ``all_tied_weights_keys``); once the
weights are gone, the same pairs are named after ``qweight`` and ``qweight_scale``, so that loading,
saving, device maps and ``tie_weights()`` go on as they do for float weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from bitcore.errors import ConfigError, NonFiniteError
from bitcore.quantize import quantize_rows_int8
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import find_experts, names_for_overrides
from bitlab_hf.model.rows import (
    Rows,
    check_supported,
    embedding_factor,
    find_rows,
    float_embedding,
    stored_elsewhere,
)
from bitlab_hf.model.tree import Found, aliases_of, find_modules, set_module, take_hooks
from bitlab_hf.model.vocabulary import guard_vocabulary, input_embeddings
from bitlayers.checks import check_whole
from bitlayers.int8 import Int8Embedding, Int8Linear, Int8Rows

_LEAVES = ("qweight", "qweight_scale")
# Who asks for rows, and what to do where there are none to be had, for messages.
INT8_HEAD = ('head="int8"', 'Use head="keep".')
INT8_LAYERS = ("int8_layers", "Leave the layer out of int8_layers.")
# Where `replace_linear` leaves its choices for `deploy`.
HEAD_ATTRIBUTE = "_bitlab_head"
LAYERS_ATTRIBUTE = "_bitlab_int8_layers"


def find_head(model: PreTrainedModel) -> Rows | None:
    """Returns the output head with what is tied to it, checked to have an int8 form.

    Raises:
        ConfigError: The head, or a module tied to it, has none.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    if type(head) is not nn.Linear:
        raise ConfigError(
            f'bitlab: head="int8" must find an output head that is an nn.Linear, got '
            f"{type(head).__name__}\n{INT8_HEAD[1]}"
        )
    rows = find_rows(model, head, *INT8_HEAD)
    check_supported(model, rows, *INT8_HEAD)
    return rows


# Linear layers that the user names.


def claim_int8(
    model: PreTrainedModel, linears: Sequence[Found[nn.Linear]], config: BitLabConfig
) -> tuple[list[Found[nn.Linear]], list[Found[nn.Linear]]]:
    """Tells the layers that the patterns of ``int8_layers`` match from those that become ternary.

    Args:
        model: The float model, or its skeleton.
        linears: The layers that would become ternary.
        config: As the user gave it.

    Returns:
        The layers that become ternary, and those that become int8.

    Raises:
        ConfigError: A pattern matches none of the layers, or what cannot be int8.
    """
    chosen: dict[int, Found[nn.Linear]] = {}
    for pattern in config.int8_layers:
        _check_pattern(model, pattern, config)
        matched = {id(one.module): one for one in linears if _matches(model, one.names, [pattern])}
        if not matched:
            example = f"such as {linears[0].names[0]!r}" if linears else "of layers"
            raise ConfigError(
                "BitLabConfig: int8_layers must match linear layers that would be ternary "
                f"otherwise, got {pattern!r}, which matches none\nA pattern matches whole names "
                f"{example}, their beginning up to a dot, or their end."
            )
        chosen |= matched
    rest = [one for one in linears if id(one.module) not in chosen]
    return rest, [one for one in linears if id(one.module) in chosen]


def _check_pattern(model: PreTrainedModel, pattern: str, config: BitLabConfig) -> None:
    """Refuses a pattern that matches what stands in another field, or has no int8 form."""
    for found in find_experts(model, []):
        names = names_for_overrides(model, [found])
        if not all(should_convert_module(name, [pattern]) for name in names):
            raise ConfigError(
                f"BitLabConfig: int8_layers must match linear layers, got {pattern!r}, which "
                f"matches the experts {found.names[0]}\nTensors of experts are ternary, or float "
                'with experts="keep".'
            )
    head = model.get_output_embeddings()
    for linear in find_modules(model, nn.Linear):
        name = linear.names[0]
        if not _matches(model, linear.names, [pattern]):
            continue
        if linear.module is head and config.head != "int8":
            raise ConfigError(
                f"BitLabConfig: int8_layers must match no output head, got {pattern!r}, which "
                f'matches {name}\nUse head="int8".'
            )
        if _matches(model, linear.names, config.modules_to_not_convert or []):
            raise ConfigError(
                "BitLabConfig: int8_layers must match no layer of modules_to_not_convert, got "
                f"{pattern!r}, which matches {name}\nName it in one of them."
            )


def _matches(model: nn.Module, names: list[str], patterns: list[str]) -> bool:
    aliases = [alias for name in names for alias in aliases_of(model, name)]
    return not all(should_convert_module(alias, patterns) for alias in aliases)


def named_int8(
    model: nn.Module, linears: Sequence[Found[nn.Linear]], names: Sequence[str]
) -> tuple[list[Found[nn.Linear]], list[Found[nn.Linear]]]:
    """Tells the plain linear layers of these very names from the others of a list.

    Args:
        model: The model, or its skeleton.
        linears: The layers that a file's configuration makes ternary.
        names: The layers that it makes int8, by this model's names or by those of its family.

    Returns:
        The layers of the list without those of the names, and these.
    """
    known = set(names)
    named = [
        found
        for found in find_modules(model, nn.Linear)
        if type(found.module) is nn.Linear
        and any(known.intersection(aliases_of(model, name)) for name in found.names)
    ]
    chosen = {id(found.module) for found in named}
    return [one for one in linears if id(one.module) not in chosen], named


def layer_rows(model: PreTrainedModel, linears: Sequence[Found[nn.Linear]]) -> list[Rows]:
    """Returns layers that become int8, with those that share their weight, checked to have an int8
    form.

    Raises:
        ConfigError: One has none, or what is tied to it is no layer of the list.
    """
    names = {name for found in linears for name in found.names}
    result: dict[str, Rows] = {}
    for found in linears:
        rows = find_rows(model, found.module, *INT8_LAYERS)
        others = [name for name in rows.names if name not in names]
        if others:
            raise ConfigError(
                f"BitLabConfig: int8_layers must match {others[0]} too, which is tied to "
                f"{found.names[0]}, or neither of them\n{INT8_LAYERS[1]}"
            )
        tied = {name for pair in model.all_tied_weights_keys.items() for name in pair}
        untold = [
            one.names[0]
            for one in rows.members[1:]
            if tied.isdisjoint(f"{name}.weight" for name in one.names)
        ]
        if untold:
            # A file could not say it.
            raise ConfigError(
                "BitLabConfig: int8_layers must match layers that the model ties by name or not at "
                f"all, got {rows.owner}, which shares its weight with {untold[0]}\n{INT8_LAYERS[1]}"
            )
        check_supported(model, rows, *INT8_LAYERS)
        result[rows.owner] = rows
    return list(result.values())


# Swapping, and tying again.


def _skeleton(module: nn.Module) -> Int8Linear | Int8Embedding:
    skeleton: Int8Linear | Int8Embedding
    if isinstance(module, nn.Embedding):
        scaled = () if type(module) is nn.Embedding else embedding_factor(module) or ()
        skeleton = Int8Embedding.skeleton(module, *scaled)
    else:
        assert isinstance(module, nn.Linear)
        skeleton = Int8Linear.skeleton(module)
    # transformers would fill the weight of an embedding that it takes for a new one.
    skeleton._is_hf_initialized = True
    return skeleton


def swap_skeletons(model: PreTrainedModel, rows: Rows) -> None:
    """Puts int8 modules in, for a loader to fill the first; the others take its tensors later."""
    first: Tensor | None = None
    for found in rows.members:
        module = _skeleton(found.module)
        if first is None:
            first = module.qweight
        else:
            # No scale: a loader would miss it. The qweight it ties as it tied the weight.
            module.qweight, module.qweight_scale = first, None  # type: ignore[assignment]
        _put(model, found, module)
    model.all_tied_weights_keys = _renamed(model.all_tied_weights_keys, rows.names, _LEAVES[:1])


def swap_quantized(model: PreTrainedModel, rows: Rows, qweight: Tensor, scale: Tensor) -> None:
    """Puts int8 modules in that share these tensors."""
    shared = nn.Parameter(qweight, requires_grad=False)
    for tensor in (shared, scale):
        tensor._is_hf_initialized = True  # type: ignore[attr-defined]
    for found in rows.members:
        _put(model, found, _skeleton(found.module).commit(shared, scale))
    model.all_tied_weights_keys = _renamed(model.all_tied_weights_keys, rows.names, _LEAVES[:1])


def _put(model: nn.Module, found: Found[nn.Module], module: nn.Module) -> None:
    take_hooks(found.module, module)
    found.module = module
    for name in found.names:
        set_module(model, name, module)


def finish(model: PreTrainedModel, swapped: Sequence[Rows]) -> None:
    """After the tensors are there: ties all members, here and in what transformers will tie.

    Args:
        model: The model.
        swapped: All that was found in it before any of it was swapped.
    """
    for rows in swapped:
        owner = rows.members[0].module
        assert isinstance(owner, Int8Rows)
        for found in rows.members:
            module = found.module
            assert isinstance(module, Int8Rows)
            module.commit(owner.qweight, owner.qweight_scale)
            module.qweight.requires_grad_(False)
            if isinstance(module, Int8Linear) and module.bias is not None:
                module.bias.requires_grad_(False)
    every = [name for rows in swapped for name in rows.names]
    for prefix, tied in swapped[0].tied.items() if swapped else ():
        part: Any = model.get_submodule(prefix)
        names = [name.removeprefix(f"{prefix}.") if prefix else name for name in every]
        renamed = _renamed(tied, names, _LEAVES)
        if renamed != tied:
            part._tied_weights_keys = renamed
            part.all_tied_weights_keys = _renamed(part.all_tied_weights_keys, names, _LEAVES[:1])
    guard_vocabulary(model)


def _renamed(tied: dict[str, str], names: Iterable[str], leaves: tuple[str, ...]) -> dict[str, str]:
    """Names pairs of weights after what took their place; a pair of which one half is left is
    dropped.
    """
    gone = {f"{name}.weight" for name in names}
    renamed: dict[str, str] = {}
    for target, source in tied.items():
        if target not in gone and source not in gone:
            renamed[target] = source
        elif target in gone and source in gone:
            for leaf in leaves:
                renamed[target.removesuffix("weight") + leaf] = source.removesuffix("weight") + leaf
    return renamed


# What `deploy` does.


@dataclass
class Plan:
    """What `deploy` will put in: the members, and the tensors made for them."""

    rows: Rows
    qweight: Tensor
    scale: Tensor


def commit_int8(model: PreTrainedModel, plans: Sequence[Plan]) -> None:
    """Swaps the members of all plans, and ties them."""
    for plan in plans:
        swap_quantized(model, plan.rows, plan.qweight, plan.scale)
    finish(model, [plan.rows for plan in plans])


def plan_int8(model: nn.Module) -> list[Plan]:
    """Quantizes what is to be int8 of a model beside it, as its configuration says; changes
    nothing.

    Returns:
        What to commit.

    Raises:
        ConfigError: The head, or a layer, has no int8 form.
        LifecycleError: A weight is sharded, or on the meta device.
        NonFiniteError: One holds NaN or infinity.
    """
    if not isinstance(model, PreTrainedModel):
        return []
    config = getattr(model.config, "quantization_config", None)
    if isinstance(config, BitLabConfig):
        choice, names = config.head, config.int8_layers
    else:
        choice = getattr(model, HEAD_ATTRIBUTE, "keep")
        names = getattr(model, LAYERS_ATTRIBUTE, [])
    is_done = isinstance(model.get_output_embeddings(), Int8Linear)
    head = find_head(model) if choice == "int8" and not is_done else None
    _, layers = named_int8(model, [], names)
    found = layer_rows(model, layers)
    return [_quantized(rows) for rows in ([] if head is None else [head]) + found]


def _quantized(rows: Rows) -> Plan:
    for found in rows.members:
        check_whole(found.module, f"{found.names[0]}.weight")
    qweight, scale = quantize_rows_int8(rows.tensor)
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError(
            f"deploy: {rows.owner}.weight must be finite, got NaN or infinity; nothing changed"
        )
    return Plan(rows, qweight, scale)


# What a model with int8 modules says about them.


def int8_modules(model: nn.Module) -> list[Found[Int8Rows]]:
    """Returns the int8 modules of a model, each once."""
    return find_modules(model, Int8Rows)


def int8_layers(model: PreTrainedModel) -> list[Found[Int8Rows]]:
    """Returns the int8 modules that are no output head, no embedding, and not tied to one."""
    vocabulary = {
        id(module.qweight)
        for module in (model.get_output_embeddings(), input_embeddings(model))
        if isinstance(module, Int8Rows)
    }
    found = int8_modules(model)
    vocabulary |= {id(o.module.qweight) for o in found if isinstance(o.module, Int8Embedding)}
    return [one for one in found if id(one.module.qweight) not in vocabulary]


def is_borrower(model: PreTrainedModel, found: Found[Int8Rows]) -> bool:
    """Tells whether a file holds the tensors of an int8 module under another one's name."""
    return not stored_elsewhere(model).isdisjoint(f"{name}.qweight" for name in found.names)


def restore_float(model: PreTrainedModel, dtype: torch.dtype | None) -> None:
    """Puts float modules back for int8 ones, with codes times scale, tied as before."""
    weights: dict[int, nn.Parameter] = {}
    for found in int8_modules(model):
        module = found.module
        key = id(module.qweight)
        if key not in weights:
            weights[key] = nn.Parameter(module.dequantized_weight(dtype))
        restored = _float_module(module, weights[key])
        take_hooks(module, restored)
        for name in found.names:
            set_module(model, name, restored.train(module.training))
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            for name in ("_tied_weights_keys", "resize_token_embeddings"):
                part.__dict__.pop(name, None)
    model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)


def _float_module(module: Int8Rows, weight: nn.Parameter) -> nn.Module:
    if isinstance(module, Int8Linear):
        rows, columns = weight.shape
        linear = nn.Linear(columns, rows, bias=False, device="meta")
        linear.weight = weight
        if module.bias is not None:
            linear.bias = nn.Parameter(module.bias.detach().to(weight.dtype))
        return linear
    assert isinstance(module, Int8Embedding)
    return float_embedding(module, weight)
