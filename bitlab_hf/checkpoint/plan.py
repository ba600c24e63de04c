"""The plan of a load: what each module becomes, from which tensors, and what is refused.

It is made once, from three things: the headers of the files, the model's skeleton, and the
configuration. `bitlab_hf.checkpoint.loading` then swaps, loads or packs, and finishes, each going
down the plan; nothing is asked of the files anew.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import CheckpointError, ConfigError
from bitlab_hf.checkpoint.experts import check_claimed, plan_experts
from bitlab_hf.checkpoint.headers import (
    FLOATS,
    Checkpoint,
    TensorHeader,
    check_floats,
    check_headers,
    check_no_multiplier,
    with_tied,
)
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import projections
from bitlab_hf.model.head import Rows, check_supported, find_head, find_rows, input_embeddings
from bitlab_hf.model.left import leave_float, note_float, note_new
from bitlab_hf.model.replace import find_linears, skipped_modules
from bitlab_hf.model.tree import Found
from bitlayers.state import SCALES


@dataclass(frozen=True)
class Source:
    """What is loaded, and what it is to become.

    Attributes:
        was_converted: Whether BitLab wrote the configuration.
        is_packed: Whether the files hold packed weights.
        builds_packed: Whether the model will: such files do, others if they are packed at load.
    """

    was_converted: bool
    is_packed: bool
    builds_packed: bool


@dataclass
class Plan:
    """What is to become of a skeleton.

    Attributes:
        config: The configuration, its list of modules left alone resolved.
        source: What is loaded.
        checkpoint: What the files hold, a tied tensor under each of its names; None where there
            are no safetensors files.
        layers: The linear layers that become ternary ones.
        experts: The modules of experts that become ternary.
        int8: What becomes int8: an output head with what is tied to it, and an embedding.
        stored_apart: Layers that the model ties to another and the files hold all the same.
        borrowers: By a layer that the files do not hold, the one that it is tied to.
    """

    config: BitLabConfig
    source: Source
    checkpoint: Checkpoint | None
    layers: list[Found[nn.Linear]] = field(default_factory=list)
    experts: list[Found[nn.Module]] = field(default_factory=list)
    int8: list[Rows] = field(default_factory=list)
    stored_apart: list[str] = field(default_factory=list)
    borrowers: dict[str, str] = field(default_factory=dict)

    def stored(self, names: list[str]) -> dict[str, TensorHeader]:
        """Returns what the files hold of a module, by the names of its tensors within it."""
        return {} if self.checkpoint is None else self.checkpoint.leaves(names)


def make_plan(
    model: PreTrainedModel, config: BitLabConfig, checkpoint: Checkpoint | None, source: Source
) -> Plan:
    """Plans a load; the skeleton stays as it is.

    Args:
        model: The skeleton.
        config: How it is to be made ternary; its list of modules to leave alone is resolved.
        checkpoint: What the files hold, or None.
        source: What is loaded.

    Raises:
        CheckpointError: The files do not hold what the configuration says.
        ConfigError: What is asked of the output head is not to be had.
    """
    if checkpoint is None and source.is_packed:
        raise CheckpointError(
            "bitlab: a deployed checkpoint must be read from its safetensors files, got a "
            "state dict or other files"
        )
    known = None if checkpoint is None else with_tied(checkpoint, model)
    if checkpoint is not None:
        check_floats(model, checkpoint.tensors)
    plan = Plan(config, source, known)
    skip = skipped_modules(model, config, defaults=not source.was_converted)
    found = find_linears(model, skip)
    named: list[str] = []
    if not source.was_converted:
        left = leave_float(model, found, config)
        found = [layer for layer in found if layer not in left]
        named += [name for layer in left for name in layer.names]
    plan.experts, lost = plan_experts(
        model, config, skip, known, source.was_converted, source.is_packed
    )
    named += lost
    config.experts = "ternary" if plan.experts else None
    if known is not None:
        if source.was_converted:
            _check_format(known, source.is_packed, found)
        if source.is_packed:
            known = _with_tied_layers(model, plan, known, found)
            plan.checkpoint = known = _with_tied_experts(model, plan, known)
        found, lacking = _split_by_presence(found, known, source)
        named += [name for layer in lacking for name in layer.names]
        if not source.was_converted:
            note_new(lacking)
    if not source.was_converted:
        alone = [*(config.modules_to_not_convert or []), *named]
        note_float(model, found, alone, plan.experts)
    plan.layers = found
    config.modules_to_not_convert = sorted({*skip, *named})
    if config.head == "ternary":
        _check_ternary_head(model, plan)
    if source.is_packed:
        assert known is not None
        plan.int8 = _stored_int8(model, known, config)
        _check_all_claimed(model, plan)
    else:
        head = _int8_head(model, plan)
        if head is not None and source.builds_packed:
            plan.int8 = [head]
    return plan


def _check_format(known: Checkpoint, packed: bool, found: list[Found[nn.Linear]]) -> None:
    """Checks that ``weight_format`` in config.json is what the file holds."""
    leaves = {True: "qweight", False: "weight"}
    full = {name for name, header in known.tensors.items() if header.shape != (0,)}
    held = {
        kind: any(f"{name}.{leaf}" in full for layer in found for name in layer.names)
        for kind, leaf in leaves.items()
    }
    if not held[packed] and held[not packed]:
        says, holds = ("packed", "latent") if packed else ("latent", "packed")
        raise CheckpointError(
            f"bitlab: weight_format must be {holds!r} for these tensors, got {says!r}\n"
            "config.json and the tensors do not belong together."
        )


def _with_tied_layers(
    model: PreTrainedModel, plan: Plan, known: Checkpoint, found: list[Found[nn.Linear]]
) -> Checkpoint:
    """Counts what is stored of a packed layer as stored of those that are tied to it, too."""
    layers = {name for layer in found for name in layer.names}
    tensors = dict(known.tensors)
    for pair in model.all_tied_weights_keys.items():
        names = [name.removesuffix(".weight") for name in pair]
        if not layers.issuperset(names):
            continue
        stored = [known.leaves([name]) for name in names]
        if all("qweight" in leaves for leaves in stored):
            plan.stored_apart += names
            continue
        for name, owner, leaves in zip(names, reversed(names), reversed(stored), strict=True):
            if "qweight" in leaves:
                plan.borrowers[name] = owner
            for leaf in leaves.keys() - {"bias"}:
                tensors.setdefault(f"{name}.{leaf}", leaves[leaf])
    return replace(known, tensors=tensors)


def _with_tied_experts(model: PreTrainedModel, plan: Plan, known: Checkpoint) -> Checkpoint:
    """Counts what is stored of packed experts as stored of those that are tied to them, too."""
    ternary = {
        f"{name}.{leaf}"
        for found in plan.experts
        for name in found.names
        for leaf in projections(found.module)
    }
    tensors = dict(known.tensors)
    for pair in model.all_tied_weights_keys.items():
        if not ternary.issuperset(pair):
            continue
        stored = [f"{name}_qweight" in known.tensors for name in pair]
        if all(stored):
            plan.stored_apart += pair
            continue
        for name, owner, there in zip(pair, reversed(pair), reversed(stored), strict=True):
            if not there:
                continue
            plan.borrowers[name] = owner
            for end in ("qweight", *SCALES):
                if f"{owner}_{end}" in known.tensors:
                    tensors.setdefault(f"{name}_{end}", known.tensors[f"{owner}_{end}"])
    return replace(known, tensors=tensors)


def _split_by_presence(
    found: list[Found[nn.Linear]], known: Checkpoint, source: Source
) -> tuple[list[Found[nn.Linear]], list[Found[nn.Linear]]]:
    """Tells converted layers from layers that the files do not know (new task heads)."""
    leaf = "qweight" if source.is_packed else "weight"
    present: list[Found[nn.Linear]] = []
    lacking: list[Found[nn.Linear]] = []
    for layer in found:
        there = any(f"{name}.{leaf}" in known.tensors for name in layer.names)
        if not there and source.is_packed and (known.layers or set()).intersection(layer.names):
            # A layer that packed itself has tensors of other names.
            there = bool(known.leaves(layer.names))
        (present if there else lacking).append(layer)
    for layer in lacking:
        if known.layers is not None:
            expected = bool(known.layers.intersection(layer.names))
        else:
            # A new head stands alone; a lost layer leaves the rest of its block in the file.
            parent = layer.names[0].rpartition(".")[0]
            expected = (source.was_converted and parent != "") and any(
                name.startswith(f"{parent}.") for name in known.tensors
            )
        if expected:
            raise CheckpointError(
                f"{layer.names[0]}.{leaf} must be in the checkpoint, got none\n"
                "The checkpoint is incomplete; fetch or write it again."
            )
    return present, lacking


def _check_ternary_head(model: PreTrainedModel, plan: Plan) -> None:
    """Refuses heads that cannot be converted as asked, rather than leave them as they are."""
    head = model.get_output_embeddings()
    if head is None and plan.source.was_converted:
        # The base model of a file whose head is ternary.
        return
    if not any(layer.module is head for layer in plan.layers):
        raise ConfigError(
            'bitlab: head="ternary" must find an output head that is an nn.Linear, got '
            f"{type(head).__name__}"
        )
    names = {f"{name}.weight" for layer in plan.layers for name in layer.names}
    embedding = {f"{name}.weight" for name, _ in model.named_modules()} - names
    if not any(
        names.intersection(pair) and embedding.intersection(pair)
        for pair in model.all_tied_weights_keys.items()
    ):
        return
    if plan.source.is_packed:
        raise CheckpointError(
            "bitlab: a packed head must not be tied, got tie_word_embeddings=true\n"
            "config.json and the tensors do not belong together."
        )
    if plan.source.builds_packed:
        raise ConfigError(
            "bitlab: a tied head must not be packed at load, got one tied to the embedding\n"
            'Load it latent with head="ternary", then call deploy(model).'
        )
    held = head.weight.dtype
    if plan.config.latent_dtype == "float32" and held != torch.float32:
        raise ConfigError(
            f"bitlab: a tied ternary head must be float32 with the embedding, got {held}\n"
            'Pass dtype=torch.float32, or latent_dtype="keep".'
        )


def _int8_head(model: PreTrainedModel, plan: Plan) -> Rows | None:
    """Returns the head that is to be int8, refused early where it cannot be."""
    if plan.config.head != "int8":
        return None
    head = find_head(model)
    if head is None and not plan.source.was_converted:
        raise ConfigError(
            'bitlab: head="int8" must find an output head that is an nn.Linear, got none'
        )
    return head


def _stored_int8(model: PreTrainedModel, known: Checkpoint, config: BitLabConfig) -> list[Rows]:
    """Returns the output head, and the input embedding, where a deployed file holds them in int8.

    The header says which modules it holds so; a head that it does not list is a new one. A file
    whose header is lost is taken to hold what the configuration says.
    """
    if config.head != "int8":
        return []
    head = model.get_output_embeddings()
    result: list[Rows] = []
    for module in (head, input_embeddings(model)):
        if not isinstance(module, (nn.Linear, nn.Embedding)) or any(
            module is found.module for rows in result for found in rows.members
        ):
            continue
        rows = find_rows(model, module)
        held = {
            leaf: [name for name in rows.names if f"{name}.{leaf}" in known.tensors]
            for leaf in ("weight", "qweight", "qweight_scale")
        }
        if known.layers is not None:
            expected = bool(known.layers.intersection(rows.names))
        else:
            tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
            expected = not held["weight"] and (module is head or tied)
        if not expected and not held["qweight"]:
            continue
        check_supported(model, rows)
        _check_int8_headers(rows, known)
        result.append(rows)
    return result


def _check_int8_headers(rows: Rows, known: Checkpoint) -> None:
    owner, *borrowers = rows.members
    shape = tuple(rows.tensor.shape)
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("I8",), shape),
        "qweight_scale": (("F32",), shape[:1]),
    }
    if getattr(owner.module, "bias", None) is not None:
        wanted["bias"] = (FLOATS, shape[:1])
    check_headers(owner.names, wanted, known, 'head="int8"')
    check_no_multiplier(rows.names, known, 'head="int8"')
    for name in (name for found in borrowers for name in found.names):
        for leaf in ("weight", *wanted):
            if f"{name}.{leaf}" in known.tensors:
                raise CheckpointError(
                    f"{name}.{leaf} must not be in the checkpoint, got one, though {name} is tied "
                    f"to {rows.owner}\nconfig.json and the tensors do not belong together."
                )


def _check_all_claimed(model: PreTrainedModel, plan: Plan) -> None:
    """Checks that every packed tensor of the files belongs to a module that becomes packed.

    Parts that the model does not have, such as the head of a base model, are none of its business;
    but a tensor within a module that it has is one that would be initialized at random.
    """
    assert plan.checkpoint is not None
    modules = {name for name, _ in model.named_modules(remove_duplicate=False)}
    claimed = {name for layer in plan.layers for name in layer.names}
    claimed |= {name for rows in plan.int8 for name in rows.names}
    claimed |= {name for experts in plan.experts for name in experts.names}
    check_claimed(modules, claimed, plan.checkpoint)
    packed = {
        name.removesuffix(f".{leaf}"): leaf
        for leaf in ("qweight_multiplier", "qweight")
        for name in plan.checkpoint.tensors
        if name.endswith(f".{leaf}")
    }
    listed = plan.checkpoint.layers or set()
    held = packed.keys()
    for name in [*sorted(held - claimed), *sorted(listed - held - claimed)]:
        if name in modules:
            raise CheckpointError(
                f"{name} must not be in modules_to_not_convert, got one that is packed in the "
                "checkpoint\nconfig.json and the tensors do not belong together."
            )
        parent = name.rpartition(".")[0]
        if parent and parent in modules:
            raise CheckpointError(
                f"{name}.{packed.get(name, 'qweight')} must belong to a layer of the model, got "
                f"none of this name in {parent}\n"
                "config.json and the tensors do not belong together."
            )
