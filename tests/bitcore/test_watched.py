"""Ops under what watches them: other devices, fake modes, traces, forward-mode derivatives."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

from bitcore import ops
from bitcore.errors import ArgumentError, ArgumentTypeError, DerivativeError
from bitcore.plain import is_watched
from bitlayers import BitLinear
from bitlayers.int8 import Int8Embedding, Int8Linear
from tests.bitcore.test_memory import CALLS

OPS = torch.ops.bitlab
SEVERAL = [name for name, (_, make) in CALLS.items() if len(make()) > 1]


@pytest.mark.parametrize("name", SEVERAL)
def test_meta_tensors_beside_others_are_refused(name: str) -> None:
    """The fake kernel runs then, and would return memory that nothing was written to."""
    op, make = CALLS[name]
    given = make()
    for index in range(len(given)):
        moved = [t.to("meta") if i == index else t for i, t in enumerate(given)]
        with pytest.raises(ArgumentError, match="all tensors must be on "):
            op(*moved)
        moved = [t if i == index else t.to("meta") for i, t in enumerate(given)]
        with pytest.raises(ArgumentError, match="all tensors must be on "):
            op(*moved)
    for y in outputs(op(*(t.to("meta") for t in given))):
        assert y.is_meta


@pytest.mark.parametrize("name", CALLS)
def test_fakes_have_the_shapes_of_the_results(name: str) -> None:
    op, make = CALLS[name]
    given = make()
    real = outputs(op(*given))
    with FakeTensorMode() as mode:
        fakes = outputs(op(*(mode.from_tensor(t) for t in given)))
    for one, other in zip(real, fakes, strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())
        assert other.device == one.device


@pytest.mark.parametrize("name", SEVERAL)
def test_fakes_on_two_devices_are_refused(name: str) -> None:
    """As FakeTensors say, of devices that need not be there."""
    op, make = CALLS[name]
    given = make()
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(t) for t in given]
        for index in range(len(given)):
            moved = list(fakes)
            moved[index] = torch.empty_like(fakes[index], device="cuda:0")
            # torch's own check may come first.
            with pytest.raises((ArgumentError, RuntimeError), match=r"devices|all tensors must"):
                op(*moved)


@pytest.mark.parametrize("place", ["cpu", "meta", "fake"])
@pytest.mark.parametrize("name", CALLS)
def test_wrong_dtypes_and_ranks_are_refused(name: str, place: str) -> None:
    op, make = CALLS[name]
    given = make()

    def call(args: list[Tensor]) -> object:
        if place != "fake":
            return op(*(t.to(place) for t in args))
        with FakeTensorMode() as mode:
            return op(*(mode.from_tensor(t) for t in args))

    for index, tensor in enumerate(given):
        wrong = [tensor.to(torch.complex64), tensor.to(torch.int32), tensor.double()]
        wrong += [tensor.new_ones(())]
        if name != "quantize_activation":
            wrong += [tensor.new_ones((2, 2, 2, 2)), tensor.new_ones((11,))]
        for other in wrong:
            with pytest.raises((ArgumentError, ArgumentTypeError), match=r"^[\w:]+: \w+ must "):
                call([other if i == index else t for i, t in enumerate(given)])


def outputs(result: object) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)  # type: ignore[arg-type]


def test_layers_with_weights_on_the_meta_device() -> None:
    x, index = torch.randn(5, 64), torch.tensor([1, 2])
    bit = [BitLinear(64, 32), BitLinear(64, 32).eval(), BitLinear(64, 32).eval().deploy()]
    for layer in (*bit, Int8Linear.from_linear(torch.nn.Linear(64, 32))):
        before = layer(x)
        layer.to("meta")
        with pytest.raises(ArgumentError, match="all tensors must be on"):
            layer(x)
        assert layer(x.to("meta")).is_meta
        assert before.device.type == "cpu"
    embedding = Int8Embedding.from_embedding(torch.nn.Embedding(32, 64))
    with pytest.raises(ArgumentError, match="all tensors must be on meta, got one on cpu"):
        embedding(index.to("meta"))
    embedding.to("meta")
    with pytest.raises(ArgumentError, match="all tensors must be on cpu, got one on meta"):
        embedding(index)
    assert embedding(index.to("meta")).is_meta


@pytest.mark.parametrize("name", CALLS)
def test_a_forward_mode_tangent_is_refused(backend: str, name: str) -> None:
    """Without a formula, torch would drop it: a derivative of zero."""
    op, make = CALLS[name]
    given = make()
    for index, tensor in enumerate(given):
        if not tensor.is_floating_point():
            continue

        def changed(values: Tensor, index: int = index) -> Tensor:
            args = [values if i == index else t for i, t in enumerate(given)]
            return outputs(op(*args))[0]

        ones = torch.ones_like(tensor)
        for requires_grad in (False, True):
            with forward_ad.dual_level():
                leaf = tensor.clone().requires_grad_(requires_grad)
                with pytest.raises(
                    DerivativeError, match=r"bitlab::\w+: the arguments must have no"
                ):
                    changed(forward_ad.make_dual(leaf, ones))
                # Constants beside a tangent elsewhere are what they always are.
                assert torch.equal(changed(tensor), outputs(op(*given))[0])
        with pytest.raises(DerivativeError):
            torch.func.jvp(changed, (tensor,), (ones,))
        with pytest.raises(DerivativeError):
            torch.func.jacfwd(changed)(tensor)


def test_layers_refuse_a_forward_mode_tangent() -> None:
    x = torch.randn(3, 64)
    for layer in (BitLinear(64, 32), BitLinear(64, 32).eval(), BitLinear(64, 32).eval().deploy()):
        with torch.no_grad():
            layer(x)
        for grad in (torch.no_grad(), torch.enable_grad()):
            with grad, forward_ad.dual_level(), pytest.raises(DerivativeError):
                layer(forward_ad.make_dual(x, torch.ones_like(x)))


def test_ops_without_a_gradient_say_so() -> None:
    x = torch.randn(3, 64, requires_grad=True)
    with pytest.raises(DerivativeError, match="bitlab::quantize_activation: the output has no"):
        OPS.quantize_activation(x, False)[1].sum().backward()
    qweight, scale = ops.pack_weight(torch.randn(9, 64), "per_tensor", None)
    y = ops.linear(x, qweight, scale, None, 9, "int8_per_token")
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.isfinite(dx).all()


def test_what_watches() -> None:
    assert not is_watched()
    with FakeTensorMode():
        assert is_watched()
    with forward_ad.dual_level():
        assert is_watched()
    seen: list[bool] = []

    def function(x: Tensor) -> Tensor:
        seen.append(is_watched())
        return x + 1

    torch.vmap(function)(torch.ones(2))
    torch.jit.trace(function, torch.ones(2), check_trace=False)
    assert seen == [True, True]
    assert not is_watched()


def cold(code: str) -> None:
    """Runs a program in a process of its own, where no op was called before."""
    start = "import torch, bitcore\nfrom bitcore import ops\nfrom bitlayers import BitLinear\n"
    subprocess.run([sys.executable, "-W", "error", "-c", start + code], check=True, timeout=300)


def test_a_fake_mode_before_the_first_call() -> None:
    """What is made under it is kept by nobody: not a workspace, not a prepared layer."""
    cold(
        "from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode\n"
        "with FakeTensorMode():\n"
        "    q, s = ops.pack_weight(torch.randn(8, 64), 'per_tensor', None)\n"
        "    for a in ('int8_per_token', 'float'):\n"
        "        y = ops.linear(torch.randn(2, 64), q, s, None, 8, a)\n"
        "        assert isinstance(y, FakeTensor)\n"
        "q, s = ops.pack_weight(torch.randn(8, 64), 'per_tensor', None)\n"
        "assert type(ops.linear(torch.randn(2, 64), q, s, None, 8, 'float')) is torch.Tensor\n"
        "layer = BitLinear(64, 8).eval().deploy()\n"
        "with FakeTensorMode(allow_non_fake_inputs=True):\n"
        "    assert isinstance(layer(torch.randn(2, 64)), FakeTensor)\n"
        "x = torch.randn(2, 64)\n"
        "with torch.no_grad():\n"
        "    y = layer(x)\n"
        "assert type(y) is torch.Tensor\n"
        "args = (layer.qweight, layer.qweight_scale, layer.bias, 8, 'int8_per_token')\n"
        "assert torch.equal(y, ops.linear(x, *args))\n"
    )


@pytest.mark.parametrize("bias", [False, True])
def test_a_trace_before_the_first_call(bias: bool) -> None:
    """The graph reads the layer's own tensors, and is the same when it is traced again."""
    cold(
        f"layer = BitLinear(64, 8, bias={bias}).eval().deploy()\n"
        "x = torch.randn(2, 64)\n"
        "import warnings\n"
        "warnings.simplefilter('ignore')\n"
        "traced = torch.jit.trace(layer, x)\n"
        "other = torch.randn(5, 64)\n"
        "assert torch.equal(traced(other), layer(other))\n"
        "names = [node.kind() for node in traced.graph.nodes()]\n"
        "assert 'bitlab::linear' in names, names\n"
        "assert 'aten::contiguous' not in names, names\n"
    )


def test_functorch_before_the_first_call() -> None:
    cold(
        "layer = BitLinear(64, 8).eval().deploy()\n"
        "x = torch.randn(3, 64)\n"
        "import warnings\n"
        "warnings.simplefilter('ignore')\n"
        "batched = torch.vmap(layer)(x[:, None])\n"
        "with torch.no_grad():\n"
        "    assert torch.equal(batched[:, 0], layer(x))\n"
    )
