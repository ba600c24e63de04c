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
from bitlab_hf.checkpoint.headers import Checkpoint, TensorHeader, check_floats, with_tied
from bitlab_hf.checkpoint.int8 import head_rows, stored_layers, stored_vocabulary
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.embedding import find_embedding
from bitlab_hf.model.experts import projections
from bitlab_hf.model.int8 import claim_int8, layer_rows, named_int8
from bitlab_hf.model.left import leave_float, note_float, note_new
from bitlab_hf.model.replace import find_linears, skipped_modules
from bitlab_hf.model.rows import Rows
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
        int8: What becomes int8: an output head with what is tied to it, an embedding, and linear
            layers that the configuration names.
        embedding: The input embedding with what is tied to it, where the files hold it ternary; a
            head among it is one of the layers, too.
        stored_apart: Layers that the model ties to another and the files hold all the same.
        borrowers: By a layer that the files do not hold, the one that it is tied to.
    """

    config: BitLabConfig
    source: Source
    checkpoint: Checkpoint | None
    layers: list[Found[nn.Linear]] = field(default_factory=list)
    experts: list[Found[nn.Module]] = field(default_factory=list)
    int8: list[Rows] = field(default_factory=list)
    embedding: Rows | None = None
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
        config: How it is to be made ternary; its lists of modules to leave alone, and of layers
            that are int8, are resolved.
        checkpoint: What the files hold, or None.
        source: What is loaded.

    Raises:
        CheckpointError: The files do not hold what the configuration says.
        ConfigError: What is asked of the output head, or of the layers that are to be int8, is not
            to be had.
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
    int8: list[Found[nn.Linear]] = []
    named: list[str] = []
    if source.was_converted:
        found, int8 = named_int8(model, found, config.int8_layers)
    else:
        left = leave_float(model, found, config)
        found = [layer for layer in found if layer not in left]
        named += [name for layer in left for name in layer.names]
    plan.experts, lost = plan_experts(
        model, config, skip, known, source.was_converted, source.is_packed
    )
    named += lost
    config.experts = "ternary" if plan.experts else None
    if known is not None and config.embedding == "ternary":
        plan.embedding = _stored_embedding(model, known)
        config.embedding = "keep" if plan.embedding is None else "ternary"
    if known is not None:
        if source.was_converted:
            _check_format(known, source.is_packed, found)
        if source.is_packed:
            known = _with_tied_layers(model, plan, known, found)
            plan.checkpoint = known = _with_tied_experts(model, plan, known)
        found, lacking = _split_by_presence(found, known, source)
        if not source.is_packed:
            int8, others = _split_by_presence(int8, known, source)
            lacking += others
        named += [name for layer in lacking for name in layer.names]
        if not source.was_converted:
            note_new(lacking)
    if not source.was_converted:
        found, int8 = claim_int8(model, found, config)
        alone = [*(config.modules_to_not_convert or []), *named]
        note_float(model, [*found, *int8], alone, plan.experts)
    plan.layers = found
    config.modules_to_not_convert = sorted({*skip, *named})
    if config.head == "ternary":
        _check_ternary_head(model, plan)
    if source.is_packed:
        assert known is not None
        layers = stored_layers(model, known, int8)
        plan.int8 = [*stored_vocabulary(model, known, config), *layers]
        _check_all_claimed(model, plan)
    else:
        layers = layer_rows(model, int8)
        head = head_rows(model, config, source.was_converted)
        if source.builds_packed:
            plan.int8 = [*([] if head is None else [head]), *layers]
    config.int8_layers = sorted(name for rows in layers for name in rows.names)
    return plan


def _stored_embedding(model: PreTrainedModel, known: Checkpoint) -> Rows | None:
    """Returns the input embedding, with what is tied to it, of a file that holds it ternary; None
    of a model that has none.
    """
    rows = find_embedding(model)
    if rows is not None and "qweight" not in known.leaves(rows.names):
        raise CheckpointError(
            f"{rows.owner}.qweight must be in the checkpoint, got none\n"
            "The checkpoint is incomplete; fetch or write it again."
        )
    return rows


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
    layers |= set(plan.embedding.names) if plan.embedding else set()
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
        if plan.source.is_packed and type(head) is nn.Linear:
            name = next(name for name, module in model.named_modules() if module is head)
            raise CheckpointError(
                f'{name}.qweight must be in the checkpoint for head="ternary", got none\n'
                "config.json and the tensors do not belong together."
            )
        raise ConfigError(
            'bitlab: head="ternary" must find an output head that is an nn.Linear, got '
            f"{type(head).__name__}"
        )
    names = {f"{name}.weight" for layer in plan.layers for name in layer.names}
    embedding = {f"{name}.weight" for name, _ in model.named_modules()} - names
    if plan.embedding is not None:
        # It is as ternary as the head.
        embedding -= {f"{name}.weight" for name in plan.embedding.names}
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
    others = sorted(model.all_tied_weights_keys.keys() - names)
    if others:
        # One field ties all of them, and a packed head is tied to none.
        raise ConfigError(
            "bitlab: a ternary head must be all that tie_word_embeddings ties to the embedding, "
            f"got {others[0]} tied too\nPass head='keep' or head='int8'."
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
    claimed |= set(plan.embedding.names) if plan.embedding else set()
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
