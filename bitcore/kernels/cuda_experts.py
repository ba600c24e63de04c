"""The native CUDA kernels of all experts of a layer."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from bitcore import reference
from bitcore.checks import check_memory
from bitcore.kernels.native import TYPE_CODES, count_columns


class CudaExperts:
    """The part of `bitcore.kernels.cuda.CudaKernels` that multiplies with weights of experts."""

    linear: Callable[..., Tensor]
    _library: ctypes.CDLL
    _call: Callable[..., None]
    _tokens: Callable[[str, str, Tensor], tuple[Tensor, int, int]]
    _count_multiprocessors: Callable[[str, torch.device], int]
    _scratch: Callable[[int, torch.device], Tensor]

    def experts_linear(
        self,
        x: Tensor,
        index: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        out_dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """See `bitcore.reference.experts_linear`: one native call where activations are int8, which
        reads nothing of the index on the host; else a call for each expert, which does.
        """
        if activation == "float":
            weights = qweight, weight_scale, bias, out_features, activation
            return reference.experts_linear(
                x, index, *weights, out_dtype, multiplier, run=self.linear
            )
        args = out_features, activation == "int8_per_tensor", multiplier
        return self._run_experts(x, index, qweight, weight_scale, bias, *args, out_dtype)

    def prepare_experts(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        multiplier: Tensor | None = None,
    ) -> Callable[[Tensor, Tensor, torch.dtype], Tensor] | None:
        """Returns `experts_linear` of these weights, of tokens, their index and their dtype; or
        None if it is not one native call.
        """
        if activation == "float":
            return None
        run = self._run_experts
        weights = (
            qweight,
            weight_scale,
            bias,
            out_features,
            activation == "int8_per_tensor",
            multiplier,
        )
        return lambda x, index, dtype: run(x, index, *weights, dtype)

    def _run_experts(
        self,
        x: Tensor,
        index: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        per_tensor: bool,
        multiplier: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        op, device = "bitlab::experts_linear", x.device
        self._count_multiprocessors(op, device)
        # Past the dispatcher nobody else has looked at it.
        check_memory(op, index=index)
        tokens, many, stride = self._tokens(op, "x", x)
        rows, experts, in_features = index.numel(), qweight.shape[0], qweight.shape[2]
        y = x.new_empty((rows, out_features), dtype=out_dtype)
        if rows == 0:
            return y
        # Of an expert: what is one scale, one a row, or a row of them.
        columns = count_columns(weight_scale[0], None if multiplier is None else multiplier[0])
        shape, choices = (many, out_features, in_features), rows // many
        size = self._library.bk_cuda_experts_workspace(
            many, choices, experts, out_features, in_features, columns, multiplier is not None,
            per_tensor,
        )  # fmt: skip
        workspace = self._scratch(max(size, 1), device)
        given = [None if one is None else one.contiguous() for one in (multiplier, bias)]
        self._call(
            op, "experts_i8_t2", (y, workspace), tokens, TYPE_CODES[x.dtype], stride,
            index.contiguous(), choices, experts, qweight.contiguous(), weight_scale.contiguous(),
            weight_scale.shape[1], columns, *given, 0 if bias is None else TYPE_CODES[bias.dtype],
            y, TYPE_CODES[out_dtype], *shape, per_tensor, workspace,
        )  # fmt: skip
        return y
