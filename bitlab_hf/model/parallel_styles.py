"""How layers run in tensor parallel: some rows of a matrix in each process, or some columns; and
which process has which experts.

Rows of the weight ("columns" of outputs, transformers' colwise) need the whole input and give part
of the output; columns of the weight (rowwise) have part of the input, and `bitcore.across` adds
up. The scales of a latent weight are those of the whole matrix, added up in the order of one
process, so that they have the same bits.

Importing this module registers the styles with transformers.
"""

from __future__ import annotations

from functools import partial, reduce
from operator import add
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from transformers import PreTrainedModel
from transformers.distributed.expert_parallel import MoEParamShard
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES
from transformers.distributed.tensor_parallel import ColwiseParallel, RowwiseParallel

from bitcore import ops
from bitcore.across import across_linear
from bitcore.config import BitQuantConfig
from bitcore.errors import LifecycleError
from bitcore.quantize import group_scale, lane_sums, mean_scale, total, two_levels
from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.parts import Part, part_of, set_part
from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts

# By whether layers are packed, and transformers' own style.
STYLES = {
    (False, "colwise"): "bitlab_colwise",
    (False, "rowwise"): "bitlab_rowwise",
    (True, "colwise"): "bitlab_packed_colwise",
    (True, "rowwise"): "bitlab_packed_rowwise",
}
# By whether they are packed.
EXPERT_STYLES = {False: "bitlab_experts", True: "bitlab_packed_experts"}


class _SumGradients(torch.autograd.Function):
    """The same in every process; its gradients, of which each has a part, are added up."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        whole = grads[0].clone(memory_format=torch.contiguous_format)
        dist.all_reduce(whole, group=ctx.group)
        return whole, None


def _local(tensor: Any) -> Any:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _chained_lanes(weight: Tensor, part: Part) -> Tensor:
    """The lanes of whole rows: each process goes on from the sums of the one before."""
    ranks = dist.get_process_group_ranks(part.group)
    lanes = None
    if part.rank > 0:
        lanes = weight.new_empty((weight.shape[0], 16), dtype=torch.float64)
        dist.recv(lanes, ranks[part.rank - 1], group=part.group)
    lanes = lane_sums(weight, lanes)
    if part.rank < part.count - 1:
        dist.send(lanes, ranks[part.rank + 1], group=part.group)
    dist.broadcast(lanes, ranks[-1], group=part.group)
    return lanes


@torch.no_grad()
def whole_scales(weight: Tensor, config: BitQuantConfig, part: Part) -> tuple[Tensor | None, ...]:
    """The step, scale and multipliers of a part of a latent weight, as one process has them.

    Args:
        weight: float [n, k], this process's rows or columns.
        config: How the layer is quantized.
        part: Which part it is.

    Returns:
        As `bitcore.ops.qat_linear` takes them: nothing where the part's own rows decide.
    """
    granularity = config.granularity
    if part.dim == 0:
        if granularity != "per_tensor":
            return None, None
        sums = torch.cat(part.gather(ops.row_sums(weight)))
        step = mean_scale(total(sums), weight.numel() * part.count)
        return step, step
    if config.group_size is None:
        sums = reduce(add, _chained_lanes(weight, part).unbind(1))
        count = weight.shape[1] * part.count
        if granularity == "per_tensor":
            sums, count = total(sums), count * weight.shape[0]
        step = mean_scale(sums, count)
        return step, step
    step = ops.estimate(weight, "absmean", "per_group_float32", config.group_size)[0]
    if granularity != "per_group":
        return step, step
    largest = torch.nan_to_num(step.amax(1), nan=torch.inf)
    part.reductions().maximum(largest)
    row, multiplier = two_levels(step, largest)
    return group_scale(row, multiplier), row, multiplier


class _Style:
    """What both have: which part a layer is, and its forward."""

    dim: int
    packs: bool

    def shard_param(self, module: Any, param: str, mesh: Any) -> None:
        """Makes a Parameter of the skeleton a sharded one; packed ones are cut once loaded."""
        if not isinstance(module, BitLayerBase):
            super().shard_param(module, param, mesh)  # type: ignore[misc]
        elif not self.packs and (meta := module._parameters.get(param)) is not None:
            whole = meta.ndim == 1 and self.dim == 1
            places = [Replicate() if whole else Shard(self.dim)]
            tensor = distribute_tensor(meta, mesh, places, src_data_rank=None)
            module._parameters[param] = nn.Parameter(tensor, requires_grad=meta.requires_grad)

    def install_forward(self, module: Any, mesh: Any) -> Any:
        """Replaces a layer's forward by one of its part."""
        if not isinstance(module, BitLayerBase):
            return super().install_forward(module, mesh)  # type: ignore[misc]
        group = mesh.get_group() if mesh.ndim == 1 else mesh.get_group("tp")
        set_part(module, Part(self.dim, group))
        fields: Any = module
        fields.forward = partial(_forward, module)
        return module


def _forward(layer: BitLayerBase, x: Tensor) -> Tensor:
    part = part_of(layer)
    assert part is not None
    if layer.quant_strength < 1:
        raise LifecycleError(
            f"bitlab: quant_strength must be 1 in tensor parallel, got {layer.quant_strength}"
        )
    if layer.casts_input:
        x = x.to(layer.float_dtype)
    config, weight, bias = layer.quant_config, None, _local(layer.bias)
    if part.dim == 0 and x.requires_grad and torch.is_grad_enabled():
        x = _SumGradients.apply(x, part.group)
    if layer.is_deployed:
        if part.dim == 0:
            return layer._eval_forward(x)
        qweight, scale, *multiplier = layer.packed()
    else:
        weight = _local(layer.weight)
        step, whole, *given = whole_scales(weight, config, part)
        if part.dim == 0:
            return ops.qat_linear(
                x, weight, bias, config.granularity, config.group_size, config.activation,
                step, whole, *given,
            )  # fmt: skip
        assert step is not None
        assert whole is not None
        qweight, scale = ops.pack_codes(weight.detach(), step), whole
        multiplier = [one for one in given if one is not None]
    return across_linear(
        x, weight, qweight, scale, bias, layer.out_features, config.activation,
        multiplier[0] if multiplier else None, part.reductions(),
    )  # fmt: skip


class Columns(_Style, ColwiseParallel):
    """transformers' colwise: each process has whole rows of the weight."""

    dim = 0

    def __init__(self, packs: bool) -> None:
        super().__init__()
        self.packs = packs


class Rows(_Style, RowwiseParallel):
    """transformers' rowwise: each process has some of the inputs."""

    dim = 1

    def __init__(self, packs: bool) -> None:
        super().__init__()
        self.packs = packs


class Experts(MoEParamShard):
    """Each process has some of the experts, whole; packed ones are cut once loaded."""

    def __init__(self, packs: bool) -> None:
        super().__init__(Shard(0), shards_expert_dim=True)
        self.packs = packs

    def shard_param(self, module: BitExperts, param: str, mesh: Any) -> None:
        """Makes a Parameter of the skeleton a sharded one, and says how many experts are here."""
        part = Part(0, mesh.get_group())
        set_part(module, part)
        if not self.packs:
            super().shard_param(module, param, mesh)
        module.num_experts = next(iter(module.stacks.values())).experts // part.count


def send_tokens(model: PreTrainedModel) -> None:
    """Lets tokens be sent to the experts and back where it is left to transformers how they meet.

    It would let each process add up its part of a token where nothing trains, and reduce these:
    sums in another order than those of one process, and than in training.
    """
    distributed: Any = getattr(model.config, "distributed_config", None)
    meshes: Any = model._mesh_manager
    for found in expert_modules(model):
        experts: Any = found.module
        if part_of(experts) is not None and distributed.ep_implementation == "auto":
            del experts.forward
            _registry["ep_dispatch_experts"].install_forward(
                experts, meshes.get_mesh("ep"), tp_mesh=meshes.get_mesh("tp"),
                ep_implementation="all_to_all",
            )  # fmt: skip


# transformers declares functions here, and registers objects such as these.
_registry: Any = ALL_PARALLEL_STYLES
for (_packs, _style), _name in STYLES.items():
    _registry.register(_name, (Columns if _style == "colwise" else Rows)(_packs))
for _packs, _name in EXPERT_STYLES.items():
    _registry.register(_name, Experts(_packs))
