"""The ternary matrices of a model as other formats have them: that of a layer or an embedding, or
those of all experts.

GGUF and compressed-tensors keep the gate and the up projections of experts apart, where
transformers has one tensor for both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from torch import Tensor, nn

from bitcore import unpack_ternary
from bitcore.quantize import group_scale
from bitlab_hf.model.embedding import ternary_embeddings
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import ternary_modules
from bitlayers.embedding import TernaryEmbedding
from bitlayers.experts import BitExperts
from bitlayers.state import LayerState, Packed

_GATE_UP, _HALVES = "gate_up_proj", ("gate_proj", "up_proj")


@dataclass(frozen=True)
class Matrices:
    """Ternary matrices of one shape that are one tensor of the file.

    Attributes:
        key: The name of the weight, with gate and up apart.
        out_features: N.
        in_features: K.
        group_size: Inputs that share a scale, or None for whole rows.
        experts: How many there are; None for the one of a layer or an embedding.
        read: Gives the codes of one, int8 [N, K], and what they are multiplied with, float32 [1],
            [N] or [N, K / G].
        tensor: The name of the model's tensor that they are in.
        part: Which of the logical matrices there they are.
    """

    key: str
    out_features: int
    in_features: int
    group_size: int | None
    experts: int | None
    read: Callable[[int], tuple[Tensor, Tensor]]
    tensor: str
    part: int = 0

    @property
    def name(self) -> str:
        """What messages call them."""
        return self.key.removesuffix(".weight")

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the file's tensor: [N, K] or [E, N, K]."""
        sizes = self.out_features, self.in_features
        return sizes if self.experts is None else (self.experts, *sizes)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields what `read` gives for each."""
        return map(self.read, range(self.experts or 1))


def matrices_of(model: nn.Module) -> list[Matrices]:
    """Returns the ternary matrices of a model's embedding, layers and experts; a head that is tied
    to the embedding has none of its own.
    """
    held = {id(found.module.qweight) for found in ternary_embeddings(model)}
    modules = [
        _of_module(found.names[0], found.module)
        for found in ternary_modules(model)
        if isinstance(found.module, TernaryEmbedding)
        or id(found.module._parameters.get("qweight")) not in held
    ]
    return modules + expert_matrices(model)


def expert_matrices(model: nn.Module) -> list[Matrices]:
    """Returns the ternary matrices of a model's experts."""
    return [
        matrices
        for found in expert_modules(model)
        for matrices in _of_experts(found.names[0], found.module)
    ]


def apart(key: str, tensor: Tensor) -> list[tuple[str, Tensor]]:
    """Returns a float tensor under its name, or the two that the file has of experts' gate and up.

    Args:
        key: Its name.
        tensor: It; of gate and up [E, 2N, K].
    """
    if not key.endswith(f".{_GATE_UP}"):
        return [(key, tensor)]
    base = key.removesuffix(_GATE_UP)
    return [
        (f"{base}{half}", part)
        for half, part in zip(_HALVES, tensor.chunk(2, dim=1), strict=True)
    ]  # fmt: skip


def _of_module(name: str, layer: LayerState) -> Matrices:
    rows = layer.out_features
    return Matrices(
        f"{name}.weight",
        rows,
        layer.in_features,
        layer.quant_config.group_size,
        None,
        lambda _: _unpacked(layer.packed(), slice(0, rows), rows),
        f"{name}.weight",
    )


def _of_experts(name: str, module: BitExperts) -> Iterator[Matrices]:
    for leaf, stack in module.stacks.items():
        halves = _HALVES if leaf == _GATE_UP else (leaf,)
        rows = stack.out_features // len(halves)
        for place, half in enumerate(halves):
            part = slice(place * rows, (place + 1) * rows)
            read = partial(_of_expert, module, leaf, part)
            size = stack.config.group_size
            yield Matrices(
                f"{name}.{half}.weight", rows, stack.in_features, size, stack.experts, read,
                f"{name}.{leaf}", place,
            )  # fmt: skip


def _of_expert(module: BitExperts, leaf: str, rows: slice, expert: int) -> tuple[Tensor, Tensor]:
    return _unpacked(module.packed(leaf, expert), rows, module.stacks[leaf].out_features)


def _unpacked(packed: Packed, rows: slice, out_features: int) -> tuple[Tensor, Tensor]:
    """Returns codes and scales of some rows of a packed matrix."""
    qweight, scale, *multiplier = (tensor.detach().cpu() for tensor in packed)
    scale = group_scale(scale, multiplier[0]) if multiplier else scale
    return unpack_ternary(qweight, out_features)[rows], scale if len(scale) == 1 else scale[rows]
