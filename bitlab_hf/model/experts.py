"""Experts that a model keeps as tensors: which modules hold them, and how they become ternary.

transformers' decorator for such classes, ``use_experts_implementation``, leaves on each module how
its tensors lie. A class that does as a decorated one does, but lacks the decorator, is described
here.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.quantizers_utils import should_convert_module

from bitcore import estimators
from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError, BitLabError, ConfigError
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.expert_forms import Layout, form_of, run_for_holder, tensors_lie_so
from bitlab_hf.model.tree import Found, aliases_of, find_modules
from bitlayers import learned_experts
from bitlayers.experts import BitExperts, convert_experts
from bitlayers.stack import Stack

logger = logging.getLogger("bitlab")
# What configurations call the number of experts that a token visits; the last may stand for others.
_CHOSEN = ("moe_topk", "top_k_experts", "moe_k", "moe_top_k", "num_experts_per_tok")
# What the decorator sets, which is also what the forward needs to know.
_FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
# The same of classes without the decorator. Their forward has to be that of a decorated one: the
# same arguments, `_apply_gate` on what the first product gives, and a weighted sum.
UNDECORATED: dict[str, dict[str, bool]] = {
    "Step3p7Experts": {**dict.fromkeys(_FLAGS, False), "has_gate": True, "is_concatenated": True},
}


def _flags(module: nn.Module) -> dict[str, bool] | None:
    """Returns how the tensors of a float experts module lie; None of another module."""
    known = UNDECORATED.get(type(module).__name__)
    fields = vars(module) if known is None else known
    flags = {name: fields[name] for name in _FLAGS if isinstance(fields.get(name), bool)}
    return flags if len(flags) == len(_FLAGS) else None


def expert_modules(model: nn.Module) -> list[Found[BitExperts]]:
    """Returns the ternary experts of a model, each module once."""
    return find_modules(model, BitExperts)


def projections(module: nn.Module) -> list[str]:
    """Returns the names of the tensors of a float experts module in the order of use; none of a
    module that is no such, or whose tensors lie in another way than its class says.
    """
    form = form_of(module)
    if form is not None:
        layouts = form.layouts(module, None)
        return [one.args[0] for one in layouts] if tensors_lie_so(module, layouts) else []
    flags = None if isinstance(module, BitExperts) else _flags(module)
    if flags is None:
        return []
    names = ["gate_up_proj" if flags["has_gate"] else "up_proj", "down_proj"]
    tensors = [module._parameters.get(name) for name in names]
    experts = vars(module).get("num_experts")
    known = all(
        one is not None and one.dim() == 3 and one.shape[0] == experts and one.is_floating_point()
        for one in tensors
    )
    return names if known else []


def find_experts(model: nn.Module, skip: list[str]) -> list[Found[nn.Module]]:
    """Returns the float experts modules that no pattern of ``skip`` names."""
    return [
        found
        for found in find_modules(model, nn.Module)
        if projections(found.module)
        and all(
            should_convert_module(alias, skip)
            for name in found.names
            for alias in (*aliases_of(model, name), *_tensor_names(model, found))
        )
    ]


def tensor_names(model: nn.Module) -> list[str]:
    """Returns the names of all tensors of experts that can be ternary, or are."""
    return [
        f"{name}.{leaf}"
        for name, module in model.named_modules(remove_duplicate=False)
        for leaf in (module.stacks if isinstance(module, BitExperts) else projections(module))
    ]


def owners_of(experts: Iterable[Found[BitExperts]]) -> dict[BitExperts, BitExperts]:
    """Returns the first of those that hold the same latent weights, by each module.

    Raises:
        ArgumentError: Two share weights but not how they are quantized.
    """
    first: dict[tuple[int, ...], Found[BitExperts]] = {}
    owners = {}
    for found in experts:
        module = found.module
        names = [*module.stacks, *learned_experts.names(module)]
        held = tuple(id(module._parameters[name]) for name in names)
        owner = first.setdefault(held, found)
        if owner.module.stacks != module.stacks:
            raise ArgumentError(
                f"deploy: {owner.names[0]} and {found.names[0]} share their weights and must have "
                "one configuration, got different ones"
            )
        owners[module] = owner.module
    return owners


def tied_tensors(model: PreTrainedModel) -> set[str]:
    """Returns the names of the tensors of experts that are tied to others of their kind."""
    names = set(tensor_names(model))
    pairs = (model.all_tied_weights_keys or {}).items()
    return {name for pair in pairs if names.issuperset(pair) for name in pair}


def _tensor_names(model: nn.Module, found: Found[Any]) -> list[str]:
    module = found.module
    leaves = list(module.stacks) if isinstance(module, BitExperts) else projections(module)
    return [
        f"{alias}.{leaf}" for name in found.names for alias in aliases_of(model, name)
        for leaf in leaves
    ]  # fmt: skip


def names_for_overrides(model: nn.Module, experts: Iterable[Found[Any]]) -> list[str]:
    """Returns the names of experts modules and of their tensors that a pattern can match."""
    return [
        name
        for found in experts
        for name in (
            *(alias for one in found.names for alias in aliases_of(model, one)),
            *_tensor_names(model, found),
        )
    ]


def experts_to_convert(
    model: nn.Module, config: BitLabConfig, skip: list[str]
) -> list[Found[nn.Module]]:
    """Returns the experts that become ternary by a configuration, and says which stay float.

    Args:
        model: The float model, or its skeleton.
        config: ``experts`` says whether; ``None`` where they can be.
        skip: Patterns of modules to leave alone.

    Raises:
        ConfigError: ``experts="ternary"`` is asked of a model that has none, or of a layer that
            experts cannot have.
    """
    if config.experts == "keep":
        return []
    found = find_experts(model, skip)
    problem = None
    if config.layer != "BitLinear":
        problem = f"layer {config.layer!r} is one of linear layers"
    if config.experts == "ternary" and (problem or not found):
        raise ConfigError(
            'BitLabConfig: experts="ternary" must find experts that can be converted, got '
            f"{problem or 'none in ' + type(model).__name__}"
        )
    if not found:
        return []
    if problem:
        logger.warning("bitlab: experts such as %s stay float: %s", found[0].names[0], problem)
        return []
    names = [name for one in found for name in _tensor_names(model, one)]
    if any(map(config.norms, names)):
        logger.warning("bitlab: sub_norm gives no norm to experts, such as %s", names[0])
    return found


def _quantized(
    model: nn.Module, found: Found[Any], leaf: str, config: BitLabConfig
) -> BitQuantConfig:
    """Returns how one tensor of experts is quantized: one that is tied to another by absmean, where
    the estimator would train a scale for each.
    """
    asked = config.layer_config(*_names_of(model, found, leaf))
    tied = tied_tensors(model) if isinstance(model, PreTrainedModel) else set()
    if not estimators.get_estimator(asked.weight_quantizer).learned or not tied.intersection(
        f"{name}.{leaf}" for name in found.names
    ):
        return asked
    logger.info(
        "bitlab: %s.%s gets the scales of absmean: %s trains one for experts that are tied to none",
        found.names[0],
        leaf,
        asked.weight_quantizer,
    )
    return replace(asked, weight_quantizer="absmean")


def _names_of(model: nn.Module, found: Found[Any], leaf: str) -> list[str]:
    """Returns by what names the configuration can speak of one tensor: its own, its module's."""
    aliases = [alias for name in found.names for alias in aliases_of(model, name)]
    return [*aliases, *(f"{alias}.{leaf}" for alias in aliases)]


def stacks_of(model: nn.Module, found: Found[nn.Module], config: BitLabConfig) -> list[Stack]:
    """Returns how the tensors of a float experts module lie, and how each is quantized.

    Raises:
        ConfigError: A projection cannot be quantized as asked.
    """
    stacks = []
    for layout in _layouts(model, found):
        name = layout.args[0]
        try:
            stacks.append(layout(config=_quantized(model, found, name, config)))
        except BitLabError as error:
            raise ConfigError(f"{found.names[0]}.{error}") from error
    return stacks


def _layouts(model: nn.Module, found: Found[nn.Module]) -> list[Layout]:
    """Returns how the tensors of a float experts module lie, in the order of use."""
    module, form = found.module, form_of(found.module)
    if form is not None:
        return form.layouts(module, _holder(model, found.names[0]))
    flags = _flags(module)
    assert flags is not None
    layouts = []
    for place, name in enumerate(projections(module)):
        experts, *sizes = getattr(module, name).shape
        rows, columns = reversed(sizes) if flags["is_transposed"] else sizes
        layouts.append(
            partial(
                Stack,
                name,
                experts,
                rows,
                columns,
                parts=2 if flags["has_gate"] and place == 0 else 1,
                interleaved=not flags["is_concatenated"] and place == 0,
                transposed=flags["is_transposed"],
            )
        )
    return layouts


def _holder(model: nn.Module, name: str) -> nn.Module | None:
    """Returns the module that holds the one of this name."""
    return model.get_submodule(name.rpartition(".")[0]) if name else None


def check_choice(model: nn.Module, count: int) -> None:
    """Checks that a token can have as many experts as the configuration gives it.

    Args:
        model: The model.
        count: How many experts a layer has at most.

    Raises:
        ConfigError: It speaks of more experts a token than there are.
    """
    config: Any = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: None)()
    for one in (config, text, getattr(text, "ffn_config", None)):
        for name in _CHOSEN:
            chosen = getattr(one, name, None)
            # A list has a number for each layer.
            found = max(chosen, default=0) if isinstance(chosen, (list, tuple)) else chosen
            if isinstance(found, int) and found > count:
                raise ConfigError(
                    f"bitlab: {name} must be at most the number of experts, {count}, got {found}"
                )


def swap_experts(
    model: nn.Module,
    experts: Iterable[Found[nn.Module]],
    config: BitLabConfig,
    packed: bool = False,
) -> None:
    """Makes these experts ternary: latent, or with empty packed tensors for a loader to fill.

    Args:
        model: The model, or its skeleton.
        experts: The modules.
        config: How they are quantized.
        packed: Whether they are to hold packed tensors.

    Raises:
        ConfigError: One cannot be quantized as asked; nothing is changed.
    """
    # All are looked at before the first is changed.
    planned = [(found, stacks_of(model, found, config)) for found in experts]
    if planned:
        check_choice(model, max(stacks[0].experts for _, stacks in planned))
    converted = []
    for found, stacks in planned:
        module, form = found.module, form_of(found.module)
        # What the forward asks for; of a decorated class as it was.
        vars(module).update(_flags(module) or {})
        ternary = convert_experts(module, stacks, form.kind if form else BitExperts)
        for name in found.names if form and form.runs_holder else ():
            holder = _holder(model, name)
            if holder is not None:
                run_for_holder(holder, ternary)
        if packed:
            ternary.make_skeleton()
        converted.append(ternary)
    if config.latent_dtype == "float32" and not packed:
        _widen(converted)


def _widen(experts: list[BitExperts]) -> None:
    """Makes latent weights float32; those that are shared are shared still."""
    held = Counter(id(one._parameters[name]) for one in experts for name in one.stacks)
    # Weights with what was made of them, so that their ids stay theirs; of shared ones alone, since
    # all of them are a model's memory.
    made: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for one in experts:
        for name in one.stacks:
            weight = one._parameters[name]
            assert weight is not None
            if weight.dtype == torch.float32:
                continue
            key = id(weight)
            if key in made:
                one._parameters[name] = made[key][1]
                continue
            wide = nn.Parameter(weight.detach().float(), weight.requires_grad)
            if held[key] > 1:
                made[key] = weight, wide
            one._parameters[name] = wide
