"""What the native CPU kernels unpack: whole weights, and blocks for torch's own products."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from bitcore import reference
from bitcore.errors import BackendError
from bitcore.kernels.native import TYPE_CODES, address, count_columns, count_threads

# Tokens of a 16-bit gradient that are widened to float32 at once.
_WIDENED_TOKENS = 512
# Elements of a block unpacked for torch: 4 MiB of float32.
_BLOCK_ELEMENTS = 2**20


class CpuUnpacking:
    """The part of `bitcore.kernels.cpu.CpuKernels` that goes through float weights."""

    _library: ctypes.CDLL

    def _check(self, status: int) -> None:
        if status != 0:
            raise BackendError(f"libbitkernels_cpu: {self._library.bk_cpu_last_error().decode()}")

    def _linear_in_blocks(
        self,
        tokens: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        multiplier: Tensor | None,
    ) -> Tensor:
        """Float activations of many tokens: packed rows unpacked block by block for torch's own
        float32 product, which is faster there than exact sums.
        """
        rows, in_features = qweight.shape
        qweight, weight_scale = qweight.contiguous(), weight_scale.contiguous()
        step = max(1, _BLOCK_ELEMENTS // (4 * in_features))
        x = reference.without_gaps(tokens.float())
        y = torch.empty((x.shape[0], 4 * rows), dtype=torch.float32, device="cpu")
        lanes = y.view(-1, 4, rows)
        with torch.autocast("cpu", enabled=False):
            for first in range(0, rows, step):
                last = min(first + step, rows)
                weight = self._unpack_block(
                    qweight,
                    weight_scale,
                    torch.float32,
                    out_features,
                    (first, last, 0, in_features),
                    multiplier,
                )
                lanes[:, :, first:last] = (x @ weight.t()).view(-1, 4, last - first)
        y = y[:, :out_features]
        return y.contiguous() if bias is None else y + bias.float()

    def _unpack_block(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        dtype: torch.dtype,
        out_features: int,
        block: tuple[int, int, int, int],
        multiplier: Tensor | None,
    ) -> Tensor:
        """Codes times scale of packed rows and columns ``[first, last)``, one lane of rows after
        the other; what stands for missing rows is zero.
        """
        first_row, last_row, first_column, last_column = block
        rows, in_features = qweight.shape
        shape = (4 * (last_row - first_row), last_column - first_column)
        make = torch.empty if out_features == 4 * rows else torch.zeros
        weight = make(shape, dtype=dtype, device="cpu")
        columns = count_columns(weight_scale, multiplier)
        multiplier = None if multiplier is None else multiplier.contiguous()
        self._check(
            self._library.bk_cpu_unpack_t2(
                address(qweight), address(weight_scale), weight_scale.shape[0], columns,
                None if multiplier is None else address(multiplier),
                address(weight), TYPE_CODES[dtype], out_features, in_features, *block,
                count_threads(),
            )
        )  # fmt: skip
        return weight

    def unpack_weight(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        out_features: int,
        dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """See `bitcore.reference.unpack_weight`."""
        if dtype not in TYPE_CODES:
            return reference.unpack_weight(qweight, weight_scale, out_features, dtype, multiplier)
        qweight, weight_scale = qweight.contiguous(), weight_scale.contiguous()
        block = (0, qweight.shape[0], 0, qweight.shape[1])
        weight = self._unpack_block(qweight, weight_scale, dtype, out_features, block, multiplier)
        return weight if weight.shape[0] == out_features else weight[:out_features].clone()

    def input_gradient(
        self,
        dy: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        out_features: int,
        dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """See `bitcore.reference.input_gradient`: columns unpacked block by block, in dy's dtype if
        the CPU multiplies that, else in float32.

        Gradients are widened some tokens at a time: of all of them that would take twice their
        memory, more than unpacking again takes time.
        """
        rows, in_features = qweight.shape
        qweight, weight_scale = qweight.contiguous(), weight_scale.contiguous()
        step = max(64, _BLOCK_ELEMENTS // (4 * rows) // 64 * 64)
        tokens, compute = dy.reshape(-1, out_features), reference.multiplied_in(dy.dtype)
        count = tokens.shape[0]
        dx = torch.empty((count, in_features), dtype=dtype, device="cpu")
        together = max(1, count if dy.dtype == compute else _WIDENED_TOKENS)
        with torch.autocast("cpu", enabled=False):
            for token in range(0, count, together):
                some = reference.without_gaps(tokens[token : token + together].to(compute))
                for first in range(0, in_features, step):
                    last = min(first + step, in_features)
                    weight = self._unpack_block(
                        qweight,
                        weight_scale,
                        compute,
                        out_features,
                        (0, rows, first, last),
                        multiplier,
                    )
                    dx[token : token + together, first:last] = some @ weight[:out_features]
        return dx.view(*dy.shape[:-1], in_features)
