"""What the matrices of experts are called in a compressed-tensors checkpoint.

A file has each expert's gate, up and down projections apart, under the names that the
architecture's own files give them. transformers knows these, and joins what it has unpacked.
"""

from __future__ import annotations

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    rename_source_key,
)


def names_of(model: PreTrainedModel, key: str) -> list[str]:
    """Returns what a file calls the matrices that lie one above the other in a tensor of experts.

    Args:
        model: The model, or its skeleton.
        key: The tensor's name, such as ``model.layers.0.mlp.experts.gate_up_proj``.

    Returns:
        A name for each, with ``{}`` for the expert's number; none where files of the architecture
        do not have them so.
    """
    for converter in get_model_conversion_mapping(model, add_legacy=False):
        if not isinstance(converter, WeightConverter):
            continue
        target = converter._original_target_patterns[0]
        kinds = [type(operation) for operation in converter.operations]
        whole = kinds in ([MergeModulelist], [MergeModulelist, Concatenate])
        if not whole or not key.endswith(target):
            continue
        sources = [source.removesuffix(".weight") for source in converter._original_source_patterns]
        base = key.removesuffix(target)
        return [base + source.replace("*", "{}") for source in sources]
    return []


def model_names(model: PreTrainedModel, keys: list[str]) -> dict[str, str]:
    """Returns by the keys of a file what they are called where the model's names begin as its own,
    such as ``mlp`` for Mixtral's ``block_sparse_moe``.

    Args:
        model: The skeleton.
        keys: The keys.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [item for item in mapping if isinstance(item, WeightRenaming)]
    return {key: rename_source_key(key, renamings, [])[0] for key in keys}
