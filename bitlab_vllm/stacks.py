"""The stored tensors of all experts of one of vLLM's layers, and what becomes of them.

Each process has whole experts. The alternative, a part of every expert's rows and columns, would
cut and pack all of them anew, and have each token's largest value and integer sums agreed upon
between two products of every layer; so only what the experts give is added up over the processes,
before a token's experts are, and all but one of the numbers added are zero.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError, CheckpointError
from bitlab_vllm.parts import optional
from bitlab_vllm.slices import check_stored, layout


@dataclass(frozen=True)
class Stack:
    """One projection of all experts, as the checkpoint holds it.

    Attributes:
        name: Of the tensor in the float model.
        experts: E.
        rows: N of each expert's matrix.
        columns: K.
        config: How it is quantized; a scale a tensor is stored a row.
    """

    name: str
    experts: int
    rows: int
    columns: int
    config: BitQuantConfig

    @property
    def layout(self) -> dict[str, tuple[torch.dtype, list[int]]]:
        """The dtype and shape of each tensor, by the end of its name."""
        return layout(self.config, (self.experts, self.rows), self.columns)


class ExpertsPart(nn.Module):
    """A projection of the experts that one process has.

    Args:
        stack: What is stored of all experts.
        tensors: What this process has of it, by the ends of the names.
    """

    def __init__(self, stack: Stack, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        self.rows, self.activation = stack.rows, stack.config.activation
        self.qweight = nn.Parameter(tensors["qweight"], requires_grad=False)
        self.scale = nn.Parameter(tensors["qweight_scale"], requires_grad=False)
        self.multiplier = optional(tensors.get("qweight_multiplier"))

    def forward(self, x: Tensor, index: Tensor) -> Tensor:
        """Multiplies x [M, K] with the matrices of experts, those of a token one after the other.

        Args:
            x: float [M, K].
            index: int64 [S], of the experts of this process; zeros come of any other number.

        Returns:
            [S, N] of x's dtype.
        """
        y: Tensor = torch.ops.bitlab.experts_linear(
            x, index, self.qweight, self.scale, None, self.rows, self.activation, x.dtype,
            self.multiplier,
        )  # fmt: skip
        return y


def own_experts(experts: int, rank: int, processes: int) -> range:
    """Returns which experts a process has.

    Raises:
        ArgumentError: It has none.
    """
    own = range(rank * experts // processes, (rank + 1) * experts // processes)
    if not own:
        raise ArgumentError(
            f"bitlab: tensor_parallel_size must be at most {experts}, the number of experts, got "
            f"{processes}\nUse fewer processes."
        )
    return own


class ArrivingExperts:
    """Keeps the tensors of a process's experts until all are there.

    Args:
        module: The name of the experts in the checkpoint, for messages.
        stacks: Their projections.
        own: The experts of this process.
        device: Where they are to lie.
    """

    def __init__(
        self, module: str, stacks: Iterable[Stack], own: range, device: torch.device
    ) -> None:
        self._module, self._own, self._device = module, own, device
        self._stacks = {stack.name: stack for stack in stacks}
        self._tensors: dict[str, dict[str, Tensor]] = {name: {} for name in self._stacks}

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
        """Keeps tensors by their names within the module; yields the names.

        Raises:
            CheckpointError: There is no such tensor, or it is not what it should be.
        """
        for name, loaded in weights:
            stack, _, leaf = name.rpartition("_qweight")
            if stack not in self._stacks:
                raise CheckpointError(
                    f"{self._module}.{name} must be of one of {list(self._stacks)}, got another\n"
                    "The file is of a newer BitLab, or damaged."
                )
            self._tensors[stack][f"qweight{leaf}"] = loaded
            if self._tensors[stack].keys() == self._stacks[stack].layout.keys():
                self._take(stack)
            yield name

    def _take(self, name: str) -> None:
        """Checks all of a projection, and keeps a copy of this process's part alone."""
        stack, held = self._stacks[name], self._tensors[name]
        check_stored(f"{self._module}.{name}_", stack.layout, held)
        start, stop = self._own.start, self._own.stop
        for leaf, tensor in held.items():
            held[leaf] = tensor[start:stop].to(self._device, copy=True)

    def parts(self) -> list[ExpertsPart]:
        """Returns the projections in the order of use.

        Raises:
            CheckpointError: A tensor has not come.
        """
        for name, stack in self._stacks.items():
            for leaf in stack.layout:
                if leaf not in self._tensors[name]:
                    raise CheckpointError(
                        f"{self._module}.{name}_{leaf} must be in the checkpoint, got none\n"
                        "The file is incomplete; fetch or write it again."
                    )
        return [ExpertsPart(stack, self._tensors[name]) for name, stack in self._stacks.items()]


def weighted_sum(rows: Tensor, weights: Tensor) -> Tensor:
    """Returns each token's weighted sum of what its experts gave, in the order of its choice.

    Args:
        rows: float [M k, H].
        weights: float [M, k].

    Returns:
        [M, H] of the dtype of rows.
    """
    weighted = rows.view(*weights.shape, rows.shape[-1]) * weights.unsqueeze(-1)
    return weighted.sum(1).to(rows.dtype)
