"""The parts of a layer as vLLM multiplies it: one op call each."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore.lookup import lookup_rows
from bitcore.norm import rms_norm


class Part(nn.Module):
    """Some rows of a layer.

    Attributes:
        rows: How many.
    """

    rows: int

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Multiplies x [..., k]; returns [..., rows] of its dtype."""
        raise NotImplementedError

    def lookup(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """Looks rows up by their numbers, int [...]; returns [..., k] of dtype."""
        raise NotImplementedError


class DensePart(Part):
    """Rows that stay float beside ternary ones.

    Args:
        weight: float [rows, k].
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.rows = weight.shape[0]
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Part`."""
        return F.linear(x, self.weight, bias)


class Int8Part(Part):
    """Rows in int8, with a float32 scale each.

    Args:
        qweight: int8 [rows, k]; where inputs are spread over processes, as
            `bitcore.across.filled_up` makes it.
        scale: float32 [rows].
    """

    def __init__(self, qweight: Tensor, scale: Tensor) -> None:
        super().__init__()
        self.rows = scale.shape[0]
        self.qweight = nn.Parameter(qweight, requires_grad=False)
        # A buffer would be rounded along with the model; so is no parameter of vLLM's.
        self.scale = nn.Parameter(scale, requires_grad=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Part`."""
        y: Tensor = torch.ops.bitlab.linear_int8(x, self.qweight, self.scale, bias, x.dtype)
        return y

    def lookup(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Part`."""
        codes = F.embedding(indices, self.qweight).float()
        return (codes * self.scale[indices].unsqueeze(-1)).to(dtype)


class TernaryPart(Part):
    """Packed ternary rows, behind an RMS norm of their input where they have one.

    Args:
        qweight: uint8 [ceil(rows / 4), k].
        scale: float32 [rows] or [rows, k / G].
        multiplier: uint8 [rows, k / G], or None.
        activation: How the op quantizes x.
        norm: Weight of the norm, float [k], or None.
    """

    def __init__(
        self,
        qweight: Tensor,
        scale: Tensor,
        multiplier: Tensor | None,
        activation: str,
        norm: Tensor | None,
    ) -> None:
        super().__init__()
        self.rows, self.activation = scale.shape[0], activation
        self.qweight = nn.Parameter(qweight, requires_grad=False)
        self.scale = nn.Parameter(scale, requires_grad=False)
        self.multiplier = optional(multiplier)
        self.norm = optional(norm)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """See `Part`."""
        normed = x if self.norm is None else rms_norm(x, self.norm)
        y: Tensor = torch.ops.bitlab.linear(
            normed,
            self.qweight,
            self.scale,
            bias,
            self.rows,
            self.activation,
            x.dtype,
            self.multiplier,
        )
        return y

    def lookup(self, indices: Tensor, dtype: torch.dtype) -> Tensor:
        """See `Part`."""
        return lookup_rows(indices, self.qweight, self.scale, self.rows, dtype, self.multiplier)


def optional(tensor: Tensor | None) -> nn.Parameter | None:
    """Returns a constant as a parameter, which vLLM neither rounds nor saves as a buffer."""
    return None if tensor is None else nn.Parameter(tensor, requires_grad=False)
