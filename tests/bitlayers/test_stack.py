"""Stacks of experts' matrices: how they lie, and that each logical matrix has its own scale."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from bitcore import BitQuantConfig, ops
from bitcore.errors import ArgumentError
from bitlayers.stack import Stack

GROUPS: dict[str, Any] = {"weight_granularity": "per_group", "group_size": 64}
SCHEMES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"weight_granularity": "per_channel"},
    "group": GROUPS,
    "float32 groups": {**GROUPS, "group_scale_dtype": "float32"},
    "absmax": {"weight_quantizer": "absmax"},
}


def logical(matrix: torch.Tensor, parts: int, interleaved: bool) -> list[torch.Tensor]:
    """The matrices that a model calls gate and up, each for itself."""
    rows = len(matrix) // parts
    if interleaved:
        return [matrix[part::parts].contiguous() for part in range(parts)]
    return [matrix[part * rows : (part + 1) * rows] for part in range(parts)]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(("interleaved", "transposed"), [*product((False, True), (False, True))])
def test_each_logical_matrix_is_packed_as_a_layer_would(
    scheme: str, interleaved: bool, transposed: bool
) -> None:
    torch.manual_seed(3)
    config = BitQuantConfig(**SCHEMES[scheme])
    stack = Stack("gate_up_proj", 3, 10, 128, config, 2, interleaved, transposed)
    matrices = torch.randn(3, 10, 128)
    # Gate and up of one expert, and the experts, of very different size.
    for expert, part in product(range(3), range(2)):
        rows = slice(part, None, 2) if interleaved else slice(5 * part, 5 * part + 5)
        matrices[expert, rows] *= 10.0 ** (part + expert)
    tensor = matrices.transpose(1, 2).contiguous() if transposed else matrices
    assert tuple(tensor.shape) == stack.shape
    packed = stack.pack_all(tensor)
    shapes = [(kind, tuple(shape)) for kind, shape in stack.packed_tensors().values()]
    assert [(one.dtype, tuple(one.shape)) for one in packed] == shapes
    for expert in range(3):
        qweight, scale, *multiplier = (one[expert] for one in packed)
        whole = ops.unpack_weight(qweight, scale, 10, torch.float32, *multiplier)
        parts = logical(whole, 2, interleaved)
        for part, matrix in zip(parts, logical(matrices[expert], 2, interleaved), strict=True):
            granularity, size = config.granularity, config.group_size
            step, *alone = ops.estimate(matrix, config.weight_quantizer, granularity, size)
            codes = ops.pack_codes(matrix, step)
            wanted = ops.unpack_weight(codes, alone[0], 5, torch.float32, *alone[1:])
            assert torch.equal(part, wanted), (expert, scheme)
        back = stack.stored(whole)
        assert tuple(back.shape) == stack.shape[1:]
        assert torch.equal(stack.oriented(back), whole)


def test_groups_have_to_divide_the_inputs() -> None:
    with pytest.raises(ArgumentError, match="down_proj: in_features must be a multiple"):
        Stack("down_proj", 2, 8, 96, BitQuantConfig(**GROUPS))
