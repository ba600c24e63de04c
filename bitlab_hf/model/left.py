"""What stays float although it is a linear layer: by rules that look at the model, each with its
reason.
"""

from __future__ import annotations

import fnmatch
import logging
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import ConfigError
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.reads import find_reads
from bitlab_hf.model.tree import Found, aliases_of, find_modules
from bitlayers.quantized import QuantizedModule

logger = logging.getLogger("bitlab")
_EXPERTS = re.compile("expert", re.IGNORECASE)
ROUTER = re.compile("rout|gating|topk", re.IGNORECASE)
# Linear weights that stay float without anybody having asked for it are worth a word from here on.
_NOTABLE_SHARE = 0.01


def leave_float(
    model: nn.Module, found: list[Found[nn.Linear]], config: BitLabConfig
) -> list[Found[nn.Linear]]:
    """Returns the linear layers that are not to be converted, and says why in a warning each.

    Args:
        model: The model, or its skeleton.
        found: The layers that would be converted.
        config: How they would be.
    """
    reasons = reasons_to_leave(model, found, config)
    for reason, layers in reasons.items():
        _say(logging.WARNING, _patterns([layer.names[0] for layer in layers]), reason)
    return [layer for layers in reasons.values() for layer in layers]


def reasons_to_leave(
    model: nn.Module, found: list[Found[nn.Linear]], config: BitLabConfig
) -> dict[str, list[Found[nn.Linear]]]:
    """Returns the linear layers that are not to be converted, by the reason.

    - A layer whose weight the model reads itself would not be ternary in training, and another one
      once packed; see `bitlab_hf.model.reads`.
    - Routers of experts, and the gate of a shared expert, decide by small differences.
    - A layer whose weight is computed from other tensors has none to convert.

    A router that a pattern of ``config.overrides`` names is converted.

    Args:
        model: The model, or its skeleton.
        found: The layers that would be converted.
        config: How they would be.
    """
    values, _ = find_reads(model)
    routers = _routers(model, found)
    reasons: dict[str, list[Found[nn.Linear]]] = {}
    for layer in found:
        names = [alias for name in layer.names for alias in aliases_of(model, name)]
        reason = None
        if values.intersection(layer.names):
            reason = "the model reads their weights itself"
        elif layer.names[0] in routers and not _named(names, config):
            reason = "they route tokens to experts"
        elif "weight" not in layer.module._parameters:
            reason = "their weights are computed from other tensors"
        if reason is not None:
            reasons.setdefault(reason, []).append(layer)
    left = {name for layers in reasons.values() for one in layers for name in one.names}
    while tied := [one for one in found if one.names[0] not in left and _tied_to(model, one, left)]:
        reasons.setdefault("they are tied to a layer that does", []).extend(tied)
        left |= {name for one in tied for name in one.names}
    return reasons


def _tied_to(model: nn.Module, layer: Found[nn.Linear], left: set[str]) -> bool:
    """Tells whether transformers ties a layer's weight to that of one that stays float."""
    pairs = getattr(model, "all_tied_weights_keys", None) or {}
    return any(
        {f"{name}.weight" for name in layer.names}.intersection(pair)
        and any(name.removesuffix(".weight") in left for name in pair)
        for pair in pairs.items()
    )


def note_new(layers: list[Found[nn.Linear]]) -> None:
    """Says which layers stay float because no file holds them: new task heads, as a rule."""
    _say(
        logging.INFO,
        _patterns([layer.names[0] for layer in layers]),
        "the checkpoint does not hold them: they are new",
    )


def _patterns(names: list[str]) -> list[str]:
    """Returns names with ``*`` for numbers, each once."""
    return sorted({re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in names})


def _say(level: int, patterns: list[str], reason: str) -> None:
    if patterns:
        logger.log(level, "bitlab: %s stay float, because %s", ", ".join(patterns), reason)


def _named(names: list[str], config: BitLabConfig) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in config.overrides)


def _routers(model: nn.Module, found: list[Found[nn.Linear]]) -> set[str]:
    """Returns the names of the linear layers that choose among experts.

    Beside the experts of a block stands what chooses among them: a layer with as many outputs as
    there are experts, or one output (the gate of a shared expert), or any within a module that is
    called a router.
    """
    blocks = [
        (f"{name}." if name else "", experts)
        for name, module in model.named_modules()
        if (experts := _experts_in(module))
    ]
    if not blocks:
        return set()
    counts = _expert_counts(getattr(model, "config", None)) | {1}
    modules = dict(model.named_modules())
    routers: set[str] = set()
    for layer in found:
        name = layer.names[0]
        for prefix, experts in blocks:
            inner = name.removeprefix(prefix)
            if not name.startswith(prefix) or inner.split(".")[0] in experts:
                continue
            within = [inner.rsplit(".", depth)[0] for depth in range(inner.count(".") + 1)]
            classes = [type(modules[prefix + part]).__name__ for part in within if part]
            called = any(map(ROUTER.search, [*classes, *inner.split(".")]))
            beside = inner.count(".") < 2 and layer.module.out_features in counts
            if called or beside:
                routers.add(name)
    return routers


def _experts_in(block: nn.Module) -> list[str]:
    """Returns the names of a block's children that hold experts."""
    return [
        name
        for name, child in block.named_children()
        if not isinstance(child, nn.Linear)
        and _EXPERTS.search(f"{name} {type(child).__name__}")
        and not ROUTER.search(type(child).__name__)
    ]


def _expert_counts(config: Any) -> set[int]:
    """Returns the numbers of experts that a configuration, or one within it, speaks of."""
    if config is None:
        return set()
    fields = vars(config)
    counts = {
        value
        for name, value in fields.items()
        if "expert" in name and isinstance(value, int) and value > 1 and "per_tok" not in name
    }
    inner = [value for value in fields.values() if hasattr(value, "model_type")]
    return counts.union(*(_expert_counts(one) for one in inner))


def check_found(
    model: nn.Module, linears: list[Found[nn.Linear]], converted: Sequence[Found[nn.Module]]
) -> None:
    """Raises if there is nothing to convert; warns if experts stay float.

    Args:
        model: The model, or its skeleton.
        linears: The linear layers that become ternary.
        converted: The experts modules that do.

    Raises:
        ConfigError: No linear layer is left to convert; the message says what there is.
    """
    ternary = {id(found.module) for found in converted}
    experts = [
        (name, parameter)
        for name, parameter in _expert_tensors(model)
        if id(model.get_submodule(name.rpartition(".")[0])) not in ternary
    ]
    if not linears and not converted:
        kinds = Counter(type(m).__name__ for m in model.modules() if not list(m.children()))
        listed = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common(6))
        others = sorted(
            {
                type(module).__name__
                for module in model.modules()
                if type(module).__name__ == "Conv1D"
                or (isinstance(module, nn.Linear) and type(module) is not nn.Linear)
            }
        )
        found = f"; {', '.join(others)} is no plain nn.Linear" if others else ""
        found += f"; {len(experts)} tensors of experts" if experts else ""
        raise ConfigError(
            "bitlab: the model must hold nn.Linear layers that are not skipped, got none among "
            f"{listed}{found}\nOnly plain nn.Linear layers are converted; modules_to_not_convert "
            "says what is skipped."
        )
    if experts:
        total = sum(parameter.numel() for parameter in model.parameters())
        share = sum(parameter.numel() for _, parameter in experts) / total
        logger.warning(
            "bitlab: %d expert tensors such as %s, %.0f %% of the weights, stay float",
            len(experts),
            experts[0][0],
            100 * share,
        )


def _expert_tensors(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Returns the matrices of experts that are Parameters of their own, no layer's weight."""
    layers = (nn.Linear, nn.Embedding, nn.modules.conv._ConvNd, QuantizedModule)
    return [
        (f"{name}.{leaf}", parameter)
        for name, module in model.named_modules()
        if not isinstance(module, layers)
        and _EXPERTS.search(f"{name} {type(module).__name__}")
        and not ROUTER.search(type(module).__name__)
        for leaf, parameter in module.named_parameters(recurse=False)
        if parameter.dim() >= 2
    ]


def note_float(
    model: PreTrainedModel,
    converted: list[Found[nn.Linear]],
    named: list[str],
    experts: Sequence[Found[nn.Module]],
) -> None:
    """Says what else stays float: as a warning where it is much of the linear weights.

    Args:
        model: The model before its layers are swapped.
        converted: The layers that will be.
        named: What the user, or a rule with a warning of its own, left alone.
        experts: The experts modules that become ternary, whose weights count as linear ones.
    """
    done = {id(layer.module) for layer in converted}
    head = model.get_output_embeddings()
    total = sum(p.numel() for one in experts for p in one.module.parameters(recurse=False))
    left_size = 0
    plain: list[str] = []
    others: dict[str, list[str]] = {}
    for found in find_modules(model, nn.Module):
        module, name = found.module, found.names[0]
        if not isinstance(module, nn.Linear) and type(module).__name__ != "Conv1D":
            continue
        size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
        total += size
        if id(module) in done or module is head or set(found.names).intersection(named):
            continue
        left_size += size
        if type(module) is nn.Linear:
            plain.append(name)
        else:
            others.setdefault(type(module).__name__, []).append(name)
    share = left_size / max(1, total)
    level = logging.WARNING if share >= _NOTABLE_SHARE else logging.INFO
    whole = f"(together {100 * share:.0f} % of the linear weights)"
    _say(level, _patterns(plain), f"transformers leaves them out by default {whole}")
    for kind, names in others.items():
        _say(level, _patterns(names), f"a {kind} is no plain nn.Linear {whole}")
