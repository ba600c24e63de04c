"""FSDP2 gathers a latent weight as what its rows are packed to: two bits a weight on the wire.

FSDP2 (``torch.distributed.fsdp.fully_shard``) keeps some rows of a weight in each process and asks
a shard that has the two hooks below what to send, and what to make of what has arrived. A
`PackedShard` packs its own rows. What arrives becomes a `GatheredWeight`, which has the weight's
shape and gets its gradient, and holds codes and scales alone. Shards, optimizers and state dicts
keep the float rows.

Rows of a byte lie a quarter of the matrix apart, so each process packs its rows as a matrix of
their own, and `bitcore.packing.join_rows` puts them together. A scale of a row or a group is its
process's to make. One of the whole matrix needs the sums of all rows first: a gather of eight bytes
a row, added up in the order of one process. So packed weights are those of one process, bit for
bit.

What is gathered is settled by the first gather, since torch keeps the memory that it makes then.
Keeping packed rows from the forward pass for the backward pass's gather was rejected: optimizers
that write through pointers leave no trace by which to tell that they are out of date.

Source: the extension points of torch's FSDP2, as torchao's float8 weights use them.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.grad_mode import _unsafe_preserve_version_counter

from bitcore import ops
from bitcore.errors import LifecycleError
from bitcore.packing import join_rows
from bitcore.quantize import mean_scale, total
from bitlayers.state import LayerState, Packed

# Rows and columns of the whole weight, packed rows of a process, whether it has one scale.
Facts = tuple[int, int, int, bool]
_aten = torch.ops.aten
_ALIASES = {_aten.detach.default, _aten.alias.default}


class GatheredWeight(Tensor):
    """A weight [N, K] of which this process has the codes and scales, not the floats.

    It takes part in autograd as the float weight would. Its values cannot be read.

    Args:
        packed: qweight uint8 [ceil(N / 4), K], its scale, and multipliers where there are any.
        shape: ``(N, K)``.
        dtype: That of the float weight, and of the gradient.

    Attributes:
        packed: The same tensors.
    """

    packed: Packed
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, packed: Packed, shape: tuple[int, int], dtype: torch.dtype) -> GatheredWeight:
        """Makes the weight; nothing is computed."""
        weight: GatheredWeight = Tensor._make_wrapper_subclass(
            cls, shape, strides=(shape[1], 1), dtype=dtype, device=packed[0].device
        )
        weight.packed = packed
        return weight

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    @property
    def is_finite(self) -> bool:
        """Whether all weights were finite: one that is not gives its scale NaN."""
        return bool(torch.isfinite(self.packed[1]).all())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Makes aliases, which FSDP2 and Parameters need, and zeros; refuses all else."""
        if args and isinstance(args[0], GatheredWeight):
            weight = args[0]
            shape = weight.shape[0], weight.shape[1]
            strides = func is _aten.as_strided.default and [[*one] for one in args[1:3]]
            if func in _ALIASES or strides == [[*shape], [shape[1], 1]]:
                return GatheredWeight(weight.packed, shape, weight.dtype)
            if func is _aten.zeros_like.default:
                return torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        raise LifecycleError(
            f"weight: its values must be whole to be read by {func}, got codes that FSDP2 has "
            "gathered packed\nLeave pack_all_gather out; set_quant_strength must have come before "
            "the first forward pass."
        )

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        """Says what it is."""
        return f"GatheredWeight({[*self.shape]}, dtype={self.dtype}, device={self.device})"


class PackedShard(Tensor):
    """This process's rows of a latent weight, float [n, K], which FSDP2 gathers packed.

    An ordinary tensor in every respect but these hooks: results of operations are plain tensors.
    It is one of as many equal parts as there are processes.
    """

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    def to(self, *args: Any, **kwargs: Any) -> PackedShard:
        """As of a tensor, and still a shard: FSDP2 moves what it offloads before it gathers."""
        return super().to(*args, **kwargs).as_subclass(PackedShard)

    def fsdp_pre_all_gather(
        self, mesh: Any, outer_size: Any, outer_stride: Any, module: Any, mp_policy: Any
    ) -> tuple[Packed, Facts | None]:
        """Returns what this process sends, and what `fsdp_post_all_gather` has to know.

        Codes are those of the float rows, whatever mixed precision rounds parameters to.

        Args:
            mesh: The processes that have the rows.
            outer_size: Of the whole weight.
            outer_stride: Of the whole weight.
            module: The layer.
            mp_policy: FSDP2's mixed precision.

        Returns:
            Packed rows, uint8 [ceil(n / 4), K], their scales, float32 [1], [n] or [n, K / G], and
            multipliers uint8 [n, K / G] where there are any; then facts. Where the first gather met
            a quantization strength below 1, the float rows [n, K], and None.
        """
        layer, rows = cast(LayerState, module), self.as_subclass(Tensor)
        if layer.gathers_packed is None:
            layer.gathers_packed = layer.quant_strength == 1
        if not layer.gathers_packed:
            return (rows.to(mp_policy.param_dtype or rows.dtype),), None
        config, one_scale = layer.quant_config, layer.quant_config.granularity == "per_tensor"
        if one_scale:
            scale = _whole_scale(rows, outer_size[0], mesh.get_group())
            packed: Packed = ops.pack_codes(rows, scale), scale
        else:
            packed = ops.pack_weight(rows, config.granularity, config.group_size)
        return packed, (outer_size[0], outer_size[1], packed[0].shape[0], one_scale)

    def fsdp_post_all_gather(
        self,
        all_gather_outputs: tuple[Tensor, ...],
        metadata: Facts | None,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """Makes the whole weight of what all processes sent.

        Args:
            all_gather_outputs: What they sent, process after process.
            metadata: What `fsdp_pre_all_gather` returned beside it.
            param_dtype: dtype of the weight.
            out: The weight that an earlier call made. It shares the memory of all that has
                arrived but the packed weight, which is written here.

        Returns:
            The weight and the tensors whose memory torch is to free with it; nothing with ``out``.
        """
        if metadata is None:
            return None if out is not None else (all_gather_outputs[0], ())
        out_features, in_features, piece_rows, one_scale = metadata
        pieces, scale, *multiplier = all_gather_outputs
        qweight = join_rows(pieces.view(-1, piece_rows, in_features), out_features)
        if out is None:
            # Each process sent the scale of the whole matrix.
            packed = qweight, scale[:1] if one_scale else scale, *multiplier
            weight = GatheredWeight(packed, (out_features, in_features), param_dtype)
            return weight, (qweight,)
        held = cast(GatheredWeight, out).packed[0]
        # What the forward pass kept for the backward pass has the same values again.
        with _unsafe_preserve_version_counter(held):
            held.copy_(qweight)
        return None


def _whole_scale(rows: Tensor, out_features: int, group: Any) -> Tensor:
    """Returns the absmean scale, float32 [1], of a matrix of which each process has some rows."""
    own = ops.row_sums(rows)
    sums = own.new_empty(out_features)
    dist.all_gather([*sums.view(-1, len(own))], own, group=group)
    return mean_scale(total(sums), out_features * rows.shape[1])
