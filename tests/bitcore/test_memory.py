"""Native code is given bare pointers: what they point at is the tensor's values, all of them."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import bitcore
from bitcore import ops
from bitcore.errors import ArgumentError, BackendError
from bitcore.kernels import native
from bitcore.prepared import PreparedLinear
from tests.bitcore.layouts import STRIDED, VIRTUAL, lay_out, plain
from tests.bitcore.opcheck import opcheck
from tests.conftest import native_kernels
from tests.native.cuda.host import HostKernels

OPS = torch.ops.bitlab
ACTIVATIONS = ["int8_per_token", "int8_per_tensor", "float"]
# Every op with tensors that it takes.
CALLS: dict[str, tuple[Callable[..., object], Callable[[], tuple[Tensor, ...]]]] = {
    "quantize_activation": (
        lambda x: OPS.quantize_activation(x, False),
        lambda: (torch.randn(3, 64),),
    ),
    "pack_weight": (
        lambda weight: OPS.pack_weight(weight, "per_tensor", 0),
        lambda: (torch.randn(9, 64),),
    ),
    "pack_weight, groups": (
        lambda weight: OPS.pack_weight(weight, "per_group", 64),
        lambda: (torch.randn(9, 64),),
    ),
    "pack_codes": (OPS.pack_codes, lambda: (torch.randn(9, 64), torch.rand(9) + 0.1)),
    "learned_gradients": (
        OPS.learned_gradients,
        lambda: (torch.randn(9, 64), torch.randn(9, 64), torch.rand(9) + 0.1),
    ),
    "learned_gradients, groups": (
        OPS.learned_gradients,
        lambda: (torch.randn(9, 128), torch.randn(9, 128), torch.rand(9, 2) + 0.1),
    ),
    "estimate": (
        lambda weight: OPS.estimate(weight, "twn", "per_channel", 0),
        lambda: (torch.randn(9, 64),),
    ),
    "estimate, groups": (
        lambda weight: OPS.estimate(weight, "twn", "per_group", 64),
        lambda: (torch.randn(9, 64),),
    ),
    "unpack_weight": (
        lambda qweight, scale: OPS.unpack_weight(qweight, scale, 9, torch.float32),
        lambda: packed(),
    ),
    "unpack_weight, groups": (
        lambda *t: OPS.unpack_weight(*t[:2], 9, torch.float32, t[2]),
        lambda: groups(),
    ),
    "matmul": (
        lambda codes, qweight: OPS.matmul(codes, qweight, 9),
        lambda: (torch.ones(3, 64, dtype=torch.int8), packed()[0]),
    ),
    "linear": (
        lambda *t: OPS.linear(*t, 9, "int8_per_token", torch.float32),
        lambda: (torch.randn(3, 64), *packed(), torch.randn(9)),
    ),
    "linear of floats": (
        lambda *t: OPS.linear(*t, 9, "float", torch.float32),
        lambda: (torch.randn(33, 64), *packed(), torch.randn(9)),
    ),
    "linear, groups": (
        lambda *t: OPS.linear(*t[:4], 9, "int8_per_token", torch.float32, t[4]),
        lambda: (torch.randn(3, 64), *groups()[:2], torch.randn(9), groups()[2]),
    ),
    "linear of few floats, groups": (
        lambda *t: OPS.linear(*t[:3], None, 9, "float", torch.float32, t[3]),
        lambda: (torch.randn(3, 64), *groups()),
    ),
    "linear of floats, groups": (
        lambda *t: OPS.linear(*t[:3], None, 9, "float", torch.float32, t[3]),
        lambda: (torch.randn(33, 64), *groups()),
    ),
    "qat_linear": (
        lambda *t: OPS.qat_linear(*t, "per_channel", 0, "int8_per_token", torch.float32),
        lambda: (torch.randn(3, 64), torch.randn(9, 64), torch.randn(9)),
    ),
    "qat_linear, learned": (
        lambda x, weight, scale: OPS.qat_linear(
            x, weight, None, "per_channel", 0, "int8_per_token", torch.float32, None, scale
        ),
        lambda: (torch.randn(3, 64), torch.randn(9, 64), torch.rand(9)),
    ),
    "qat_linear, constants": (
        lambda x, weight, step, scale: OPS.qat_linear(
            x, weight, None, "per_channel", 0, "int8_per_token", torch.float32, step, scale
        ),
        lambda: (torch.randn(3, 64), torch.randn(9, 64), torch.rand(9), torch.rand(9)),
    ),
    "qat_linear, learned groups": (
        lambda x, weight, scale: OPS.qat_linear(
            x, weight, None, "per_group", 64, "int8_per_token", torch.float32, None, scale
        ),
        lambda: (torch.randn(3, 64), torch.randn(9, 64), torch.rand(9, 1)),
    ),
    "qat_linear, constants of groups": (
        lambda x, weight, *scales: OPS.qat_linear(
            x, weight, None, "per_group", 64, "int8_per_token", torch.float32, *scales
        ),
        lambda: (torch.randn(3, 64), torch.randn(9, 64), torch.rand(9, 1), *groups()[1:]),
    ),
    "linear_int8": (
        lambda *t: OPS.linear_int8(*t, torch.float32),
        lambda: (torch.randn(3, 64), *rows(), torch.randn(9)),
    ),
    "input_gradient": (
        lambda *t: OPS.input_gradient(*t, 9, torch.float32),
        lambda: (torch.randn(3, 9), *packed()),
    ),
    "input_gradient, groups": (
        lambda *t: OPS.input_gradient(*t[:3], 9, torch.float32, t[3]),
        lambda: (torch.randn(3, 9), *groups()),
    ),
    "experts_linear": (
        lambda x, index, *t: OPS.experts_linear(x, index, *t, 9, "int8_per_token", torch.float32),
        lambda: (torch.randn(3, 64), chosen(), *stacked(packed), torch.randn(2, 9)),
    ),
    "experts_linear, groups": (
        lambda *t: OPS.experts_linear(*t[:4], None, 9, "int8_per_tensor", torch.float32, t[4]),
        lambda: (torch.randn(3, 64), chosen(), *stacked(groups)),
    ),
    "experts_linear of floats": (
        lambda *t: OPS.experts_linear(*t, None, 9, "float", torch.float32),
        lambda: (torch.randn(3, 64), chosen(), *stacked(packed)),
    ),
    "experts_input_gradient": (
        lambda *t: OPS.experts_input_gradient(*t, 9, 3, torch.float32),
        lambda: (torch.randn(6, 9), chosen(), *stacked(packed)),
    ),
    "experts_input_gradient, groups": (
        lambda *t: OPS.experts_input_gradient(*t[:4], 9, 3, torch.float32, t[4]),
        lambda: (torch.randn(6, 9), chosen(), *stacked(groups)),
    ),
    "input_gradient_int8": (
        lambda *t: OPS.input_gradient_int8(*t, torch.float32),
        lambda: (torch.randn(3, 9), *rows()),
    ),
}


def packed() -> tuple[Tensor, Tensor]:
    """Of 9 rows; their codes and scales."""
    qweight, scale = ops.pack_weight(torch.randn(9, 64), "per_channel", None)
    return qweight, scale


def groups() -> tuple[Tensor, Tensor, Tensor]:
    """Of 9 rows; their codes, scales and multipliers."""
    qweight, scale = packed()
    return qweight, scale / 127, torch.randint(0, 128, (9, 1), dtype=torch.uint8)


def rows() -> tuple[Tensor, Tensor]:
    return torch.randint(-127, 128, (9, 64), dtype=torch.int8), torch.rand(9)


def stacked(make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Those of two experts."""
    return tuple(torch.stack(both) for both in zip(make(), make(), strict=True))


def chosen() -> Tensor:
    """Two experts, or none, for each of three tokens."""
    return torch.tensor([[0, 1], [1, 2], [0, 0]])


def test_every_op_is_called() -> None:
    called = {name.split(",")[0].split(" ")[0] for name in CALLS}
    # The sum that compiled graphs call is torch's own; it is there once these have been asked for.
    others = {"name", "sum_last"}
    assert called == {op for op in dir(OPS) if not op.startswith("_")} - others


@pytest.mark.parametrize("name", CALLS)
def test_every_layout_of_every_argument(backend: str, name: str) -> None:
    op, make = CALLS[name]
    given = make()
    for index in range(len(given)):
        for layout in (*STRIDED, *VIRTUAL):
            tensors = list(given)
            tensors[index] = lay_out(given[index], layout)
            ours, theirs = op(*tensors), op(*(plain(tensor) for tensor in tensors))
            # Sums of floats come in torch's own order; the rest is the same to the bit.
            exact = "floats" not in name and "gradient" not in name
            tolerance = 0 if exact else 1e-5
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("name", CALLS)
def test_freed_memory_of_every_argument(backend: str, name: str) -> None:
    """With and without an offset."""
    op, make = CALLS[name]
    for index in range(len(make())):
        for offset in (0, 1):
            tensors = list(make())
            whole = torch.cat([tensors[index][:1]] * offset + [tensors[index]])
            tensors[index] = whole[offset:]
            whole.untyped_storage().resize_(0)
            with pytest.raises(ArgumentError, match=r"bitlab::\w+: \w+ must have its memory, got"):
                op(*tensors)


@pytest.mark.parametrize("with_multiplier", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_layout_of_a_prepared_layer(
    backend: str, activation: str, with_multiplier: bool
) -> None:
    """The dispatcher makes memory of views that only stand for it; past it, nobody would."""
    for shape in ((64,), (3, 64), (33, 64), (2, 3, 64)):
        qweight, scale, multiplier = groups()
        given = [torch.randn(shape), qweight, scale, torch.randn(9)]
        given += [multiplier] if with_multiplier else []
        for index in range(len(given)):
            for layout in (*STRIDED, *VIRTUAL):
                tensors = list(given)
                tensors[index] = lay_out(given[index], layout)
                layer = PreparedLinear(*tensors[1:4], 9, activation, *tensors[4:])
                copies = [plain(tensor) for tensor in tensors]
                expected = OPS.linear(*copies[:4], 9, activation, torch.float32, *copies[4:])
                with torch.no_grad():
                    y = layer(tensors[0])
                assert y.is_contiguous()
                tolerance = 1e-5 if activation == "float" else 0
                torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_freed_memory_of_a_prepared_layer(backend: str) -> None:
    given = packed()
    layer = PreparedLinear(*given, None, 9, "int8_per_token")
    for shape in ((64,), (3, 64), (2, 3, 64), (3, 128)):
        for offset in (0, 7):
            x = torch.randn(offset + torch.Size(shape).numel())[offset:].view(shape)[..., :64]
            x.untyped_storage().resize_(0)
            with torch.no_grad(), pytest.raises(ArgumentError, match="x must have its memory"):
                layer(x)
    assert layer.holds(*given, None)
    given[1].untyped_storage().resize_(0)
    assert not layer.holds(*given, None)
    for left in (0, 8 * 4):
        given[1].untyped_storage().resize_(left)
        with pytest.raises(ArgumentError, match="weight_scale must have its memory"):
            PreparedLinear(*given, None, 9, "int8_per_token")
    qweight, scale, multiplier = groups()
    layer = PreparedLinear(qweight, scale, None, 9, "int8_per_token", multiplier)
    assert layer.holds(qweight, scale, None, multiplier)
    multiplier.untyped_storage().resize_(0)
    assert not layer.holds(qweight, scale, None, multiplier)
    with pytest.raises(ArgumentError, match="multiplier must have its memory"):
        PreparedLinear(qweight, scale, None, 9, "int8_per_token", multiplier)


def test_an_expanded_weight_that_is_larger_than_memory_next_to_it() -> None:
    """A process of its own: a read past the end may end it."""
    code = (
        "import torch, bitcore\n"
        "q = torch.full((1, 64), 0x55, dtype=torch.uint8).expand(1 << 18, 64)\n"
        "y = torch.ops.bitlab.linear(torch.ones(17, 64), q, torch.ones(1).expand(1 << 20), None,"
        " 1 << 20, 'float', torch.float32)\n"
        "assert y.eq(0).all()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


def test_outputs_are_contiguous_for_many_tokens(backend: str) -> None:
    """Rows of whole bytes are computed; the others must not be left in between."""
    for out_features in (1, 5, 8):
        qweight, scale = ops.pack_weight(torch.randn(out_features, 64), "per_tensor", None)
        for bias in (None, torch.randn(out_features)):
            args = (torch.randn(17, 64), qweight, scale, bias, out_features, "float")
            opcheck(OPS.linear.default, (*args, torch.float32), graphs=False)


@pytest.mark.parametrize("layout", STRIDED)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_layouts_on_the_cuda_kernels(host: HostKernels, activation: str, layout: str) -> None:
    """The kernels themselves: negated views and tensors of zeros end at the dispatcher."""
    for shape in ((64,), (3, 64), (2, 3, 64)):
        given = [torch.randn(shape), *packed(), torch.randn(9)]
        for index in range(len(given)):
            tensors = list(given)
            tensors[index] = lay_out(given[index], layout)
            y = host.linear(*tensors, 9, activation, torch.float32)
            prepared = host.prepare_linear(*tensors[1:], 9, activation)
            assert torch.equal(prepared(tensors[0], tensors[0].shape, torch.float32), y)
            copies = [plain(tensor) for tensor in tensors]
            expected = host.linear(*copies, 9, activation, torch.float32)
            assert torch.equal(y, expected)


def test_pointers_are_taken_in_one_place() -> None:
    """Of weights: that place refuses what is not contiguous."""
    with pytest.raises(BackendError, match=r"contiguous, got strides \[1, 64\]"):
        native.address(torch.zeros(64, 64).t())
    folder = Path(native.__file__).parent
    # Others are of what was made contiguous just before, of outputs, and of inputs, whose rows may
    # lie apart.
    allowed = {"native.py": 5, "cpu.py": 4, "cpu_experts.py": 4, "cuda.py": 2}
    for file in folder.glob("*.py"):
        found = len(re.findall(r"data_ptr\(\)", file.read_text()))
        assert found == allowed.get(file.name, 0), file.name


def test_scanning_sees_through_views() -> None:
    damaged = torch.zeros(4, 64, dtype=torch.uint8)
    damaged[2, 5] = 0xC0
    for layout in (*STRIDED, "negated"):
        view = lay_out(damaged, layout)
        assert ops.has_invalid_code(view) == bool((plain(view) == 0xC0).any())
    assert not ops.has_invalid_code(lay_out(damaged, "zeros"))
    damaged.untyped_storage().resize_(0)
    with pytest.raises(ArgumentError, match="find_invalid_code: qweight must have its memory"):
        ops.has_invalid_code(damaged)


def test_more_threads_than_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch keeps any number; each would take its share of the workspace."""
    assert native.count_threads() == torch.get_num_threads()
    qweight, scale = ops.pack_weight(torch.randn(256, 256), "per_tensor", None)
    args = (torch.randn(40, 256), qweight, scale, None, 256, "int8_per_token")
    expected = ops.linear(*args)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 10**9)
        assert native.count_threads() == 1024
        assert torch.equal(ops.linear(*args), expected)
        assert not ops.has_invalid_code(qweight)


@pytest.mark.parametrize("step", [-1.0, -0.5, -1e-30, 0.0, -0.0, 1e-45, float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_steps_that_nobody_should_give(isa: str, dtype: torch.dtype, step: float) -> None:
    """Ops look at no values: what the formula gives is the same everywhere."""
    weight = torch.randn(13, 192).to(dtype)
    weight[0, :4] = torch.tensor([0.0, -0.0, float("nan"), float("inf")])
    for shape in ((1,), (13,), (13, 3)):
        steps = torch.full(shape, step)
        steps.view(-1)[1:] *= torch.randint(0, 2, (steps.numel() - 1,)) * 2 - 1
        with bitcore.use_backend("reference"):
            expected = OPS.pack_codes(weight, steps)
        assert torch.equal(native_kernels().pack_codes(weight, steps), expected)


def test_too_many_inputs_are_refused_alike(backend: str) -> None:
    """Sums of more products could overflow, so no op takes them, whoever runs it."""
    k = 131072
    qweight, codes = torch.zeros(1, k, dtype=torch.uint8), torch.zeros(1, k, dtype=torch.int8)
    one, wide = torch.ones(1), torch.zeros(1, k)
    calls: list[Callable[[], object]] = [
        lambda: OPS.quantize_activation(wide, False),
        lambda: OPS.matmul(codes, qweight, 1),
        lambda: OPS.linear(wide, qweight, one, None, 1, "float", torch.float32),
        lambda: OPS.unpack_weight(qweight, one, 1, torch.float32),
        lambda: OPS.input_gradient(one.view(1, 1), qweight, one, 1, torch.float32),
        lambda: OPS.input_gradient_int8(one.view(1, 1), codes, one, torch.float32),
        lambda: OPS.linear_int8(wide, codes, one, None, torch.float32),
        lambda: OPS.experts_linear(
            wide, codes[0, :1].long(), qweight[None], one[None], None, 1, "float", torch.float32
        ),
        lambda: OPS.pack_weight(wide, "per_tensor", 0),
        lambda: OPS.pack_codes(wide, one),
        lambda: OPS.estimate(wide, "absmean", "per_tensor", 0),
        lambda: OPS.pack_weight(wide, "per_group", 64),
    ]
    for call in calls:
        with pytest.raises(ArgumentError, match="in_features must be at most 131071"):
            call()
