"""ggml's ``mul_mat_id`` with TQ2_0 as a peer of bench/experts.py; see `ggml_peer`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from ggml_peer import BLOCK, TYPE_F32, TYPE_TQ2_0, Buffers, Ggml
from torch import Tensor

TYPE_I32 = 26
_GRAPH_NODES = 8
# Of a graph: two weights, two products, what the gate gives, and the choice.
_TENSORS = 6


def takes(hidden: int, wide: int) -> bool:
    """Tells whether TQ2_0 can hold matrices of these widths."""
    return hidden % BLOCK == 0 and wide % BLOCK == 0


class GgmlExperts:
    """The experts of a layer: up, gate and down, without the weighted sum of a token's experts.

    Args:
        ggml: The library.
        experts: E.
        hidden: H.
        wide: I; the first matrix of an expert is [2 I, H], the second [H, I].
    """

    def __init__(self, ggml: Ggml, experts: int, hidden: int, wide: int) -> None:
        self._ggml = ggml
        self._experts, self._hidden, self._wide = experts, hidden, wide
        sizes = [ggml.row_size(TYPE_TQ2_0, columns) for columns in (hidden, wide)]
        self._up = torch.empty((experts, 2 * wide, sizes[0]), dtype=torch.uint8)
        self._down = torch.empty((experts, hidden, sizes[1]), dtype=torch.uint8)
        self._buffers = Buffers(ggml)
        self._context = 0
        self._keep: list[Tensor] = []

    @property
    def expert_bytes(self) -> int:
        """Bytes of weights of one expert."""
        return (self._up.numel() + self._down.numel()) // self._experts

    def set_expert(self, number: int, up: Tensor, down: Tensor) -> None:
        """Takes the matrices of an expert, float32 [2 I, H] and [H, I]."""
        self._up[number] = self._ggml.quantize(up)
        self._down[number] = self._ggml.quantize(down)

    def calls(self, x: Tensor, choices: list[Tensor]) -> list[Callable[[], object]]:
        """Returns one call for each choice [M, k] of experts for x [M, H].

        A later call of this method ends the life of what it returned before.
        """
        ggml, (tokens, chosen) = self._ggml, choices[0].shape
        self.close()
        ggml.backend_cpu_set_n_threads(ggml.backend, torch.get_num_threads())
        each = _TENSORS * ggml.tensor_overhead() + ggml.graph_overhead_custom(_GRAPH_NODES, False)
        self._context = context = ggml.new_context((len(choices) + 1) * (each + 1024))
        self.y = torch.empty((tokens, chosen, self._hidden))
        inner = torch.empty((tokens, chosen, 2 * self._wide))
        gated = torch.empty((tokens, chosen, self._wide))
        x = x.float().contiguous()
        ids = [choice.int().contiguous() for choice in choices]
        self._keep = [self.y, inner, gated, x, *ids]
        place = self._buffers.place
        source = ggml.new_tensor_3d(context, TYPE_F32, self._hidden, 1, tokens)
        place(source, x)
        weights = []
        for packed, columns in ((self._up, self._hidden), (self._down, self._wide)):
            weight = ggml.new_tensor_3d(
                context, TYPE_TQ2_0, columns, packed.shape[1], self._experts
            )
            place(weight, packed)
            weights.append(weight)
        result: list[Callable[[], object]] = []
        for one in ids:
            index = ggml.new_tensor_2d(context, TYPE_I32, chosen, tokens)
            place(index, one)
            up = ggml.mul_mat_id(context, weights[0], source, index)
            place(up, inner)
            gate = ggml.swiglu(context, up)
            place(gate, gated)
            down = ggml.mul_mat_id(context, weights[1], gate, index)
            place(down, self.y)
            graph = ggml.new_graph_custom(context, _GRAPH_NODES, False)
            ggml.build_forward_expand(graph, down)
            result.append(partial(ggml.backend_graph_compute, ggml.backend, graph))
        return result

    def close(self) -> None:
        """Frees what `calls` made."""
        self._buffers.close()
        if self._context:
            self._ggml.free(self._context)
            self._context = 0
