"""Activation codes kept for the backward pass: shared where that is right, and only there."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bitcore import gradients, ops, saved
from bitcore.kernels import cpu_unpack
from bitcore.reference import multiplied_in

K = 64


def run(x: Tensor, weight: Tensor, activation: str = "int8_per_token") -> Tensor:
    return ops.qat_linear(x, weight, None, "per_tensor", None, activation)


def saved_codes(call: Callable[[], Tensor]) -> tuple[list[int], Tensor]:
    """Returns where the int8 tensors lie that a forward pass keeps, and its output."""
    found = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.dtype == torch.int8:
            found.append(tensor.data_ptr())
        return tensor if tensor.grad_fn is None else tensor.detach()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = call()
    return found, y


@pytest.fixture
def weights() -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(n, K, requires_grad=True) for n in (8, 12)]


def test_readers_of_one_tensor_share(weights: list[Tensor]) -> None:
    x = torch.randn(5, K, requires_grad=True)
    shared, y = saved_codes(lambda: torch.cat([run(x, weight) for weight in weights], -1))
    assert len(shared) == 2
    assert len(set(shared)) == 1
    dy = torch.randn_like(y)
    y.backward(dy)
    parts = torch.split(dy, [8, 12], -1)
    for weight, part in zip(weights, parts, strict=True):
        alone = weight.detach().clone().requires_grad_()
        run(x.detach().clone().requires_grad_(), alone).backward(part)
        assert weight.grad is not None
        assert alone.grad is not None
        assert torch.equal(weight.grad, alone.grad)


def test_a_write_between_ends_the_sharing(weights: list[Tensor]) -> None:
    x = torch.randn(5, K)

    def call() -> Tensor:
        first = run(x, weights[0])
        x.mul_(-1)
        return torch.cat([first, run(x, weights[1])], -1)

    found, y = saved_codes(call)
    assert len(set(found)) == 2
    dy = torch.randn_like(y)
    y.backward(dy)
    for weight, part, sign in zip(weights, torch.split(dy, [8, 12], -1), (-1, 1), strict=True):
        alone = weight.detach().clone().requires_grad_()
        run(sign * x, alone).backward(part)
        assert weight.grad is not None
        assert alone.grad is not None
        assert torch.equal(weight.grad, alone.grad)


def test_other_quantization_or_tensor_is_not_shared(weights: list[Tensor]) -> None:
    x = torch.randn(5, K)
    for second in ((x, "int8_per_tensor"), (x.clone(), "int8_per_token")):
        found, _ = saved_codes(
            lambda s=second: run(x, weights[0]).sum() + run(s[0], weights[1], s[1]).sum()
        )
        assert len(set(found)) == 2


@pytest.mark.parametrize("hooked", [False, True])
def test_nothing_is_kept_alive(weights: list[Tensor], hooked: bool) -> None:
    x = torch.randn(5, K)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda kept: kept, lambda kept: kept)
    with hooks if hooked else nullcontext():
        y = run(x, weights[0])
    gone, codes = weakref.ref(x), saved._last.entry[2]
    assert codes() is not None
    # At once: a cycle would hold a step's memory until the collector comes by.
    gc.disable()
    try:
        del x, y
        assert gone() is None
        assert codes() is None
    finally:
        gc.enable()


def test_checkpointing_recomputes_the_same(weights: list[Tensor]) -> None:
    gradients = []
    for recompute in (False, True):
        x = torch.randn(5, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
        own = [weight.detach().clone().requires_grad_() for weight in weights]

        def block(x: Tensor, own: list[Tensor] = own) -> Tensor:
            return torch.cat([run(x, weight) for weight in own], -1)

        y = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        y.square().sum().backward()
        gradients.append([x.grad, *(weight.grad for weight in own)])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.parametrize("scheme", ["absmean", "step", "learned"])
def test_a_weight_packed_again_gives_the_same_gradients(
    scheme: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x, weight, dy = torch.randn(6, K), torch.randn(10, K), torch.randn(6, 10)
    step = None if scheme == "learned" else torch.tensor([0.5])
    scale = torch.tensor([0.7])

    def step_of(tokens: int) -> tuple[list[Tensor | None], set[torch.dtype]]:
        monkeypatch.setattr(gradients, "_REPACKED_TOKENS", tokens)
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, scale)]
        args = () if scheme == "absmean" else (step, leaves[2] if step is None else scale)
        kept = set()

        def keep(tensor: Tensor) -> Tensor:
            kept.add(tensor.dtype)
            return tensor if tensor.grad_fn is None else tensor.detach()

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            y = ops.qat_linear(
                leaves[0], leaves[1], None, "per_tensor", None, "int8_per_token", *args
            )
        y.backward(dy)
        return [leaf.grad for leaf in leaves], kept

    (kept_gradients, kept), (gradients_again, kept_again) = step_of(7), step_of(6)
    assert torch.uint8 in kept
    assert torch.uint8 not in kept_again
    for first, second in zip(kept_gradients, gradients_again, strict=True):
        assert (first is None) == (second is None)
        assert first is None or torch.equal(first, second)


def assert_within(found: Tensor, a: Tensor, b: Tensor, roundings: int, dtype: torch.dtype) -> None:
    """Checks ``a @ b`` against so many roundings to dtype, and float32 sums, of its terms."""
    unit = (
        roundings * torch.finfo(dtype).eps / 2 + (a.shape[1] + 2) * torch.finfo(torch.float32).eps
    )
    assert bool(((found.double() - a @ b).abs() <= unit * (a.abs() @ b.abs())).all())


@pytest.mark.parametrize("activation", ["int8_per_token", "float"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_blocks_of_gradients(
    dtype: torch.dtype, activation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that divide neither side, in both backward products."""
    monkeypatch.setattr(gradients, "_BLOCK_ROWS", 3)
    monkeypatch.setattr(gradients, "_BLOCK_COLUMNS", 48)
    monkeypatch.setattr(cpu_unpack, "_WIDENED_TOKENS", 2)
    torch.manual_seed(0)
    x = torch.randn(7, K).to(dtype).requires_grad_()
    weight = torch.randn(8, K, requires_grad=True)
    dy = torch.randn(7, 8).to(dtype)
    run(x, weight, activation).backward(dy)
    codes, scale = torch.ops.bitlab.quantize_activation(x.detach(), False)
    seen = x.detach().double() if activation == "float" else codes.double() * scale.double()
    packed = ops.pack_weight(weight.detach(), "per_tensor", None)
    used = ops.unpack_weight(*packed, 8, torch.float32).double()
    assert weight.grad is not None
    assert x.grad is not None
    # Sums in float32; in 16 bits only where the CPU multiplies them, then both factors are rounded.
    rounded = multiplied_in(dtype) == torch.bfloat16
    assert_within(weight.grad, dy.double().t(), seen, 2 if rounded else 0, dtype)
    assert_within(x.grad, dy.double(), used, 2 if rounded else 1, dtype)
