"""What is spread over processes: what each has of its packed tensors, and whole again.

Packed rows lie four to a byte, a quarter of the matrix apart: a process's rows are cut out as codes
and packed again, once, after loading. Columns are plain slices, and so are some of the experts. A
deployed part is a smaller layer in every respect, so that whatever looks at a layer finds one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bitcore.across import Group
from bitcore.errors import LifecycleError
from bitcore.packing import pack_codes, unpack_ternary
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import Found, quantized_layers
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts
from bitlayers.state import LayerState

_FIELD = "bitlab_part"


@dataclass
class Part:
    """Which part of a layer, or of its experts, this process has.

    Attributes:
        dim: 0 for some of the rows of the matrix, 1 for some of its columns; 0 of experts.
        group: The process group that shares the layer.
        whole: Shapes of the whole layer's tensors, once it is cut.
    """

    dim: int
    group: Any
    whole: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def rank(self) -> int:
        """Which of the parts this is."""
        return dist.get_rank(self.group)

    @property
    def count(self) -> int:
        """How many parts there are."""
        return dist.get_world_size(self.group)

    def range(self, size: int) -> slice:
        """Returns this part of so many rows, columns or experts."""
        own = size // self.count
        return slice(self.rank * own, (self.rank + 1) * own)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Returns a tensor of every process, in order."""
        tensor = tensor.detach().contiguous()
        parts = [torch.empty_like(tensor) for _ in range(self.count)]
        dist.all_gather(parts, tensor, group=self.group)
        return parts

    def reductions(self) -> Group:
        """Returns what the processes do together to compute one layer."""

        def reducing(operation: Any) -> Callable[[Tensor], None]:
            def run(tensor: Tensor) -> None:
                dist.all_reduce(tensor, operation, self.group)

            return run

        return Group(reducing(dist.ReduceOp.MAX), reducing(dist.ReduceOp.SUM))


def part_of(module: nn.Module) -> Part | None:
    """Returns which part of itself a layer is in this process; None of a whole one."""
    part: Part | None = vars(module).get(_FIELD)
    return part


def set_part(module: BitLayerBase | BitExperts, part: Part) -> None:
    """Says that a layer or experts are spread over processes."""
    vars(module)[_FIELD] = part


def parts(model: nn.Module) -> list[Found[Any]]:
    """Returns the layers and experts of a model that are spread over processes."""
    found: list[Found[Any]] = [*quantized_layers(model), *expert_modules(model)]
    return [one for one in found if part_of(one.module) is not None]


def whole_shapes(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that tensors of deployed parts have where they are whole, by name."""
    shapes: dict[str, tuple[int, ...]] = {}
    for found in parts(model):
        part = part_of(found.module)
        assert part is not None
        shapes |= {
            f"{name}.{leaf}": part.whole[leaf] for name in found.names for leaf in part.whole
        }
    return shapes


def shares(module: nn.Module) -> int:
    """Returns in how many parts of this module's size the whole is; 1 of a whole one."""
    part = part_of(module)
    return part.count if part is not None and part.whole else 1


def packed_shapes(
    module: LayerState | BitExperts,
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Returns dtype and shape that each packed tensor has where it is whole, by its name within
    the module.
    """
    part = part_of(module)
    whole = {} if part is None else part.whole
    held = module.packed_tensors()
    return {leaf: (dtype, whole.get(leaf, shape)) for leaf, (dtype, shape) in held.items()}


def save_tied_once(model: PreTrainedModel) -> None:
    """Keeps a tied Parameter in shards from being saved under both of its names: gathered, it is
    two tensors to transformers.
    """
    if (model.tp_size or 1) == 1:
        return
    again = {
        target
        for target, source in (model.all_tied_weights_keys or {}).items()
        if isinstance(held := model.get_parameter_or_buffer(target), DTensor)
        and held is model.get_parameter_or_buffer(source)
    }
    attributes: Any = model
    if again:
        attributes._keys_to_ignore_on_save = {*(model._keys_to_ignore_on_save or ()), *again}


def check_whole(op: str, model: nn.Module) -> None:
    """Checks that no layer and no experts are spread over processes.

    Raises:
        LifecycleError: Some are.
    """
    found = parts(model)
    if found:
        raise LifecycleError(
            f"{op}: model must be whole in one process, got {found[0].names[0]} in parts "
            "(tensor or expert parallel)\nSave it, and load the folder in one process."
        )


def cut(layer: BitLayerBase) -> None:
    """Makes a deployed layer, whole so far, the part that this process has."""
    part = part_of(layer)
    if part is None:
        return
    qweight, scale, *multipliers = layer.packed()
    part.whole = {leaf: shape for leaf, (_, shape) in layer.packed_tensors().items()}
    rows = layer.out_features
    if part.dim == 0:
        own = part.range(rows)
        codes = unpack_ternary(qweight.detach(), rows)[own]
        layer.out_features = len(codes)
        if layer.bias is not None:
            part.whole["bias"] = tuple(layer.bias.shape)
            layer.bias = nn.Parameter(layer.bias.detach()[own].clone(), requires_grad=False)
        scale = scale if len(scale) != rows else scale[own].clone()
        packed = pack_codes(codes)
        multipliers = [one[own].clone() for one in multipliers]
    else:
        own = part.range(layer.in_features)
        packed = qweight.detach()[:, own].contiguous()
        layer.in_features = packed.shape[1]
        if scale.dim() == 2:
            scale = scale[:, part.range(scale.shape[1])].contiguous()
        multipliers = [one[:, part.range(one.shape[1])].contiguous() for one in multipliers]
    layer.commit_packed(packed, scale, *multipliers)


def cut_experts(experts: BitExperts) -> None:
    """Makes deployed experts, all there so far, those that this process has."""
    part = part_of(experts)
    if part is None:
        return
    for name, stack in experts.stacks.items():
        own = part.range(stack.experts)
        held = experts.packed_stack(name)
        part.whole |= {f"{name}_{leaf}": tuple(tensor.shape) for leaf, tensor in held.items()}
        experts.stacks[name] = replace(stack, experts=experts.num_experts)
        experts.commit(name, *(tensor.detach()[own].clone() for tensor in held.values()))
        bias = experts._parameters.get(f"{name}_bias")
        if bias is not None:
            part.whole[f"{name}_bias"] = tuple(bias.shape)
            own_bias = nn.Parameter(bias.detach()[own].clone(), requires_grad=False)
            experts._parameters[f"{name}_bias"] = own_bias


def gathered(layer: BitLayerBase | BitExperts) -> dict[str, Tensor]:
    """Returns deployed tensors as the whole layer, or all experts, have them; all processes must
    call it.

    Args:
        layer: A part, as `cut` or `cut_experts` made it.
    """
    part = part_of(layer)
    assert part is not None
    found: dict[str, Tensor] = {}
    for leaf, tensor in layer.state_dict().items():
        if tuple(tensor.shape) == part.whole.get(leaf, tuple(tensor.shape)):
            continue
        pieces = part.gather(tensor)
        if leaf == "qweight" and part.dim == 0:
            codes = [unpack_ternary(piece, layer.out_features) for piece in pieces]
            found[leaf] = pack_codes(torch.cat(codes))
        else:
            found[leaf] = torch.cat(pieces, part.dim)
    return found
