"""ggml's TQ2_0 (ternary, 2.06 bits a weight) as a peer, through llama-cpp-python's libraries.

A graph of one ``ggml_mul_mat`` runs on ggml's CPU backend, which quantizes the activations itself.
The package is only looked up, never imported: its libraries are called with ctypes.
"""

from __future__ import annotations

import ctypes
import importlib.util
from collections.abc import Callable
from ctypes import c_bool, c_int, c_int64, c_size_t, c_void_p
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

TYPE_F32, TYPE_TQ2_0 = 0, 35
BLOCK = 256  # weights of a TQ2_0 block: K must be a multiple
_ALIGNMENT = 64
_GRAPH_NODES = 4


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool))


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "ggml_init": (c_void_p, (_InitParams,)),
    "ggml_free": (None, (c_void_p,)),
    "ggml_tensor_overhead": (c_size_t, ()),
    "ggml_graph_overhead_custom": (c_size_t, (c_size_t, c_bool)),
    "ggml_new_tensor_2d": (c_void_p, (c_void_p, c_int, c_int64, c_int64)),
    "ggml_new_tensor_3d": (c_void_p, (c_void_p, c_int, c_int64, c_int64, c_int64)),
    "ggml_mul_mat": (c_void_p, (c_void_p, c_void_p, c_void_p)),
    "ggml_mul_mat_id": (c_void_p, (c_void_p, c_void_p, c_void_p, c_void_p)),
    "ggml_swiglu": (c_void_p, (c_void_p, c_void_p)),
    "ggml_new_graph_custom": (c_void_p, (c_void_p, c_size_t, c_bool)),
    "ggml_build_forward_expand": (None, (c_void_p, c_void_p)),
    "ggml_row_size": (c_size_t, (c_int, c_int64)),
    "ggml_quantize_chunk": (
        c_size_t,
        (c_int, c_void_p, c_void_p, c_int64, c_int64, c_int64, c_void_p),
    ),
    "ggml_backend_cpu_buffer_from_ptr": (c_void_p, (c_void_p, c_size_t)),
    "ggml_backend_buffer_free": (None, (c_void_p,)),
    "ggml_backend_tensor_alloc": (c_int, (c_void_p, c_void_p, c_void_p)),
    "ggml_backend_graph_compute": (c_int, (c_void_p, c_void_p)),
    "ggml_backend_cpu_init": (c_void_p, ()),
    "ggml_backend_cpu_set_n_threads": (None, (c_void_p, c_int)),
}


class Ggml:
    """ggml's libraries and one CPU backend."""

    def __init__(self, folder: Path) -> None:
        # Dependencies first; torch's OpenMP runtime is loaded already and serves ggml too.
        loaded = [
            ctypes.CDLL(str(folder / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
            for name in ("ggml-base", "ggml-cpu")
        ]
        for name, (result, arguments) in _SIGNATURES.items():
            function = next(getattr(library, name) for library in loaded if hasattr(library, name))
            function.restype, function.argtypes = result, arguments
            setattr(self, name.removeprefix("ggml_"), function)
        self.backend = self.backend_cpu_init()

    @classmethod
    def load(cls) -> Ggml | None:
        """Returns ggml, or None where llama-cpp-python is not installed."""
        found = importlib.util.find_spec("llama_cpp")
        if found is None or found.origin is None:
            return None
        folder = Path(found.origin).parent / "lib"
        return cls(folder) if (folder / "libggml-cpu.so").is_file() else None

    def new_context(self, memory: int) -> int:
        """Returns a context of so many bytes, for tensors that lie elsewhere."""
        context: int = self.init(_InitParams(memory, None, True))
        return context

    def quantize(self, weight: Tensor) -> Tensor:
        """Returns float32 [N, K] in TQ2_0, uint8 [N, bytes of a row]."""
        rows, columns = weight.shape
        size = self.row_size(TYPE_TQ2_0, columns)
        packed = torch.empty((rows, size), dtype=torch.uint8)
        weight = weight.contiguous()
        self.quantize_chunk(
            TYPE_TQ2_0, weight.data_ptr(), packed.data_ptr(), 0, rows, columns, None
        )
        return packed


class Buffers:
    """Torch's memory, lent to ggml's tensors."""

    def __init__(self, ggml: Ggml) -> None:
        self._ggml = ggml
        self._held: dict[int, int] = {}

    def place(self, ggml_tensor: int, tensor: Tensor) -> None:
        """Makes a ggml tensor use a tensor's memory."""
        pointer, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        assert pointer % _ALIGNMENT == 0
        if pointer not in self._held:
            self._held[pointer] = self._ggml.backend_cpu_buffer_from_ptr(pointer, size)
        self._ggml.backend_tensor_alloc(self._held[pointer], ggml_tensor, pointer)

    def close(self) -> None:
        """Takes it all back."""
        for buffer in self._held.values():
            self._ggml.backend_buffer_free(buffer)
        self._held = {}


class GgmlLinear:
    """Distinct copies of one TQ2_0 matrix, multiplied with one input."""

    def __init__(self, ggml: Ggml, weight: Tensor, copies: int) -> None:
        self._ggml = ggml
        self.out_features, self.in_features = weight.shape
        self._packed = [ggml.quantize(weight)]
        self._packed += [self._packed[0].clone() for _ in range(copies - 1)]
        self.weight_bytes = self._packed[0].numel()
        self._context = 0
        self._buffers = Buffers(ggml)
        self._keep: tuple[Tensor, ...] = ()

    def calls(self, x: Tensor) -> list[Callable[[], object]]:
        """Returns one call for each copy: y = x @ w.T with torch's thread count.

        A later call of this method ends the life of what it returned before.
        """
        ggml, count = self._ggml, len(self._packed)
        self.close()
        ggml.backend_cpu_set_n_threads(ggml.backend, torch.get_num_threads())
        each = 2 * ggml.tensor_overhead() + ggml.graph_overhead_custom(_GRAPH_NODES, False)
        memory = (count + 1) * (each + 1024)
        self._context = context = ggml.new_context(memory)
        self.y = torch.empty((x.shape[0], self.out_features))
        x = x.float().contiguous()
        self._keep = (x, self.y)
        source = ggml.new_tensor_2d(context, TYPE_F32, self.in_features, x.shape[0])
        self._buffers.place(source, x)
        result: list[Callable[[], object]] = []
        for packed in self._packed:
            weight = ggml.new_tensor_2d(context, TYPE_TQ2_0, self.in_features, self.out_features)
            self._buffers.place(weight, packed)
            product = ggml.mul_mat(context, weight, source)
            self._buffers.place(product, self.y)
            graph = ggml.new_graph_custom(context, _GRAPH_NODES, False)
            ggml.build_forward_expand(graph, product)
            result.append(partial(ggml.backend_graph_compute, ggml.backend, graph))
        return result

    def close(self) -> None:
        """Frees what `calls` made."""
        self._buffers.close()
        if self._context:
            self._ggml.free(self._context)
            self._context = 0
