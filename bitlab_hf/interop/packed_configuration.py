"""What a deployed model's configuration says of matrices that were found to be ternary."""

from __future__ import annotations

from collections import Counter

from torch import nn
from transformers import PreTrainedModel

from bitlab_hf.config import BitLabConfig
from bitlab_hf.interop.structure import Structure
from bitlab_hf.model.embedding import find_embedding, swap_embeddings
from bitlab_hf.model.experts import find_experts, projections
from bitlab_hf.model.replace import find_linears, swap_packed
from bitlab_hf.model.rows import Rows


def packed_configuration(
    model: PreTrainedModel,
    names: dict[str, str],
    structures: dict[str, Structure],
    group_scale_dtype: str,
    activation_dtype: str = "float32",
    experts: dict[str, list[str]] | None = None,
    embedding: Rows | None = None,
) -> BitLabConfig:
    """Returns the configuration: the commonest scheme, and overrides for the others.

    Args:
        model: The skeleton.
        names: The model's name of each linear layer, and of the embedding, by the file's key.
        structures: Structure of each matrix that is packed, by the file's key.
        group_scale_dtype: See `BitLabConfig`.
        activation_dtype: See `BitLabConfig`.
        experts: By a module of experts, the names of its tensors, which are the file's keys too.
        embedding: The input embedding with what is tied to it, ternary if its owner is packed.
    """
    packed = {names.get(key, key): structure for key, structure in structures.items()}
    has_embedding = embedding is not None and embedding.owner in packed
    if embedding is not None and has_embedding:
        packed |= {found.names[0]: packed[embedding.owner] for found in embedding.members}
    ternary = {module for module, keys in (experts or {}).items() if packed.keys() >= {*keys}}
    base = Counter((s.scheme, s.group_size) for s in packed.values()).most_common(1)[0][0]
    head = model.get_output_embeddings()
    modules = dict(model.named_modules())
    return BitLabConfig(
        weight_format="packed",
        activation_dtype=activation_dtype,
        weight_granularity=str(base[0]),
        group_size=base[1],
        group_scale_dtype=group_scale_dtype,
        overrides={
            name: {"weight_granularity": s.scheme, "group_size": s.group_size}
            for name, s in packed.items()
            if (s.scheme, s.group_size) != base
        },
        head="ternary" if any(modules.get(name) is head for name in packed) else "keep",
        embedding="ternary" if has_embedding else "keep",
        experts="ternary" if ternary else None,
        modules_to_not_convert=sorted(
            name
            for name, module in modules.items()
            if name not in packed
            and (isinstance(module, nn.Linear) or name in (experts or {}).keys() - ternary)
        ),
    )


def experts_of(model: PreTrainedModel) -> dict[str, list[str]]:
    """Returns the names of the tensors of each module of experts that can be ternary."""
    return {
        found.names[0]: [f"{found.names[0]}.{leaf}" for leaf in projections(found.module)]
        for found in find_experts(model, [])
    }


def swap_skeleton(model: PreTrainedModel, config: BitLabConfig) -> None:
    """Makes a skeleton the deployed model of a configuration, without values."""
    skip = config.modules_to_not_convert or []
    experts = find_experts(model, skip) if config.experts == "ternary" else []
    embedding = find_embedding(model) if config.embedding == "ternary" else None
    swap_packed(model, find_linears(model, skip), config, experts=experts)
    if embedding is not None:
        swap_embeddings(model, embedding, config)
        # One tensor for all, as in the loaded model.
        owner = model.get_submodule(embedding.owner)
        for module in map(model.get_submodule, embedding.names):
            module.qweight = owner.qweight
            module._buffers.update(owner._buffers)
