"""The output head in int8, with what is tied to it: found, checked, swapped, tied again.

transformers ties parameters by name (``_tied_weights_keys``, ``all_tied_weights_keys``); once the
weights are gone, the same pairs are named after ``qweight`` and ``qweight_scale``, so that loading,
saving, device maps and ``tie_weights()`` go on as they do for float weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitcore.errors import ConfigError, NonFiniteError
from bitcore.quantize import quantize_rows_int8
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.rows import (
    Rows,
    check_supported,
    embedding_factor,
    find_rows,
    float_embedding,
    stored_elsewhere,
)
from bitlab_hf.model.tree import Found, find_modules, set_module, take_hooks
from bitlab_hf.model.vocabulary import guard_vocabulary
from bitlayers.checks import check_whole
from bitlayers.int8 import Int8Embedding, Int8Linear, Int8Rows

_LEAVES = ("qweight", "qweight_scale")
# Who asks for rows, and what to do where there are none to be had, for messages.
INT8_HEAD = ('head="int8"', 'Use head="keep".')
# Where `replace_linear` leaves the choice of the head for `deploy`.
HEAD_ATTRIBUTE = "_bitlab_head"


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


def finish(model: PreTrainedModel, rows: Rows) -> None:
    """After the tensors are there: ties all members, here and in what transformers will tie."""
    owner = rows.members[0].module
    assert isinstance(owner, Int8Rows)
    for found in rows.members:
        module = found.module
        assert isinstance(module, Int8Rows)
        module.commit(owner.qweight, owner.qweight_scale)
        module.qweight.requires_grad_(False)
        if isinstance(module, Int8Linear) and module.bias is not None:
            module.bias.requires_grad_(False)
    for prefix, tied in rows.tied.items():
        part: Any = model.get_submodule(prefix)
        names = [name.removeprefix(f"{prefix}.") if prefix else name for name in rows.names]
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

    def commit(self, model: PreTrainedModel) -> None:
        """Swaps the members."""
        swap_quantized(model, self.rows, self.qweight, self.scale)
        finish(model, self.rows)


def plan_head(model: nn.Module) -> Plan | None:
    """Quantizes the head of a model beside it, if its configuration says so; changes nothing.

    Returns:
        What to commit; None where the head stays as it is, or there is none.

    Raises:
        ConfigError: The head has no int8 form.
        LifecycleError: Its weight is sharded, or on the meta device.
        NonFiniteError: It holds NaN or infinity.
    """
    if not isinstance(model, PreTrainedModel):
        return None
    config = getattr(model.config, "quantization_config", None)
    choice = config.head if isinstance(config, BitLabConfig) else None
    if (choice or getattr(model, HEAD_ATTRIBUTE, "keep")) != "int8":
        return None
    if isinstance(model.get_output_embeddings(), Int8Linear):
        return None
    rows = find_head(model)
    if rows is None:
        return None
    name = f"{rows.owner}.weight"
    for found in rows.members:
        check_whole(found.module, f"{found.names[0]}.weight")
    qweight, scale = quantize_rows_int8(rows.tensor)
    if not bool(torch.isfinite(scale).all()):
        raise NonFiniteError(f"deploy: {name} must be finite, got NaN or infinity; nothing changed")
    return Plan(rows, qweight, scale)


# What a model with int8 modules says about them.


def int8_modules(model: nn.Module) -> list[Found[Int8Rows]]:
    """Returns the int8 modules of a model, each once."""
    return find_modules(model, Int8Rows)


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
