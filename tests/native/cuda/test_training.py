"""Training through the CUDA kernels on the emulator: which ones a step runs, and its bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import bitcore
from bitcore import reference
from bitcore.kernels import registry
from bitcore.ops import qat_linear
from tests.native.cuda.host import LAUNCHES, HostKernels


@pytest.fixture
def called(host: HostKernels, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Makes the emulated kernels the CPU's backend; the names of the functions that ran."""
    names: list[str] = []
    call = HostKernels._call

    def noted(self: HostKernels, op: str, name: str, *arguments: Any) -> None:
        names.append(name)
        call(self, op, name, *arguments)

    monkeypatch.setattr(HostKernels, "_call", noted)
    monkeypatch.setitem(registry._chosen, "cpu", host)
    return names


def step(x: Tensor, weight: Tensor, granularity: str, activation: str) -> list[Tensor]:
    """One step's output, and the gradients of its input, weight and bias."""
    leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, torch.ones(len(weight)))]
    y = qat_linear(leaves[0], leaves[1], leaves[2], granularity, 64, activation)
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.parametrize(
    "granularity", ["per_tensor", "per_channel", "per_group", "per_group_float32"]
)
@pytest.mark.parametrize("activation", ["int8_per_token", "int8_per_tensor", "float"])
@pytest.mark.parametrize("tokens", [1, 20])
def test_a_training_step_runs_the_kernels(
    called: list[str], tokens: int, activation: str, granularity: str
) -> None:
    x, weight = torch.randn(tokens, 192), torch.randn(35, 192)
    found = step(x, weight, granularity, activation)
    quantized = activation != "float"
    forward = ["linear_codes_i8_t2"] if quantized else ["linear_float_t2"]
    packing = ["pack_groups_t2"] if granularity == "per_group" else ["weight_scale", "pack_t2"]
    assert called == [*packing, *forward, "input_gradient"]
    with bitcore.use_backend("reference"):
        expected = step(x, weight, granularity, activation)
    assert len(found) == len(expected) == 4
    y, _, dw, db = (torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert y or not quantized
    assert dw
    assert db
    for a, b in zip(found[:2], expected[:2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-4)
    assert not torch.allclose(2 * found[1], expected[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("shape", [(1,), (35,), (35, 3)])
def test_a_learned_scale_gets_its_gradient_in_one_call(
    called: list[str], shape: tuple[int, ...]
) -> None:
    x, weight, scale = torch.randn(20, 192), torch.randn(35, 192), torch.rand(shape) + 0.3
    granularity = "per_tensor" if shape == (1,) else "per_group" if shape[1:] else "per_channel"

    def gradients() -> list[Tensor]:
        leaves = [weight.clone().requires_grad_(), scale.clone().requires_grad_()]
        args = (granularity, 64, "int8_per_token", None, leaves[1])
        qat_linear(x, leaves[0], None, *args).square().sum().backward()
        return [leaf.grad for leaf in leaves if leaf.grad is not None]

    found = gradients()
    assert called == ["pack_t2", "linear_codes_i8_t2", "learned_gradients"]
    with bitcore.use_backend("reference"):
        expected = gradients()
    assert torch.equal(found[0], expected[0])
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("per", ["token", "tensor"])
@pytest.mark.parametrize("shape", [(0, 64), (1, 64), (3, 128), (20, 192), (1, 100), (20, 100)])
def test_a_layer_keeps_the_codes_of_its_input(
    host: HostKernels, shape: tuple[int, int], per: str
) -> None:
    x, (qweight, scale) = (
        torch.randn(shape),
        reference.pack_weight(torch.randn(35, shape[1]), "per_channel", 0)[:2],
    )
    args = (x, qweight, scale, torch.randn(35), 35, f"int8_per_{per}", torch.float32)
    before = host.count(LAUNCHES)
    for ours, expected in zip(
        host.linear_with_codes(*args), reference.linear_with_codes(*args), strict=True
    ):
        assert torch.equal(ours, expected)
    launches = host.count(LAUNCHES) - before
    if shape[1] % 64 == 0:
        # x is read by one kernel, by two where one scale serves all tokens.
        assert launches == (0 if shape[0] == 0 else 2 + (per == "tensor"))
