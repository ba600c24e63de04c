"""Experts in a checkpoint's files: which become ternary, and whether all of them are there."""

from __future__ import annotations

import re
from collections import Counter

from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import CheckpointError
from bitcore.estimators import get_estimator
from bitlab_hf.checkpoint.headers import FLOATS, Checkpoint, TensorHeader, check_headers
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.experts import experts_to_convert, find_experts, projections
from bitlab_hf.model.tree import Found
from bitlayers.experts import BitExperts

# Where the name of one expert's matrix has its number.
_NUMBER = re.compile(r"experts?\.(\d+)\.")


def plan_experts(
    model: PreTrainedModel,
    config: BitLabConfig,
    skip: list[str],
    known: Checkpoint | None,
    was_converted: bool,
    is_packed: bool,
) -> tuple[list[Found[nn.Module]], list[str]]:
    """Returns the experts modules that become ternary, and the names of those that the files do
    not know.

    Args:
        model: The skeleton.
        config: How the model is made ternary.
        skip: Patterns of modules to leave alone.
        known: What the files hold; None where that is not known.
        was_converted: Whether BitLab wrote the files.
        is_packed: Whether they hold packed weights.

    Raises:
        CheckpointError: An expert's tensor is missing, or has another shape than the others.
        ConfigError: See `experts_to_convert`.
    """
    if was_converted:
        found = find_experts(model, skip) if config.experts == "ternary" else []
    else:
        found = experts_to_convert(model, config, skip)
    if known is None or is_packed:
        # Packed tensors are checked where their shapes are known.
        return found, []
    lacking = [
        one
        for one in found
        if not was_converted
        and not any(_header(known, one, p) for p in projections(one.module))
        and not _is_lost(known, one)
    ]
    found = [one for one in found if one not in lacking]
    if was_converted:
        _keep_absmean(found, config, known)
    for one in found:
        for leaf in projections(one.module):
            _check_float(known, one, leaf)
    return found, [name for one in lacking for name in one.names]


def _keep_absmean(found: list[Found[nn.Module]], config: BitLabConfig, known: Checkpoint) -> None:
    """Makes a configuration say how experts without a learned scale in BitLab's files were trained:
    earlier releases gave all experts the scales of absmean beside layers with learned ones.
    """
    for owner, leaf in ((one.names[0], leaf) for one in found for leaf in projections(one.module)):
        name = f"{owner}.{leaf}"
        asked = config.layer_config(owner, name).weight_quantizer
        if get_estimator(asked).learned and f"{name}_learned_scale" not in known.tensors:
            before = config.overrides.get(name, {})
            config.overrides[name] = {**before, "weight_quantizer": "absmean"}


def _is_lost(known: Checkpoint, found: Found[nn.Module]) -> bool:
    """Tells whether the only tensor of a module is missing where the block around it is there."""
    if len(projections(found.module)) > 1:
        return False
    blocks = tuple(f"{name.rpartition('.')[0]}." for name in found.names if "." in name)
    return any(key.startswith(blocks) for key in known.tensors)


def _header(known: Checkpoint, found: Found[nn.Module], leaf: str) -> TensorHeader | None:
    held = (known.tensors.get(f"{name}.{leaf}") for name in found.names)
    return next((header for header in held if header is not None), None)


def _check_float(known: Checkpoint, found: Found[nn.Module], leaf: str) -> None:
    """Checks the float tensor of all experts, or the parts that it is put together from."""
    name, header = f"{found.names[0]}.{leaf}", _header(known, found, leaf)
    if header is None:
        raise CheckpointError(
            f"{name} must be in the checkpoint, got none\n"
            "The checkpoint is incomplete; fetch or write it again."
        )
    weight = found.module._parameters[leaf]
    assert weight is not None
    if header.dtype not in FLOATS or not (header.converted or header.shape == weight.shape):
        raise CheckpointError(
            f"{name} must be float32, bfloat16 or float16 {list(weight.shape)}, got "
            f"{header.dtype} {list(header.shape)}"
        )
    parts = [part for one in found.names for part in known.sources.get(f"{one}.{leaf}", [])]
    families: dict[str, dict[int, TensorHeader]] = {}
    for part in parts:
        number = _NUMBER.search(part.key)
        if number is not None:
            family = f"{part.key[: number.start(1)]}{{}}{part.key[number.end(1) :]}"
            families.setdefault(family, {})[int(number.group(1))] = part
    for family, experts in families.items():
        if max(experts) >= weight.shape[0]:
            # Numbered with those of another module, which transformers tells apart.
            continue
        usual = Counter(part.shape for part in experts.values()).most_common(1)[0][0]
        matrix = tuple(weight.shape[1:])
        if not _fits(usual, matrix, len(families)):
            raise CheckpointError(
                f"{family.format('*')} must be parts of {list(matrix)}, got {list(usual)}\n"
                "config.json and the tensors do not belong together."
            )
        for expert in range(weight.shape[0]):
            key, stored = family.format(expert), experts.get(expert)
            if stored is None:
                raise CheckpointError(
                    f"{key} must be in the checkpoint, got none of expert {expert}\n"
                    "The checkpoint is incomplete; fetch or write it again."
                )
            if stored.shape != usual or stored.dtype not in FLOATS:
                raise CheckpointError(
                    f"{key} must be float32, bfloat16 or float16 {list(usual)} as of the other "
                    f"experts, got {stored.dtype} {list(stored.shape)}"
                )


def _fits(stored: tuple[int, ...], matrix: tuple[int, ...], parts: int) -> bool:
    """Tells whether so many stored matrices can be an expert's one, whichever way they lie."""
    split = [
        sorted(size // parts if axis == at else size for axis, size in enumerate(matrix))
        for at in range(len(matrix))
        if matrix[at] % parts == 0
    ]
    return sorted(stored) in split


def check_packed_experts(found: Found[BitExperts], known: Checkpoint) -> None:
    """Checks the packed tensors of experts, and their biases, by the headers.

    Raises:
        CheckpointError: One is missing, or has another dtype or shape than its module.
    """
    for name, stack in found.module.stacks.items():
        wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
            f"{name}_{leaf}": (("U8" if str(dtype) == "torch.uint8" else "F32",), shape)
            for leaf, (dtype, shape) in stack.packed_tensors().items()
        }
        if found.module._parameters.get(f"{name}_bias") is not None:
            wanted[f"{name}_bias"] = (FLOATS, (stack.experts, stack.out_features))
        check_headers(found.names, wanted, known, f"{stack.config.granularity} experts")
        for one in found.names:
            extra = f"{one}.{name}_qweight_multiplier"
            if f"{name}_qweight_multiplier" not in wanted and extra in known.tensors:
                raise CheckpointError(
                    f"{extra} must not be in the checkpoint for {stack.config.granularity} "
                    "experts, got one\nconfig.json and the tensors do not belong together."
                )


def check_claimed(modules: set[str], claimed: set[str], known: Checkpoint) -> None:
    """Checks that all packed experts of the files belong to modules that become ternary.

    Raises:
        CheckpointError: Some do not: they would be initialized at random.
    """
    for name in sorted(known.tensors):
        module = name.rpartition(".")[0]
        if name.endswith("_qweight") and module in modules - claimed:
            raise CheckpointError(
                f"{module} must be ternary experts, got float ones for {name}\n"
                "config.json and the tensors do not belong together."
            )
