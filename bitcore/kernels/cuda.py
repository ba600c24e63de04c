"""The native CUDA kernels, behind the same functions as the reference.

Every call queues its work on torch's current stream of the tensors' device, takes its memory from
torch's allocator and waits for nothing, so it can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bitcore import reference
from bitcore.checks import LOWEST_ADDRESS
from bitcore.errors import ArgumentError, BackendError
from bitcore.kernels.cuda_experts import CudaExperts
from bitcore.kernels.cuda_native import INVALID_ARGUMENT, load_cuda_library
from bitcore.kernels.cuda_weights import CudaWeights
from bitcore.kernels.native import TYPE_CODES, library_path, made_memory

_I8_T2, _I8_I8, _F16_T2, _F32_T2 = range(4)
_QUANTIZE_WORKSPACE = 4096
_BLOCK = 64  # columns that the kernels multiply at a time
_LEAST_CAPABILITY = (8, 0)
_MOST_ELEMENTS = 2**31 - 1
# Of so many 16-bit tokens the input's gradient is torch's product with the weight unpacked: writing
# that takes about a quarter of the product's time here, less with more tokens, and cuBLAS should be
# ahead of the kernel by more. By counting: neither was measured.
UNPACKED_TOKENS = 1024
# Activations of this op's name that are not quantized.
_FLOAT = "float"


def _scales(
    weight_scale: Tensor, multiplier: Tensor | None
) -> tuple[Tensor, int, int, Tensor | None]:
    """Scales as the library's functions take them: rows, columns of groups, multipliers."""
    grouped = weight_scale if multiplier is None else multiplier
    columns = grouped.shape[1] if grouped.dim() == 2 else 0
    multiplier = None if multiplier is None else multiplier.contiguous()
    return weight_scale.contiguous(), weight_scale.shape[0], columns, multiplier


class CudaKernels(CudaExperts, CudaWeights):
    """libbitkernels_cuda on torch's current stream.

    Raises:
        BackendError: torch finds no CUDA device, or the library cannot be loaded.
    """

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            built = "" if torch.version.cuda else " (this torch is built without CUDA)"
            there = "" if library_path("bitkernels_cuda").is_file() else "not "
            raise BackendError(
                f"torch finds no CUDA device{built}; libbitkernels_cuda is {there}installed"
            )
        self._library = load_cuda_library()
        self._multiprocessors: dict[torch.device, int] = {}

    @property
    def description(self) -> str:
        """What `bitcore.backends` adds to the reason."""
        return f" ({self._library.bk_cuda_architectures().decode()})"

    def _count_multiprocessors(self, op: str, device: torch.device) -> int:
        """Multiprocessors of a device; the first call for a device checks that it can run."""
        count = self._multiprocessors.get(device)
        if count is None:
            capability = torch.cuda.get_device_capability(device)
            if capability < _LEAST_CAPABILITY:
                raise BackendError(
                    f"{op}: compute capability must be at least 8.0, got "
                    f"{capability[0]}.{capability[1]} on {device}\n"
                    "Set BITLAB_BACKEND=reference to run the ops in plain torch."
                )
            count = torch.cuda.get_device_properties(device).multi_processor_count
            self._multiprocessors[device] = count
        return count

    def _launch(
        self, device: torch.device, function: Callable[..., int], arguments: list[Any]
    ) -> int:
        """Calls a function of the library with the current stream of a device."""
        index = device.index
        # Not by torch.cuda, which makes objects: a decoder launches hundreds of times a token.
        stream = torch._C._cuda_getCurrentRawStream(index)
        if index == torch._C._cuda_getDevice():
            return function(*arguments, stream)
        with torch.cuda.device(index):
            return function(*arguments, stream)

    def _call(self, op: str, name: str, outputs: tuple[Tensor, ...], *arguments: Any) -> None:
        """Checks where the tensors are, calls ``bk_cuda_<name>`` and raises what it reports."""
        device = outputs[0].device
        converted, held = [], []
        for argument in arguments:
            if isinstance(argument, Tensor):
                if argument.device != device:
                    raise ArgumentError(
                        f"{op}: all tensors must be on {device}, got one on {argument.device}"
                    )
                pointer = argument.data_ptr()
                if pointer < LOWEST_ADDRESS and argument.numel():
                    made = made_memory(op, argument)
                    held.append(made)
                    pointer = made.data_ptr()
                argument = pointer
            converted.append(argument)
        status = self._launch(device, getattr(self._library, f"bk_cuda_{name}"), converted)
        if status != 0:
            text = f"{op}: {self._library.bk_cuda_last_error().decode()}"
            raise ArgumentError(text) if status == INVALID_ARGUMENT else BackendError(text)

    def _tokens(self, op: str, name: str, tensor: Tensor) -> tuple[Tensor, int, int]:
        """Returns a tensor [..., K] with contiguous rows, how many they are, and their distance."""
        columns = tensor.shape[-1]
        count = tensor.numel() // columns
        if count > _MOST_ELEMENTS:
            raise ArgumentError(
                f"{op}: {name} must be at most {_MOST_ELEMENTS} tokens, got {count}"
            )
        if tensor.is_contiguous():
            return tensor, count, columns
        tokens = tensor.reshape(count, columns)
        tokens = tokens if tokens.stride(1) == 1 else tokens.contiguous()
        return tokens, count, tokens.stride(0)

    def _workspace(
        self,
        product: int,
        op: str,
        device: torch.device,
        shape: tuple[int, int, int],
        columns: int,
        multiplied: bool,
    ) -> tuple[Tensor, int]:
        """Scratch memory of a product [M, N, K], and the multiprocessors it is made for."""
        count = self._count_multiprocessors(op, device)
        size = self._library.bk_cuda_linear_workspace(
            product, *shape, columns, int(multiplied), count
        )
        return self._scratch(max(size, 1), device), count

    def _scratch(self, size: int, device: torch.device) -> Tensor:
        """Bytes from torch's allocator, which aligns all that it gives to 512."""
        return torch.empty(size, dtype=torch.uint8, device=device)

    def find_invalid_code(self, qweights: Sequence[Tensor]) -> int | None:
        """See `bitcore.reference.find_invalid_code`: run once a file, so torch will do."""
        return reference.find_invalid_code(qweights)

    def quantize_activation(self, x: Tensor, per_tensor: bool) -> tuple[Tensor, Tensor]:
        """See `bitcore.reference.quantize_activation`."""
        op, device = "bitlab::quantize_activation", x.device
        self._count_multiprocessors(op, device)
        tokens, count, stride = self._tokens(op, "x", x)
        codes = torch.empty(x.shape, dtype=torch.int8, device=device)
        scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=device)
        workspace = self._scratch(_QUANTIZE_WORKSPACE, device)
        self._call(
            op, "quantize_i8", (codes, scale, workspace), tokens, TYPE_CODES[x.dtype], stride,
            codes, scale, count, x.shape[-1], int(per_tensor), workspace,
        )  # fmt: skip
        return codes, scale

    def matmul(self, codes: Tensor, qweight: Tensor, out_features: int) -> Tensor:
        """See `bitcore.reference.matmul`."""
        op = "bitlab::matmul"
        tokens, many, _ = self._tokens(op, "codes", codes)
        shape = many, out_features, codes.shape[-1]
        acc = torch.empty((*codes.shape[:-1], out_features), dtype=torch.int32, device=codes.device)
        workspace, count = self._workspace(_I8_T2, op, codes.device, shape, 0, False)
        self._call(
            op, "matmul_i8_t2_i32", (acc, workspace), tokens.contiguous(), qweight.contiguous(),
            acc, *shape, workspace, count,
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
        return self._linear(
            x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier, ()
        )

    def prepare_linear(
        self,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        multiplier: Tensor | None = None,
    ) -> Callable[[Tensor, torch.Size, torch.dtype], Tensor]:
        """Returns `linear` of these weights, of an input, its shape and its dtype."""
        linear = self._linear
        return lambda x, shape, dtype: linear(
            x, qweight, weight_scale, bias, out_features, activation, dtype, multiplier, ()
        )

    def linear_with_codes(
        self,
        x: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        out_dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `bitcore.reference.linear_with_codes`: x is read once where K is a multiple of 64."""
        args = (x, qweight, weight_scale, bias, out_features, activation, out_dtype, multiplier)
        if x.shape[-1] % _BLOCK != 0:
            codes, scale = self.quantize_activation(x, activation == "int8_per_tensor")
            return self.linear(*args), codes, scale
        codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        scale = torch.empty((*x.shape[:-1], 1), dtype=torch.float32, device=x.device)
        return self._linear(*args, (codes, scale)), codes, scale

    def _linear(
        self,
        x: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        bias: Tensor | None,
        out_features: int,
        activation: str,
        out_dtype: torch.dtype,
        multiplier: Tensor | None,
        kept: tuple[Tensor, ...],
    ) -> Tensor:
        """A layer; the codes and scales of x stay in `kept`, if given."""
        op = "bitlab::linear"
        tokens, many, stride = self._tokens(op, "x", x)
        shape = many, out_features, x.shape[-1]
        scales = _scales(weight_scale, multiplier)
        y = x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)
        is_float = activation == _FLOAT
        product = (_F32_T2 if x.dtype == torch.float32 else _F16_T2) if is_float else _I8_T2
        workspace, count = self._workspace(
            product, op, x.device, shape, scales[2], multiplier is not None
        )
        bias = None if bias is None else bias.contiguous()
        quantized = () if is_float else (int(activation == "int8_per_tensor"),)
        name = "linear_float_t2" if is_float else "linear_codes_i8_t2" if kept else "linear_i8_t2"
        self._call(
            op, name, (y, *kept, workspace), tokens, TYPE_CODES[x.dtype], stride,
            qweight.contiguous(), *scales, bias,
            0 if bias is None else TYPE_CODES[bias.dtype], y, TYPE_CODES[out_dtype], *kept,
            *shape, *quantized, workspace, count,
        )  # fmt: skip
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
        op, out_features = "bitlab::linear_int8", qweight.shape[0]
        tokens, many, stride = self._tokens(op, "x", x)
        shape = many, out_features, x.shape[-1]
        y = x.new_empty((*x.shape[:-1], out_features), dtype=out_dtype)
        workspace, count = self._workspace(_I8_I8, op, x.device, shape, 0, False)
        bias = None if bias is None else bias.contiguous()
        self._call(
            op, "linear_i8_i8", (y, workspace), tokens, TYPE_CODES[x.dtype], stride,
            qweight.contiguous(), weight_scale.contiguous(), bias,
            0 if bias is None else TYPE_CODES[bias.dtype], y, TYPE_CODES[out_dtype],
            *shape, workspace, count,
        )  # fmt: skip
        return y

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
        op, in_features = "bitlab::unpack_weight", qweight.shape[1]
        self._count_multiprocessors(op, qweight.device)
        weight = torch.empty((out_features, in_features), dtype=dtype, device=qweight.device)
        self._call(
            op, "unpack_t2", (weight,), qweight.contiguous(), *_scales(weight_scale, multiplier),
            weight, TYPE_CODES[dtype], out_features, in_features,
        )  # fmt: skip
        return weight

    def input_gradient(
        self,
        dy: Tensor,
        qweight: Tensor,
        weight_scale: Tensor,
        out_features: int,
        dtype: torch.dtype,
        multiplier: Tensor | None = None,
    ) -> Tensor:
        """See `bitcore.reference.input_gradient`: through the packed weight; of many tokens, whose
        activations take more memory, as the reference does it.
        """
        op, in_features = "bitlab::input_gradient", qweight.shape[1]
        if dy.dtype != torch.float32 and dy.numel() >= UNPACKED_TOKENS * out_features:
            weight = self.unpack_weight(qweight, weight_scale, out_features, dy.dtype, multiplier)
            with torch.autocast(dy.device.type, enabled=False):
                return (dy @ weight).to(dtype)
        self._count_multiprocessors(op, dy.device)
        tokens, count, stride = self._tokens(op, "dy", dy)
        dx = torch.empty((*dy.shape[:-1], in_features), dtype=dtype, device=dy.device)
        self._call(
            op, "input_gradient", (dx,), tokens, TYPE_CODES[dy.dtype], stride,
            qweight.contiguous(), *_scales(weight_scale, multiplier), dx, TYPE_CODES[dtype],
            count, out_features, in_features,
        )  # fmt: skip
        return dx
