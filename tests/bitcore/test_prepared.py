"""A prepared layer: the op's bits, past the dispatcher only where nobody watches."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import bitcore
from bitcore import ops
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.kernels.cpu import CpuKernels
from bitcore.prepared import PreparedLinear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["int8_per_token", "int8_per_tensor", "float"]


class Watching(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Counting:
    """Counts the native calls that go past the dispatcher."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        run = CpuKernels._run_linear

        def counted(*args: object) -> Tensor:
            self.calls += 1
            return run(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(CpuKernels, "_run_linear", counted)


def weights(granularity: str = "per_tensor", rows: int = 10) -> tuple[Tensor, Tensor]:
    group = 64 if granularity == "per_group" else None
    return ops.pack_weight(torch.randn(rows, 128), granularity, group)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_op(
    backend: str, dtype: torch.dtype, granularity: str, activation: str
) -> None:
    qweight, scale = weights(granularity)
    inputs = [torch.randn(shape).to(dtype) for shape in ((128,), (0, 128), (3, 128), (2, 3, 128))]
    inputs += [torch.randn(5, 256).to(dtype)[:, ::2], torch.randn(128, 5).to(dtype).t()]
    inputs += [
        torch.randn(5, 200).to(dtype)[:, 7:135],
        torch.randn(2, 5, 256).to(dtype)[..., 9:137],
    ]
    for bias in (None, torch.randn(10), torch.randn(10).bfloat16()):
        prepared = PreparedLinear(qweight, scale, bias, 10, activation)
        for x in inputs:
            expected = torch.ops.bitlab.linear(x, qweight, scale, bias, 10, activation, dtype)
            with torch.no_grad():
                y = prepared(x)
            assert y.dtype == dtype
            assert torch.equal(y, expected)


def test_past_the_dispatcher_only_if_nobody_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 128)
    counting = Counting(monkeypatch)
    prepared = PreparedLinear(*weights(), None, 10, "int8_per_token")
    with torch.no_grad(), Watching() as mode:
        watched = prepared(x)
    assert "bitlab.linear.default" in mode.seen
    with torch.no_grad(), torch.profiler.profile() as profile:
        prepared(x)
    assert any(event.key == "bitlab::linear" for event in profile.key_averages())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert prepared(x).dtype == torch.bfloat16
    assert prepared(x.clone().requires_grad_()).requires_grad
    batched = torch.vmap(lambda row: prepared(row[None]))(x)
    assert torch.equal(batched[:, 0], watched)
    # The op ends in the same function; without it, that is all there is.
    before = counting.calls
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(ops, "linear", None)
        assert torch.equal(prepared(x), watched)
    assert counting.calls == before + 1
    with torch.no_grad(), bitcore.use_backend("reference"):
        assert torch.equal(prepared(x), watched)
    assert counting.calls == before + 1


def test_holds_the_same_memory_only() -> None:
    qweight, scale = weights()
    bias = torch.randn(10)
    prepared = PreparedLinear(qweight, scale, bias, 10, "int8_per_token")
    assert prepared.holds(qweight, scale, bias)
    assert not prepared.holds(qweight.clone(), scale, bias)
    assert not prepared.holds(qweight, scale.clone(), bias)
    assert not prepared.holds(qweight, scale, None)
    for tensor in (qweight, scale, bias):
        kept = tensor.data
        tensor.data = kept.clone()
        assert not prepared.holds(qweight, scale, bias)
        tensor.data = kept
        assert prepared.holds(qweight, scale, bias)


def test_bad_arguments() -> None:
    qweight, scale = weights()
    with pytest.raises(ArgumentError, match="out_features 13"):
        PreparedLinear(qweight, scale, None, 13, "int8_per_token")
    with pytest.raises(ArgumentError, match="activation must be"):
        PreparedLinear(qweight, scale, None, 10, "int4")
    with pytest.raises(ArgumentError, match="bias must be"):
        PreparedLinear(qweight, scale, torch.zeros(9), 10, "int8_per_token")
    prepared = PreparedLinear(qweight, scale, None, 10, "int8_per_token")
    with torch.no_grad():
        with pytest.raises(ArgumentError, match="in_features last"):
            prepared(torch.randn(3, 127))
        with pytest.raises(ArgumentError, match="in_features last"):
            prepared(torch.tensor(1.0))
        with pytest.raises(ArgumentTypeError, match="x must be"):
            prepared(torch.randn(3, 128).double())


def test_several_threads_at_once() -> None:
    """Each thread has a workspace of its own, and its own record of the call."""
    prepared = [
        PreparedLinear(*weights(rows=rows), None, rows, "int8_per_token") for rows in (33, 400)
    ]
    inputs = [torch.randn(tokens, 128) for tokens in (1, 7, 40)]
    with torch.no_grad():
        expected = [[layer(x) for x in inputs] for layer in prepared]
    wrong: list[str] = []

    def work() -> None:
        with torch.no_grad():
            for _ in range(50):
                for layer, results in zip(prepared, expected, strict=True):
                    for x, y in zip(inputs, results, strict=True):
                        if not torch.equal(layer(x), y):
                            wrong.append(f"{list(x.shape)}")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
