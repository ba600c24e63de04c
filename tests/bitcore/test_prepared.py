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
from tests.bitcore.layouts import STRIDED, lay_out, plain

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


def weights(granularity: str = "per_tensor", rows: int = 10) -> tuple[Tensor, ...]:
    """A packed weight, its scale and, with groups in two levels, multipliers."""
    sizes = torch.rand(rows, 2).repeat_interleave(64, 1)
    return ops.pack_weight(torch.randn(rows, 128) * sizes, granularity, 64)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize(
    "granularity", ["per_tensor", "per_channel", "per_group", "per_group_float32"]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bits_of_the_op(
    backend: str, dtype: torch.dtype, granularity: str, activation: str
) -> None:
    qweight, scale, *rest = weights(granularity)
    inputs = [torch.randn(shape).to(dtype) for shape in ((128,), (0, 128), (3, 128), (2, 3, 128))]
    inputs += [torch.randn(5, 256).to(dtype)[:, ::2], torch.randn(128, 5).to(dtype).t()]
    inputs += [
        torch.randn(5, 200).to(dtype)[:, 7:135],
        torch.randn(2, 5, 256).to(dtype)[..., 9:137],
    ]
    for bias in (None, torch.randn(10), torch.randn(10).bfloat16()):
        prepared = PreparedLinear(qweight, scale, bias, 10, activation, *rest)
        for x in inputs:
            args = (qweight, scale, bias, 10, activation)
            expected = torch.ops.bitlab.linear(x, *args, dtype, *rest)
            with torch.no_grad():
                y = prepared(x)
            assert y.dtype == dtype
            assert torch.equal(y, expected)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
def test_past_the_dispatcher_only_if_nobody_watches(
    monkeypatch: pytest.MonkeyPatch, granularity: str
) -> None:
    x = torch.randn(3, 128)
    counting = Counting(monkeypatch)
    qweight, scale, *rest = weights(granularity)
    prepared = PreparedLinear(qweight, scale, None, 10, "int8_per_token", *rest)
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
    qweight, scale, multiplier = weights("per_group")
    bias = torch.randn(10)
    given = (qweight, scale, bias, multiplier)
    prepared = PreparedLinear(qweight, scale, bias, 10, "int8_per_token", multiplier)
    assert prepared.holds(*given)
    for index, tensor in enumerate(given):
        others = list(given)
        others[index] = tensor.clone()
        assert not prepared.holds(*others)
        kept = tensor.data
        tensor.data = kept.clone()
        assert not prepared.holds(*given)
        tensor.data = kept
        assert prepared.holds(*given)
    assert not prepared.holds(qweight, scale, None, multiplier)
    assert not prepared.holds(qweight, scale, bias)
    without = PreparedLinear(*weights(), None, 10, "int8_per_token")
    assert not without.holds(*without._given[:3], multiplier)  # type: ignore[arg-type]


def test_multipliers_of_any_layout() -> None:
    """What is not contiguous is copied, by the op in every call."""
    x = torch.randn(3, 128)
    qweight, scale, multiplier = weights("per_group")
    args = (qweight, scale, None, 10, "int8_per_token")
    with torch.no_grad():
        for layout in (*STRIDED, "negated"):
            laid = lay_out(multiplier, layout)
            expected = ops.linear(x, *args, plain(laid))
            assert torch.equal(PreparedLinear(*args, laid)(x), expected)
            assert torch.equal(ops.linear(x, *args, laid), expected)


def test_bad_arguments() -> None:
    qweight, scale, *_ = weights()
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
    qweight, scale, multiplier = weights("per_group", 100)
    prepared.append(PreparedLinear(qweight, scale, None, 100, "int8_per_token", multiplier))
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
