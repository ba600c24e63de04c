"""A latent weight that came packed computes and trains as one that is packed where it is used."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor

from bitcore.errors import ArgumentError
from bitcore.ops import pack_weight, qat_linear
from bitcore.qat_packed import qat_packed

CASES = [
    ("per_tensor", None, "int8_per_token", torch.float32),
    ("per_channel", None, "int8_per_tensor", torch.bfloat16),
    ("per_group", 64, "int8_per_token", torch.float32),
    ("per_group_float32", 64, "float", torch.float32),
]


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, case: tuple[str, int | None, str], packed: bool
) -> list[Tensor]:
    """The output and all gradients."""
    granularity, group, activation = case
    leaves = [one.detach().requires_grad_() for one in (x, weight, bias) if one is not None]
    given = leaves if bias is not None else [*leaves, None]
    if packed:
        qweight, scale, *rest = pack_weight(weight, granularity, group)
        y = qat_packed(*given, qweight, scale, activation, *rest)  # type: ignore[arg-type]
    else:
        y = qat_linear(*given, granularity, group, activation)  # type: ignore[arg-type]
    y.float().square().sum().backward()
    assert y.grad_fn is not None
    return [y.detach(), *(one.grad for one in leaves if one.grad is not None)]


# On either side of the number of tokens from which `qat_linear` packs again.
@pytest.mark.parametrize("tokens", [3, 150])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("granularity", "group", "activation", "dtype"), CASES)
def test_equals_qat_linear(
    backend: str, granularity: str, group: int | None, activation: str, dtype: torch.dtype,
    tokens: int, autocast: bool,
) -> None:  # fmt: skip
    x, weight = torch.randn(tokens, 128).to(dtype), torch.randn(37, 128)
    bias = None if group else torch.randn(37)
    case = granularity, group, activation
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    with context:
        found, expected = (run(x, weight, bias, case, packed) for packed in (True, False))
    assert len(found) == len(expected) == (3 if group else 4)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_only_asked_gradients_are_computed() -> None:
    x, weight = torch.randn(3, 64), torch.randn(8, 64)
    qweight, scale = pack_weight(weight, "per_tensor", None)
    y = qat_packed(x.requires_grad_(), weight, None, qweight, scale, "int8_per_token")
    y.sum().backward()
    assert x.grad is not None
    assert weight.grad is None


def test_a_negated_view_is_read_as_its_values() -> None:
    x, weight = torch.randn(3, 64), torch.randn(8, 64)
    packed = pack_weight(weight, "per_tensor", None)
    negated = qat_packed(torch._neg_view(x), weight, None, *packed, "int8_per_token")
    assert torch.equal(negated, qat_packed(-x, weight, None, *packed, "int8_per_token"))


def test_sizes_are_checked() -> None:
    qweight, scale = pack_weight(torch.randn(8, 64), "per_tensor", None)
    with pytest.raises(ArgumentError, match="x must be"):
        qat_packed(torch.randn(3, 65), torch.randn(8, 65), None, qweight, scale, "int8_per_token")
