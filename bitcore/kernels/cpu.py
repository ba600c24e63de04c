"""The native CPU kernels, behind the same functions as the reference."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from bitcore import reference
from bitcore.errors import BackendError
from bitcore.kernels.native import ISA_VARIABLE, load_cpu_library

_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CpuKernels:
    """libbitkernels_cpu on torch's OpenMP threads.

    Raises:
        BackendError: The library cannot be loaded, or ``BITLAB_CPU_ISA`` names an instruction set
            that this CPU or build lacks.
    """

    def __init__(self) -> None:
        self._library = load_cpu_library()
        self._linear = self._library.bk_cpu_linear_i8_t2
        self.select_isa(os.environ.get(ISA_VARIABLE, "auto"), source=ISA_VARIABLE)

    @property
    def supported_isas(self) -> list[str]:
        """Instruction sets that this CPU and build have, best first."""
        names: str = self._library.bk_cpu_supported_isas().decode()
        return names.split(",")

    @property
    def isa(self) -> str:
        """The instruction set in use."""
        name: str = self._library.bk_cpu_isa().decode()
        return name

    @property
    def description(self) -> str:
        """What `bitcore.backends` adds to the reason."""
        return f" ({self.isa}; this CPU has {', '.join(self.supported_isas)})"

    def select_isa(self, name: str, source: str = "select_isa") -> None:
        """Selects an instruction set for the process, or the best with ``"auto"``."""
        if self._library.bk_cpu_select_isa(name.encode()) != 0:
            raise BackendError(
                f"{source}: instruction set must be one of {['auto', *self.supported_isas]} "
                f"on this CPU, got {name!r}"
            )

    @contextmanager
    def use_isa(self, name: str) -> Iterator[None]:
        """Selects an instruction set for the whole process while the context is open."""
        before = self.isa
        self.select_isa(name, source="use_isa")
        try:
            yield
        finally:
            self.select_isa(before)

    def _check(self, status: int) -> None:
        if status != 0:
            raise BackendError(f"libbitkernels_cpu: {self._library.bk_cpu_last_error().decode()}")

    def pack_weight(
        self, weight: Tensor, granularity: str, group_size: int
    ) -> tuple[Tensor, Tensor]:
        """See `bitcore.reference.pack_weight`."""
        weight = weight.contiguous()
        out_features, in_features = weight.shape
        columns = in_features // group_size if granularity == "per_group" else 0
        rows = 1 if granularity == "per_tensor" else out_features
        shape = (out_features, columns) if granularity == "per_group" else (rows,)
        scale = torch.empty(shape, dtype=torch.float32)
        sums = torch.empty(out_features if granularity == "per_tensor" else 0, dtype=torch.float64)
        qweight = torch.empty(((out_features + 3) // 4, in_features), dtype=torch.uint8)
        pointer, code = weight.data_ptr(), _TYPE_CODES[weight.dtype]
        threads = torch.get_num_threads()
        library = self._library
        self._check(
            library.bk_cpu_weight_scale(
                pointer, code, scale.data_ptr(), rows, columns, sums.data_ptr() or None,
                out_features, in_features, threads,
            )
        )  # fmt: skip
        self._check(
            library.bk_cpu_pack_t2(
                pointer, code, scale.data_ptr(), rows, columns, qweight.data_ptr(),
                out_features, in_features, threads,
            )
        )  # fmt: skip
        return qweight, scale

    def quantize_activation(self, x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
        """See `bitcore.reference.quantize_activation`."""
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        codes = torch.empty(x.shape, dtype=torch.int8)
        scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32)
        self._check(
            self._library.bk_cpu_quantize_i8(
                tokens.data_ptr(), _TYPE_CODES[x.dtype], tokens.shape[1], codes.data_ptr(),
                scale.data_ptr(), tokens.shape[0], tokens.shape[1], per_tensor,
                torch.get_num_threads(),
            )
        )  # fmt: skip
        return codes, scale

    def matmul(self, codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
        """See `bitcore.reference.matmul`."""
        tokens = codes.reshape(-1, codes.shape[-1]).contiguous()
        count, in_features = tokens.shape
        acc = torch.empty((*codes.shape[:-1], out_features), dtype=torch.int32)
        size = self._library.bk_cpu_linear_workspace(count, in_features, 0)
        workspace = torch.empty(size, dtype=torch.uint8)
        qweight = qweight.contiguous()
        self._check(
            self._library.bk_cpu_matmul_i8_t2_i32(
                tokens.data_ptr(), qweight.data_ptr(), acc.data_ptr(), count, out_features,
                in_features, workspace.data_ptr(), torch.get_num_threads(),
            )
        )  # fmt: skip
        return acc

    def linear(
        self,
        x: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See `bitcore.reference.linear`: one native call, activations included."""
        if activation == "float":
            return reference.linear_float(x, qweight, weight_scale, bias, out_features, out_dtype)
        in_features = x.shape[-1]
        tokens = x.reshape(-1, in_features)
        if tokens.stride(1) != 1:
            tokens = tokens.contiguous()
        count = tokens.shape[0]
        columns = weight_scale.shape[1] if weight_scale.dim() == 2 else 0
        y = torch.empty((*x.shape[:-1], out_features), dtype=out_dtype)
        size = count * (in_features + 63 & -64) + 4 * count * (1 + (columns or 1))
        workspace = torch.empty(size, dtype=torch.uint8)
        qweight, weight_scale = qweight.contiguous(), weight_scale.contiguous()
        bias = None if bias is None else bias.contiguous()
        status = self._linear(
            tokens.data_ptr(), _TYPE_CODES[x.dtype], tokens.stride(0), qweight.data_ptr(),
            weight_scale.data_ptr(), weight_scale.shape[0], columns,
            None if bias is None else bias.data_ptr(),
            0 if bias is None else _TYPE_CODES[bias.dtype], y.data_ptr(), _TYPE_CODES[out_dtype],
            count, out_features, in_features, activation == "int8_per_tensor",
            workspace.data_ptr(), torch.get_num_threads(),
        )  # fmt: skip
        self._check(status)
        return y
