"""Every op of the CUDA backend alike, on the emulator: what it refuses, and that it never waits."""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from bitcore import ops, ops_experts, ops_int8, ops_qat, ops_ternary, reference
from bitcore.errors import ArgumentError, BackendError
from bitcore.gradients import weight_gradient
from bitcore.kernels import registry
from bitcore.kernels.cuda import CudaKernels
from bitcore.prepared import PreparedExperts, PreparedLinear
from tests.native.cuda.host import LAUNCHES, HostKernels

SOURCES = Path(__file__).parents[2] / "csrc" / "cuda"
N, K, E = 9, 128, 3
# name: the tokens of the call, then its other tensors and arguments.
Arguments = tuple[Tensor, list[Tensor], tuple[Any, ...]]
Make = Callable[[int], Arguments]


def packed() -> list[Tensor]:
    return list(reference.pack_weight(torch.randn(N, K), "per_channel", 0)[:2])


def multiplier() -> Tensor:
    return torch.randint(0, 128, (N, K // 64), dtype=torch.uint8)


def experts(tokens: int) -> list[Tensor]:
    """An index of two experts for each token, the packed weights of all and their scales."""
    each = zip(*(packed() for _ in range(E)), strict=True)
    return [torch.randint(-1, E + 1, (tokens, 2)), *(torch.stack(one) for one in each)]


CALLS: dict[str, Make] = {
    "quantize_activation": lambda m: (torch.randn(m, K), [], (False,)),
    "quantize_activation per tensor": lambda m: (torch.randn(m, K), [], (True,)),
    "matmul": lambda m: (torch.ones(m, K, dtype=torch.int8), packed()[:1], (N,)),
    "linear": lambda m: (
        torch.randn(m, K), packed(), (None, N, "int8_per_token", torch.bfloat16)
    ),
    "linear per tensor": lambda m: (
        torch.randn(m, K), packed(), (None, N, "int8_per_tensor", torch.float32)
    ),
    "linear float": lambda m: (torch.randn(m, K), packed(), (None, N, "float", torch.float32)),
    "linear groups": lambda m: (
        torch.randn(m, K), packed(), (None, N, "int8_per_token", torch.float32, multiplier())
    ),
    "linear float groups": lambda m: (
        torch.randn(m, K), packed(), (None, N, "float", torch.float32, multiplier())
    ),
    "linear bf16": lambda m: (
        torch.randn(m, K).bfloat16(), packed(), (None, N, "float", torch.float32)
    ),
    "experts_linear": lambda m: (
        torch.randn(m, K), experts(m), (None, N, "int8_per_token", torch.bfloat16)
    ),
    "experts_linear per tensor": lambda m: (
        torch.randn(m, K), experts(m), (torch.randn(E, N), N, "int8_per_tensor", torch.float32)
    ),
    "experts_linear groups": lambda m: (
        torch.randn(m, K), experts(m),
        (None, N, "int8_per_token", torch.float32, torch.stack([multiplier()] * E)),
    ),
    "linear_int8": lambda m: (
        torch.randn(m, K), [torch.ones(N, K, dtype=torch.int8), torch.rand(N)],
        (None, torch.float32),
    ),
    "input_gradient": lambda m: (torch.randn(m, N), packed(), (N, torch.float32)),
    "input_gradient groups": lambda m: (
        torch.randn(m, N), packed(), (N, torch.float32, multiplier())
    ),
}  # fmt: skip
# Those without tokens; M is their N.
WEIGHT_CALLS: dict[str, Make] = {
    "pack_weight": lambda n: (torch.randn(n, K), [], ("per_tensor", 0)),
    "pack_weight groups": lambda n: (torch.randn(n, K), [], ("per_group", 64)),
    "pack_codes": lambda n: (torch.randn(n, K), [torch.ones(1)], ()),
    "learned_gradients": lambda n: (torch.randn(n, K), [torch.randn(n, K), torch.ones(1)], ()),
    "learned_gradients groups": lambda n: (
        torch.randn(n, K), [torch.randn(n, K).bfloat16(), torch.rand(n, K // 64) + 0.1], ()
    ),
    "unpack_weight": lambda n: (*split(packed()), (N, torch.float32)),
    "unpack_weight groups": lambda n: (*split(packed()), (N, torch.float32, multiplier())),
}  # fmt: skip
ALL = CALLS | WEIGHT_CALLS
# The functions behind torch.ops.bitlab, which check before any backend is asked.
OPS = {
    "quantize_activation": ops_ternary._quantize_activation, "matmul": ops_ternary._matmul,
    "linear": ops_ternary.linear, "linear_int8": ops_int8._linear_int8,
    "experts_linear": ops_experts._linear,
    "input_gradient": ops_ternary._input_gradient_op, "pack_codes": ops_qat._pack_codes,
    "learned_gradients": ops_qat._learned_gradients,
    "unpack_weight": ops_ternary._unpack_weight,
}  # fmt: skip


def split(tensors: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return tensors[0], tensors[1:]


def call(kernels: Any, name: str, count: int = 3) -> Any:
    first, rest, arguments = ALL[name](count)
    return getattr(kernels, name.split()[0])(first, *rest, *arguments)


def tensors_of(result: Tensor | tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    given = (result,) if isinstance(result, Tensor) else result
    return tuple(one for one in given if one is not None)


def changed(function: Callable[[Tensor], Tensor], given: Sequence[Any]) -> tuple[Any, ...]:
    """Arguments of which the tensors are changed."""
    return tuple(function(one) if isinstance(one, Tensor) else one for one in given)


@pytest.mark.parametrize("name", CALLS)
def test_no_tokens_launch_nothing(host: HostKernels, name: str) -> None:
    before = host.count(LAUNCHES)
    found, expected = call(host, name, 0), call(reference, name, 0)
    for ours, theirs in zip(tensors_of(found), tensors_of(expected), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
    assert host.count(LAUNCHES) == before


@pytest.mark.parametrize("name", ALL)
def test_strides_do_not_matter(host: HostKernels, name: str) -> None:
    first, rest, arguments = ALL[name](12)
    method = getattr(host, name.split()[0])

    def spread(tensor: Tensor) -> Tensor:
        room = torch.zeros(*(2 * size for size in tensor.shape), dtype=tensor.dtype)
        return room[tuple(slice(None, None, 2) for _ in tensor.shape)].copy_(tensor)

    expected = method(first, *rest, *arguments)
    rest, arguments = list(map(spread, rest)), changed(spread, arguments)
    found = method(spread(first), *rest, *arguments)
    turned = method(first.t().contiguous().t(), *rest, *arguments)
    for tensors in (found, turned):
        for ours, theirs in zip(tensors_of(tensors), tensors_of(expected), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("name", ALL)
def test_a_failed_launch_carries_the_shapes(
    host: HostKernels, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(HostKernels, "_call", CudaKernels._call)
    host._library.bk_emulator_clear()
    op = re.escape(f"bitlab::{name.split()[0]}")
    with pytest.raises(BackendError, match=rf"{op}: bk_cuda_\w+ \[M \d, N \d, K {K}\]: .*outside"):
        call(host, name)


@pytest.mark.parametrize("name", ALL)
def test_an_old_gpu_is_refused(
    host_library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    kernels = CudaKernels.__new__(CudaKernels)
    kernels._library, kernels._multiprocessors = host_library, {}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    op = re.escape(f"bitlab::{name.split()[0]}")
    with pytest.raises(BackendError, match=f"{op}: compute capability must be at least 8.0, got"):
        call(kernels, name)


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize("name", [name for name in OPS if name != "quantize_activation"])
def test_two_devices_are_refused(host: HostKernels, name: str) -> None:
    """Two GPUs, and a CPU with a GPU, as far as the addresses: fakes have none."""
    for devices in (("cuda:0", "cuda:1"), ("cpu", "cuda:0"), ("cuda:1", "cpu")):
        with FakeTensorMode():
            first, rest, arguments = ALL[name](3)
            first, rest = first.to(devices[0]), [tensor.to(devices[1]) for tensor in rest]
            arguments = changed(lambda one, device=devices[1]: one.to(device), arguments)
            with pytest.raises(ArgumentError, match=rf"bitlab::{name}: .* on {devices[0]}, got"):
                OPS[name](first, *rest, *arguments)


def test_a_launch_goes_to_the_tensors_device_and_its_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    said: list[object] = []
    # A torch built without CUDA lacks the first two.
    for owner, name, function in (
        (torch._C, "_cuda_getDevice", lambda: 0),
        (torch._C, "_cuda_getCurrentRawStream", lambda index: 77 + index),
        (torch.cuda, "device", lambda index: said.append(index) or nullcontext()),
    ):
        monkeypatch.setattr(owner, name, function, raising=False)
    kernels = CudaKernels.__new__(CudaKernels)
    for index in (1, 0):
        device = torch.device("cuda", index)
        assert kernels._launch(device, lambda *arguments: arguments, [5]) == (5, 77 + index)
    assert said == [1]


@pytest.mark.parametrize("activation", ["int8_per_token", "int8_per_tensor", "float"])
def test_a_prepared_layer_goes_past_the_dispatcher(
    host: HostKernels, monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    monkeypatch.setitem(registry._chosen, "cpu", host)
    inputs = [torch.randn(shape) for shape in ((K,), (0, K), (3, K), (2, 3, K))]
    inputs += [torch.randn(2, 3, 2 * K)[..., 4 : K + 4], torch.randn(K, 3).bfloat16().t()]
    weight = torch.randn(N, K)
    for bias, granularity, group in (
        (None, "per_channel", None),
        (torch.randn(N), "per_group", 64),
    ):
        qweight, scale, *multiplier = ops.pack_weight(weight, granularity, group)
        constants = (qweight, scale, bias, N, activation, *multiplier)
        prepared = PreparedLinear(*constants)
        for x in inputs:
            expected = torch.ops.bitlab.linear(x, *constants[:5], x.dtype, *multiplier)
            with torch.no_grad(), monkeypatch.context() as patch:
                patch.setattr(ops, "linear", None)
                y = prepared(x)
            assert y.dtype == x.dtype
            assert torch.equal(y, expected)
        x = torch.randn(3, K, requires_grad=True)
        assert prepared(x).requires_grad


@pytest.mark.parametrize("activation", ["int8_per_token", "int8_per_tensor", "float"])
def test_prepared_experts_go_past_the_dispatcher(
    host: HostKernels, monkeypatch: pytest.MonkeyPatch, activation: str
) -> None:
    monkeypatch.setitem(registry._chosen, "cpu", host)
    index, qweight, scale = experts(5)
    constants = (qweight, scale, torch.randn(E, N), N, activation)
    prepared = PreparedExperts(*constants)
    for x in (torch.randn(5, K), torch.randn(5, 2 * K)[:, 4 : K + 4].bfloat16()):
        expected = torch.ops.bitlab.experts_linear(x, index, *constants, x.dtype)
        with torch.no_grad(), monkeypatch.context() as patch:
            if activation != "float":
                patch.setattr(ops, "experts_linear", None)
            y = prepared(x, index)
        assert y.dtype == x.dtype
        assert torch.equal(y, expected)
    assert prepared(torch.randn(5, K, requires_grad=True), index).requires_grad
    index.untyped_storage().resize_(0)
    with pytest.raises(ArgumentError, match="index must have its memory"):
        prepared(x, index)


def test_misaligned_storage_is_refused(host: HostKernels) -> None:
    """Every float tensor of every function, by its name."""
    room = torch.zeros(4096, dtype=torch.uint8)
    good, odd = room.data_ptr() + -room.data_ptr() % 256, room.data_ptr() + 1
    shape, scratch = (3, N, K), (good, 4, None)
    library = host._library
    layouts: list[tuple[str, Callable[[dict[str, int]], tuple[Any, ...]], str]] = [
        ("linear_i8_t2", lambda p: (p["x"], 0, K, good, p["weight_scale"], N, 0, None, p["bias"],
         0, p["y"], 0, *shape, 0, *scratch), "x weight_scale bias y"),
        ("linear_float_t2", lambda p: (p["x"], 0, K, good, p["weight_scale"], N, 2, good,
         p["bias"], 0, p["y"], 0, *shape, *scratch), "x weight_scale bias y"),
        ("experts_i8_t2", lambda p: (p["x"], 0, K, p["index"], 2, E, good, p["weight_scale"], N, 0,
         None, p["bias"], 0, p["y"], 0, *shape, 0, good, None), "x index weight_scale bias y"),
        ("linear_i8_i8", lambda p: (p["x"], 0, K, good, p["weight_scale"], p["bias"], 0, p["y"],
         0, *shape, *scratch), "x weight_scale bias y"),
        ("quantize_i8", lambda p: (p["x"], 0, K, good, good, 3, K, 0, good, None), "x"),
        ("input_gradient", lambda p: (p["dy"], 0, N, good, p["weight_scale"], N, 2, good, p["dx"],
         0, *shape, None), "dy weight_scale dx"),
        ("weight_scale", lambda p: (p["weight"], 0, p["weight_scale"], N, 0, None, N, K, None),
         "weight weight_scale"),
        ("learned_gradients", lambda p: (p["dw"], 0, p["weight"], 1, p["step"], N, 0, p["gradient"],
         p["step_gradient"], None, N, K, None), "dw weight step gradient step_gradient"),
        ("pack_t2", lambda p: (p["weight"], 0, p["weight_scale"], N, 0, good, N, K, None),
         "weight weight_scale"),
        ("pack_groups_t2", lambda p: (p["weight"], 0, p["weight_scale"], good, good, N, K, 2,
         None), "weight weight_scale"),
        ("unpack_t2", lambda p: (good, p["weight_scale"], N, 0, None, p["weight"], 0, N, K, None),
         "weight weight_scale"),
    ]  # fmt: skip
    before = host.count(LAUNCHES)
    for function, arguments, names in layouts:
        for name in names.split():
            pointers = {one: odd if one == name else good for one in names.split()}
            status = getattr(library, f"bk_cuda_{function}")(*arguments(pointers))
            text = library.bk_cuda_last_error().decode()
            assert status == 1, (function, name)
            assert text.startswith(f"bk_cuda_{function}: {name} must be aligned"), text
    assert host.count(LAUNCHES) == before


def test_sizes_above_the_limits_are_refused(host: HostKernels) -> None:
    many, wide = torch.empty(2**31, K, device="meta"), "K must be from 1 to 131071"
    for name in ("quantize_activation", "linear", "linear_int8", "matmul", "input_gradient"):
        _, rest, arguments = ALL[name](1)
        with pytest.raises(ArgumentError, match=f"bitlab::{name}: .* at most 2147483647 tokens"):
            getattr(host, name)(many[:, :N] if "grad" in name else many, *rest, *arguments)
    library, sizes = host._library, (2**31, 2**17)
    for function, arguments in (
        ("quantize_i8", (0, 0, K, 0, 0, 1, 2**17, 0, 0, 0)),
        ("input_gradient", (0, 0, N, 0, 0, 1, 0, 0, 0, 0, 1, *sizes, 0)),
        ("weight_scale", (0, 0, 0, 1, 0, 0, *sizes, 0)),
        ("learned_gradients", (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, *sizes, 0)),
        ("pack_t2", (0, 0, 0, 1, 0, 0, *sizes, 0)),
        ("pack_groups_t2", (0, 0, 0, 16, 0, *sizes, 2**11, 0)),
        ("unpack_t2", (0, 0, 1, 0, 0, 0, 0, *sizes, 0)),
    ):
        assert getattr(library, f"bk_cuda_{function}")(*arguments) == 1
        assert wide in library.bk_cuda_last_error().decode()


class Watch(TorchDispatchMode):
    """Notes what torch runs, and the bytes of the largest result."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        found = func(*args, **(kwargs or {}))
        if isinstance(found, Tensor):
            self.most = max(self.most, found.untyped_storage().nbytes())
        return found


# What makes the host wait for a device: values read, copies between devices, sizes from values.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique2",
    "_unique2", "bincount", "_to_copy",
}  # fmt: skip


def test_the_watch_sees_what_waits() -> None:
    with Watch() as watch:
        torch.ones(1).item()
        torch.ones(1).nonzero()
        torch.ones(1).to("meta")
    assert watch.names >= {"_local_scalar_dense", "nonzero", "_to_copy"}


@pytest.mark.parametrize("name", ALL)
def test_ops_never_wait(host: HostKernels, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(registry._chosen, "cpu", host)
    first, rest, arguments = ALL[name](3)
    function = OPS.get(name.split()[0], ops_ternary.pack_weight)
    with Watch() as watch:
        function(first, *rest, *arguments)
    assert not watch.names & WAITING
    assert "empty" in watch.names


def test_a_training_step_never_waits(host: HostKernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._chosen, "cpu", host)
    x, weight = torch.randn(3, K), torch.randn(N, K)
    with Watch() as watch:
        found = ops_qat._qat_linear(
            x, weight, None, "per_tensor", 0, "int8_per_token", torch.float32
        )
    assert found[0].shape == (3, N)
    assert not watch.names & WAITING
    x.requires_grad_()
    weight.requires_grad_()
    y = ops.qat_linear(x, weight, None, "per_tensor", None, "int8_per_token")
    with Watch() as watch:
        y.backward(torch.ones_like(y))
    assert "mm" in watch.names
    assert not watch.names & (WAITING - {"_to_copy"})


def test_the_library_calls_nothing_that_waits() -> None:
    text = "".join(path.read_text() for path in sorted(SOURCES.glob("*")) if path.suffix != ".txt")
    called = set(re.findall(r"\b(cuda[A-Z]\w*|cu[A-Z]\w*)\(", text))
    assert called == {
        "cudaDeviceGetAttribute",
        "cudaFuncSetAttribute",
        "cudaGetDevice",
        "cudaGetErrorString",
        "cudaGetLastError",
        "cudaLaunchKernelExC",
    }


@pytest.mark.parametrize("quantized", [True, False])
def test_a_weight_gradient_makes_no_float32_copy_of_its_input(quantized: bool) -> None:
    """What stands for a GPU is a device without memory."""
    dy, x = (torch.empty(48, n, dtype=torch.bfloat16, device="meta") for n in (8, 64))
    codes = [x.to(torch.int8), x[:, :1].float()]
    with Watch() as watch:
        dw = weight_gradient(dy, codes if quantized else [x], torch.bfloat16)
    assert (dw.shape, dw.dtype) == ((8, 64), torch.bfloat16)
    assert watch.most == 48 * 64 * 2
