"""Stack: how one tensor holds the matrices of all experts, and how each becomes ternary."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from bitcore import estimators, ops
from bitcore.checks import check_group_size, check_in_features
from bitcore.config import BitQuantConfig
from bitlayers.state import Packed


@dataclass(frozen=True)
class Stack:
    """One projection of all experts.

    Each expert's part of the tensor is a matrix of N rows, which can be two logical ones: the gate
    and the up projection, one above the other or their rows in turn. With a scale a tensor each of
    these has its own. Scales are kept a row, so that one product serves both.

    Attributes:
        name: The Parameter's name.
        experts: E.
        out_features: N, the rows of an expert's matrix.
        in_features: K.
        config: How it is quantized.
        parts: Logical matrices in an expert's matrix.
        interleaved: Whether their rows take turns.
        transposed: Whether the tensor is [E, K, N].
        flat: Whether it has two dimensions, the experts' parts one below the other.
        unused: How many matrices the tensor holds behind those of the experts, which nobody
            multiplies with; they are not packed.
    """

    name: str
    experts: int
    out_features: int
    in_features: int
    config: BitQuantConfig
    parts: int = 1
    interleaved: bool = False
    transposed: bool = False
    flat: bool = False
    unused: int = 0

    def __post_init__(self) -> None:
        """Checks the sizes.

        Raises:
            ArgumentError: K is too large, or groups do not divide it.
        """
        check_in_features(self.name, self.in_features)
        granularity, size = self.config.granularity, self.config.group_size
        check_group_size(self.name, self.in_features, granularity, size or 0)

    def __str__(self) -> str:
        config = self.config
        group = f" of {config.group_size}" if config.group_size else ""
        return (
            f"{self.experts} x [{self.out_features}, {self.in_features}] "
            f"{config.weight_granularity}{group}, activation {config.activation}"
        )

    @property
    def granularity(self) -> str:
        """Which scales an expert's matrix is multiplied with: one a tensor is kept a row."""
        held = self.config.granularity
        return "per_channel" if held == "per_tensor" else held

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """The shape of an expert's part of the float tensor."""
        sizes = self.out_features, self.in_features
        return sizes[::-1] if self.transposed else sizes

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the float tensor."""
        count, (rows, columns) = self.experts + self.unused, self.matrix_shape
        return (count * rows, columns) if self.flat else (count, rows, columns)

    @property
    def weights(self) -> int:
        """How many weights all experts have."""
        return self.experts * self.out_features * self.in_features

    def apart(self, weight: Tensor) -> Tensor:
        """Returns the experts' parts of the float tensor, [E, ...]: a view."""
        matrices = weight.view(-1, *self.matrix_shape) if self.flat else weight
        return matrices[: self.experts] if self.unused else matrices

    def together(self, matrices: list[Tensor]) -> Tensor:
        """Returns the float tensor of these [N, K], with zeros where nobody looks."""
        parts = torch.stack([self.stored(matrix) for matrix in matrices])
        unused = parts.new_zeros(self.unused, *self.matrix_shape)
        return torch.cat([parts, unused]).view(self.shape)

    def oriented(self, matrix: Tensor) -> Tensor:
        """Returns an expert's part of the tensor as [N, K]."""
        return matrix.t().contiguous() if self.transposed else matrix

    def stored(self, matrix: Tensor) -> Tensor:
        """Returns a matrix [N, K] as the tensor holds it."""
        return matrix.t().contiguous() if self.transposed else matrix

    def scales(self, weight: Tensor) -> tuple[Tensor, ...]:
        """Returns step and scale a row, and multipliers of groups, of an expert's [N, K]; see
        `bitcore.ops.estimate`.
        """
        config = self.config
        quantizer, granularity = config.weight_quantizer, config.granularity
        if granularity != "per_tensor":
            return ops.estimate(weight, quantizer, granularity, config.group_size)
        held = [
            ops.estimate(part.contiguous(), quantizer, granularity, None)
            for part in self.split(weight.detach())
        ]
        return tuple(self._rows(list(values)) for values in zip(*held, strict=True))

    @property
    def learns(self) -> bool:
        """Whether the estimator trains its scales."""
        return estimators.get_estimator(self.config.weight_quantizer).learned

    @property
    def learned_shape(self) -> tuple[int, ...]:
        """The shape of the learned scales of all experts: one for each logical matrix, [E, parts],
        for each row, [E, N], or for each group, [E, N, K / G].
        """
        size = self.config.group_size
        if size is not None:
            return self.experts, self.out_features, self.in_features // size
        rows = self.parts if self.config.granularity == "per_tensor" else self.out_features
        return self.experts, rows

    def start_scale(self, weight: Tensor) -> Tensor:
        """Returns the learned scale of an expert's [N, K] as its estimator starts it."""
        config = self.config
        # As it is before it is brought to two levels.
        granularity = "per_group_float32" if config.group_size else config.granularity
        held = [
            ops.estimate(part.contiguous(), config.weight_quantizer, granularity, config.group_size)
            for part in self.split(weight.detach())
        ]
        return torch.cat([step for step, *_ in held])

    def of_rows(self, learned: Tensor) -> Tensor:
        """Returns an expert's learned scale as it is multiplied with: one a tensor for each row.

        Its gradient is that of a layer with this scale: as for all weights that share it.
        """
        if self.config.granularity != "per_tensor":
            return learned
        each = self.out_features // self.parts
        rows = torch.arange(self.out_features, device=learned.device)
        scale = learned[rows % self.parts if self.interleaved else rows // each]
        if scale.requires_grad:
            # The rows' have been divided by the root of the number of weights of a row.
            scale.register_hook(lambda gradient: gradient * each**-0.5)  # type: ignore[no-untyped-call]
        return scale

    def split(self, matrix: Tensor) -> list[Tensor]:
        """Returns the rows of an expert's [N, K], or of what has as many, that can have a scale in
        common: the logical matrices with a scale a tensor, else all in one.
        """
        if self.config.granularity != "per_tensor":
            return [matrix]
        if self.interleaved:
            return [matrix[part :: self.parts] for part in range(self.parts)]
        return list(matrix.chunk(self.parts))

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Returns what `split` has parted."""
        if self.interleaved and len(parts) > 1:
            return torch.stack(parts, 1).flatten(0, 1)
        return torch.cat(parts)

    def _rows(self, values: list[Tensor]) -> Tensor:
        """Returns values [1] of the logical matrices as one a row, [N]."""
        each = self.out_features // self.parts
        if self.interleaved:
            return torch.cat(values).repeat(each)
        return torch.cat(values).repeat_interleave(each)

    @torch.no_grad()
    def pack(self, matrix: Tensor, learned: Tensor | None = None) -> Packed:
        """Packs an expert's part of the tensor: qweight, its scale a row, and multipliers.

        Args:
            matrix: The part.
            learned: The expert's learned scale; None to take what the estimator says.
        """
        weight = self.oriented(matrix)
        if learned is None:
            step, *scales = self.scales(weight)
        else:
            rows = self.of_rows(learned.detach().float())
            step, *levels = estimators.learned_scales(rows, self.granularity)
            scales = [one for one in levels if one is not None]
        return ops.pack_codes(weight, step), *scales

    def pack_all(self, weight: Iterable[Tensor], learned: Tensor | None = None) -> Packed:
        """Packs the experts' parts of the tensor, one after another; see `pack`."""
        made: Packed = ()
        for expert, matrix in enumerate(weight):
            packed = self.pack(matrix, None if learned is None else learned[expert])
            if not made:
                made = tuple(one.new_empty(self.experts, *one.shape) for one in packed)
            for whole, one in zip(made, packed, strict=True):
                whole[expert] = one
        return made

    def packed_tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Returns dtype and shape of each packed tensor of all experts, by the end of its name."""
        experts, rows, size = self.experts, self.out_features, self.config.group_size
        qweight = torch.uint8, (experts, (rows + 3) // 4, self.in_features)
        if size is None:
            return {"qweight": qweight, "qweight_scale": (torch.float32, (experts, rows))}
        groups = (experts, rows, self.in_features // size)
        if self.granularity != "per_group":
            return {"qweight": qweight, "qweight_scale": (torch.float32, groups)}
        return {
            "qweight": qweight,
            "qweight_scale": (torch.float32, groups[:2]),
            "qweight_multiplier": (torch.uint8, groups),
        }
