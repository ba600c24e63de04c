"""The native CPU kernel of all experts of a layer."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from bitcore import reference
from bitcore.checks import LOWEST_ADDRESS, check_memory
from bitcore.kernels.cpu_unpack import CpuUnpacking
from bitcore.kernels.native import (
    TYPE_CODES,
    LinearConstants,
    address,
    count_columns,
    count_threads,
    experts_inputs,
    linear_inputs,
    made_memory,
)


class CpuExperts(CpuUnpacking):
    """The part of `bitcore.kernels.cpu.CpuKernels` that multiplies with the weights of experts."""

    linear: Callable[..., Tensor]
    _memory: Callable[[int], Tensor]
    _experts_sizes: dict[tuple[int, int, int, int, int, int], int]

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
        """See `bitcore.reference.experts_linear`: one native call where activations are int8."""
        weights = qweight, weight_scale, bias, out_features, activation
        if activation == "float":
            return reference.experts_linear(
                x, index, *weights, out_dtype, multiplier, run=self.linear
            )
        constants = self._experts_constants(*weights, multiplier)
        return self._run_experts(constants, len(qweight), x, index, x.dtype, out_dtype)

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
        None if it is not one native call. The weights must outlive it.
        """
        given = [one for one in (qweight, weight_scale, bias, multiplier) if one is not None]
        if activation == "float" or not all(tensor.is_contiguous() for tensor in given):
            return None
        constants = self._experts_constants(
            qweight, weight_scale, bias, out_features, activation, multiplier
        )
        run, experts = self._run_experts, len(qweight)
        return lambda x, index, dtype: run(constants, experts, x, index, dtype, dtype)

    def _experts_constants(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        multiplier: Tensor | None,
    ) -> LinearConstants:
        # Of an expert: what is one scale, one a row, or a row of them.
        one = None if multiplier is None else multiplier[0]
        return LinearConstants(
            self._library.bk_cpu_experts_i8_t2,
            qweight,
            weight_scale,
            bias,
            out_features,
            count_columns(weight_scale[0], one),
            per_tensor=activation == "int8_per_tensor",
            multiplier=multiplier,
        )

    def _run_experts(
        self,
        constants: LinearConstants,
        experts: int,
        x: Tensor,
        index: Tensor,
        dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """One native call on x [M, K] and its index; see `CpuKernels._run_linear`."""
        in_features = stride = constants.in_features
        if not x.is_contiguous():
            if x.stride(1) == 1:
                stride = x.stride(0)
            else:
                x = x.contiguous()
        # Past the dispatcher nobody else has looked at it.
        check_memory("bitlab::experts_linear", index=index)
        index = index.contiguous()
        pointer, rows, count = x.data_ptr(), index.numel(), x.shape[0]
        if pointer < LOWEST_ADDRESS:
            x = made_memory("bitlab::experts_linear", x)
            pointer = x.data_ptr()
        y = x.new_empty((rows, constants.out_features), dtype=out_dtype)
        if rows == 0:
            return y
        choices, threads = rows // count, count_threads()
        key = (count, choices, experts, in_features, constants.columns, threads)
        size = self._experts_sizes.get(key)
        if size is None:
            size = self._experts_sizes[key] = self._library.bk_cpu_experts_workspace(*key)
        workspace = self._memory(size)
        record = (
            constants.record
            + linear_inputs(
                pointer, TYPE_CODES[dtype], stride, y.data_ptr(), TYPE_CODES[out_dtype], count,
                workspace.data_ptr(), threads,
            )
            + experts_inputs(address(index), choices, experts)
        )  # fmt: skip
        status = constants.run(record)
        if status:
            self._check(status)
        return y
