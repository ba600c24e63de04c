"""The native CUDA kernels that go through float weights: packing, and learned scales."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitcore.kernels.native import TYPE_CODES


class CudaWeights:
    """The part of `bitcore.kernels.cuda.CudaKernels` that goes through float weights."""

    _call: Callable[..., None]
    _count_multiprocessors: Callable[[str, torch.device], int]

    def pack_weight(
        self, weight: Tensor, granularity: str, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `bitcore.reference.pack_weight`."""
        op, device = "bitlab::pack_weight", weight.device
        self._count_multiprocessors(op, device)
        weight = weight.contiguous()
        if granularity == "per_group":
            return self._pack_groups(op, weight, group_size)
        columns = weight.shape[1] // group_size if granularity == "per_group_float32" else 0
        sums = None
        if granularity == "per_tensor":
            sums = torch.empty(weight.shape[0], dtype=torch.float64, device=device)
        scale = self._weight_scale(op, weight, columns, sums)
        return self._pack(op, weight, scale), scale, None

    def row_sums(self, weight: Tensor) -> Tensor:
        """See `bitcore.reference.row_sums`."""
        op = "row_sums"
        self._count_multiprocessors(op, weight.device)
        sums = torch.empty(weight.shape[0], dtype=torch.float64, device=weight.device)
        self._weight_scale(op, weight.contiguous(), 0, sums)
        return sums

    def _weight_scale(self, op: str, weight: Tensor, columns: int, sums: Tensor | None) -> Tensor:
        """Absmean scales: one where there is room for the sums of the rows, else a row's or those
        of its columns of groups.
        """
        out_features, in_features = weight.shape
        rows = out_features if sums is None else 1
        shape = (out_features, columns) if columns else (rows,)
        scale = torch.empty(shape, dtype=torch.float32, device=weight.device)
        written = (scale,) if sums is None else (scale, sums)
        self._call(
            op, "weight_scale", written, weight, TYPE_CODES[weight.dtype], scale, rows, columns,
            sums, out_features, in_features,
        )  # fmt: skip
        return scale

    def _pack_groups(
        self, op: str, weight: Tensor, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Scales of groups in two levels: qweight, scale [N] and multiplier [N, K / G]."""
        out_features, in_features = weight.shape
        columns, device = in_features // group_size, weight.device
        rows = (out_features + 3) // 4
        qweight = torch.empty((rows, in_features), dtype=torch.uint8, device=device)
        scale = torch.empty(out_features, dtype=torch.float32, device=device)
        multiplier = torch.empty((out_features, columns), dtype=torch.uint8, device=device)
        self._call(
            op, "pack_groups_t2", (qweight, scale, multiplier), weight, TYPE_CODES[weight.dtype],
            scale, multiplier, qweight, out_features, in_features, columns,
        )  # fmt: skip
        return qweight, scale, multiplier

    def pack_codes(self, weight: Tensor, step: Tensor) -> Tensor:
        """See `bitcore.reference.pack_codes`."""
        op = "bitlab::pack_codes"
        self._count_multiprocessors(op, weight.device)
        return self._pack(op, weight.contiguous(), step.contiguous())

    def _pack(self, op: str, weight: Tensor, step: Tensor) -> Tensor:
        out_features, in_features = weight.shape
        qweight = torch.empty(
            ((out_features + 3) // 4, in_features), dtype=torch.uint8, device=weight.device
        )
        self._call(
            op, "pack_t2", (qweight,), weight, TYPE_CODES[weight.dtype], step, step.shape[0],
            step.shape[1] if step.dim() == 2 else 0, qweight, out_features, in_features,
        )  # fmt: skip
        return qweight

    def learned_gradients(self, dw: Tensor, weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """See `bitcore.reference.learned_gradients`."""
        op, device = "bitlab::learned_gradients", weight.device
        self._count_multiprocessors(op, device)
        dw, weight, step = dw.contiguous(), weight.contiguous(), step.contiguous()
        gradient = torch.empty(weight.shape, dtype=weight.dtype, device=device)
        step_gradient = torch.empty(step.shape, dtype=torch.float32, device=device)
        written: tuple[Tensor, ...] = (gradient, step_gradient)
        sums = None
        if step.shape == (1,):
            sums = torch.empty(weight.shape[0], dtype=torch.float64, device=device)
            written = (*written, sums)
        self._call(
            op, "learned_gradients", written, dw, TYPE_CODES[dw.dtype], weight,
            TYPE_CODES[weight.dtype], step, step.shape[0], step.shape[1] if step.dim() == 2 else 0,
            gradient, step_gradient, sums, *weight.shape,
        )  # fmt: skip
        return gradient, step_gradient
