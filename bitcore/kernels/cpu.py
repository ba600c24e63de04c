"""The native CPU kernels, behind the same functions as the reference.

Every tensor that is made here names its device: kernels write through bare pointers, and past the
dispatcher torch's default device still counts.
"""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from bitcore.checks import GROUPED, LOWEST_ADDRESS
from bitcore.errors import BackendError
from bitcore.kernels.cpu_experts import CpuExperts
from bitcore.kernels.native import (
    ISA_VARIABLE,
    TYPE_CODES,
    LinearConstants,
    address,
    count_columns,
    count_threads,
    linear_inputs,
    load_cpu_library,
    made_memory,
)

_FLOAT_PLANES = 4
# From more tokens on, torch's float32 product of unpacked blocks is faster than exact sums.
_FEW_FLOAT_TOKENS = 16
# Bytes of workspace that each thread keeps.
_KEPT_WORKSPACE = 2**20


class CpuKernels(CpuExperts):
    """libbitkernels_cpu on torch's OpenMP threads.

    Raises:
        BackendError: The library cannot be loaded, or ``BITLAB_CPU_ISA`` names an instruction set
            that this CPU or build lacks.
    """

    def __init__(self) -> None:
        self._library = load_cpu_library()
        self._linear = self._library.bk_cpu_linear_i8_t2
        self._linear_float = self._library.bk_cpu_linear_f32_t2
        self._linear_int8 = self._library.bk_cpu_linear_i8_i8
        self._sizes: dict[tuple[int, int, int, int, int], int] = {}
        self._experts_sizes = {}
        self._kept = threading.local()
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

    def pack_weight(
        self, weight: Tensor, granularity: str, group_size: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """See `bitcore.reference.pack_weight`."""
        weight = weight.contiguous()
        out_features, in_features = weight.shape
        columns = in_features // group_size if granularity in GROUPED else 0
        if granularity == "per_group":
            return self._pack_groups(weight, columns)
        sums = None
        if granularity == "per_tensor":
            sums = torch.empty(out_features, dtype=torch.float64, device="cpu")
        scale = self._weight_scale(weight, columns, sums)
        return self.pack_codes(weight, scale), scale, None

    def row_sums(self, weight: Tensor) -> Tensor:
        """See `bitcore.reference.row_sums`."""
        sums = torch.empty(weight.shape[0], dtype=torch.float64, device="cpu")
        self._weight_scale(weight.contiguous(), 0, sums)
        return sums

    def _weight_scale(self, weight: Tensor, columns: int, sums: Tensor | None) -> Tensor:
        """Absmean scales: one where there is room for the sums of the rows, else a row's or those
        of its columns of groups.
        """
        out_features, in_features = weight.shape
        rows = out_features if sums is None else 1
        shape = (out_features, columns) if columns else (rows,)
        scale = torch.empty(shape, dtype=torch.float32, device="cpu")
        self._check(
            self._library.bk_cpu_weight_scale(
                address(weight), TYPE_CODES[weight.dtype], address(scale), rows, columns,
                None if sums is None else address(sums), out_features, in_features, count_threads(),
            )
        )  # fmt: skip
        return scale

    def _pack_groups(self, weight: Tensor, columns: int) -> tuple[Tensor, Tensor, Tensor]:
        out_features, in_features = weight.shape
        rows = (out_features + 3) // 4
        qweight = torch.empty((rows, in_features), dtype=torch.uint8, device="cpu")
        scale = torch.empty(out_features, dtype=torch.float32, device="cpu")
        multiplier = torch.empty((out_features, columns), dtype=torch.uint8, device="cpu")
        self._check(
            self._library.bk_cpu_pack_groups_t2(
                address(weight), TYPE_CODES[weight.dtype], address(scale), address(multiplier),
                address(qweight), out_features, in_features, columns, count_threads(),
            )
        )  # fmt: skip
        return qweight, scale, multiplier

    def pack_codes(self, weight: Tensor, step: Tensor) -> Tensor:
        """See `bitcore.reference.pack_codes`."""
        weight, step = weight.contiguous(), step.contiguous()
        out_features, in_features = weight.shape
        rows = (out_features + 3) // 4
        qweight = torch.empty((rows, in_features), dtype=torch.uint8, device="cpu")
        self._check(
            self._library.bk_cpu_pack_t2(
                address(weight), TYPE_CODES[weight.dtype], address(step), step.shape[0],
                step.shape[1] if step.dim() == 2 else 0, address(qweight), out_features,
                in_features, count_threads(),
            )
        )  # fmt: skip
        return qweight

    def learned_gradients(self, dw: Tensor, weight: Tensor, step: Tensor) -> tuple[Tensor, Tensor]:
        """See `bitcore.reference.learned_gradients`: one native call."""
        dw, weight, step = dw.contiguous(), weight.contiguous(), step.contiguous()
        out_features, in_features = weight.shape
        gradient = torch.empty(weight.shape, dtype=weight.dtype, device="cpu")
        step_gradient = torch.empty(step.shape, dtype=torch.float32, device="cpu")
        row_sums = torch.empty(out_features, dtype=torch.float64, device="cpu")
        self._check(
            self._library.bk_cpu_learned_gradients(
                address(dw), TYPE_CODES[dw.dtype], address(weight), TYPE_CODES[weight.dtype],
                address(step), step.shape[0], step.shape[1] if step.dim() == 2 else 0,
                address(gradient), address(step_gradient), address(row_sums), out_features,
                in_features, count_threads(),
            )
        )  # fmt: skip
        return gradient, step_gradient

    def find_invalid_code(self, qweights: Sequence[Tensor]) -> int | None:
        """See `bitcore.reference.find_invalid_code`."""
        # Held until the call returns: a copy may be all that a pointer points to.
        whole = [qweight.contiguous() for qweight in qweights]
        found, many = ctypes.c_int64(), len(whole)
        pointers = (ctypes.c_void_p * many)(*(address(qweight) for qweight in whole))
        counts = (ctypes.c_int64 * many)(*(qweight.numel() for qweight in whole))
        threads = count_threads()
        find = self._library.bk_cpu_find_invalid_t2
        self._check(find(pointers, counts, many, ctypes.byref(found), threads))
        return found.value if found.value >= 0 else None

    def quantize_activation(self, x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
        """See `bitcore.reference.quantize_activation`."""
        tokens = x.reshape(-1, x.shape[-1]).contiguous()
        codes = torch.empty(x.shape, dtype=torch.int8, device="cpu")
        scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device="cpu")
        self._check(
            self._library.bk_cpu_quantize_i8(
                address(tokens), TYPE_CODES[x.dtype], tokens.shape[1], address(codes),
                address(scale), tokens.shape[0], tokens.shape[1], per_tensor,
                count_threads(),
            )
        )  # fmt: skip
        return codes, scale

    def _workspace(
        self, count: int, in_features: int, columns: int, planes: int, threads: int
    ) -> Tensor:
        """Scratch memory of a call."""
        key = (count, in_features, columns, planes, threads)
        size = self._sizes.get(key)
        if size is None:
            size = self._sizes[key] = self._library.bk_cpu_linear_workspace(*key)
        return self._memory(size)

    def _memory(self, size: int) -> Tensor:
        """So many bytes of scratch, or more; few of them are kept for the thread's next call."""
        if size > _KEPT_WORKSPACE:
            return torch.empty(size, dtype=torch.uint8, device="cpu")
        kept: Tensor | None = getattr(self._kept, "workspace", None)
        if kept is None:
            kept = torch.empty(_KEPT_WORKSPACE, dtype=torch.uint8, device="cpu")
            self._kept.workspace = kept
        return kept

    def matmul(self, codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
        """See `bitcore.reference.matmul`."""
        tokens = codes.reshape(-1, codes.shape[-1]).contiguous()
        count, in_features = tokens.shape
        shape = (*codes.shape[:-1], out_features)
        acc = torch.empty(shape, dtype=torch.int32, device="cpu")
        threads = count_threads()
        workspace = self._workspace(count, in_features, 0, 1, threads)
        qweight = qweight.contiguous()
        self._check(
            self._library.bk_cpu_matmul_i8_t2_i32(
                address(tokens), address(qweight), address(acc), count, out_features,
                in_features, address(workspace), threads,
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
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """See `bitcore.reference.linear`: one native call, activations included."""
        if activation == "float" and x.numel() > _FEW_FLOAT_TOKENS * qweight.shape[1]:
            tokens = x.reshape(-1, qweight.shape[1])
            y = self._linear_in_blocks(
                tokens, qweight, weight_scale, bias, out_features, multiplier
            )
            return y.to(out_dtype).view(*x.shape[:-1], out_features)
        constants = self._linear_constants(
            qweight, weight_scale, bias, out_features, activation, multiplier
        )
        return self._run_linear(constants, x, [*x.shape], x.dtype, out_dtype)

    def linear_with_codes(
        self, x: Tensor, qweight: Tensor, weight_scale: Tensor, bias: Tensor | None,
        out_features: int, activation: str, out_dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """See `bitcore.reference.linear_with_codes`."""
        y = self.linear(
            x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier
        )
        return y, *self.quantize_activation(x, activation == "int8_per_tensor")

    def prepare_linear(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        multiplier: Tensor | None = None,
    ) -> Callable[[Tensor, torch.Size, torch.dtype], Tensor] | None:
        """Returns `linear` of these weights, of an input, its shape and its dtype; or None if it is
        not one native call for every input. The weights must outlive it.
        """
        given = [one for one in (qweight, weight_scale, bias, multiplier) if one is not None]
        if activation == "float" or not all(tensor.is_contiguous() for tensor in given):
            return None
        constants = self._linear_constants(
            qweight, weight_scale, bias, out_features, activation, multiplier
        )
        run = self._run_linear
        return lambda x, shape, dtype: run(constants, x, [*shape], dtype, dtype)

    def _linear_constants(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        multiplier: Tensor | None,
    ) -> LinearConstants:
        columns = count_columns(weight_scale, multiplier)
        per_tensor = activation == "int8_per_tensor"
        run, planes = self._linear, 1
        if activation == "float":
            run, planes = self._linear_float, _FLOAT_PLANES
        return LinearConstants(
            run, qweight, weight_scale, bias, out_features, columns, planes, per_tensor, multiplier
        )

    def _run_linear(
        self,
        constants: LinearConstants,
        x: Tensor,
        shape: list[int],
        dtype: torch.dtype,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """One native call on x of a shape, which becomes the output's, and a dtype. Every line
        counts: a decoder runs this hundreds of times a token.
        """
        in_features = stride = constants.in_features
        if not x.is_contiguous():
            # Rows may lie apart; what is more scattered is copied.
            if x.dim() == 2 and x.stride(1) == 1:
                stride = x.stride(0)
            else:
                x = x.contiguous()
        pointer, count = x.data_ptr(), x.numel() // in_features
        if pointer < LOWEST_ADDRESS:
            x = made_memory("bitlab::linear", x)
            pointer = x.data_ptr()
        shape[-1] = constants.out_features
        # Naming the dtype costs a third of it.
        same = out_dtype is dtype
        y = x.new_empty(shape) if same else x.new_empty(shape, dtype=out_dtype)
        threads = count_threads()
        workspace = self._workspace(
            count, in_features, constants.columns, constants.planes, threads
        )
        record = constants.record + linear_inputs(
            pointer, TYPE_CODES[dtype], stride, y.data_ptr(), TYPE_CODES[out_dtype], count,
            workspace.data_ptr(), threads,
        )  # fmt: skip
        status = constants.run(record)
        if status:
            self._check(status)
        return y

    def linear_int8(
        self,
        x: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_dtype: torch.dtype,
    ) -> Tensor:
        """See `bitcore.reference.linear_int8`: one native call, activations included."""
        constants = LinearConstants(
            self._linear_int8, qweight, weight_scale, bias, qweight.shape[0]
        )
        return self._run_linear(constants, x, [*x.shape], x.dtype, out_dtype)
