"""The CUDA backend on a GPU: the ops against the reference, streams, graphs, devices."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import bitcore
from bitcore import reference
from bitcore.errors import ArgumentError
from bitlayers import BitLinear
from tests.bitcore.learned import make_learned

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [
    (1, 5, 64),
    (1, 2560, 6912),
    (7, 67, 200),
    (16, 640, 2560),
    (33, 130, 320),
    (300, 515, 1088),
    (12, 67, 512),
]


@pytest.mark.parametrize(
    "granularity", ["per_tensor", "per_channel", "per_group", "per_group_float32"]
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_linear_equals_the_reference(
    gpu: torch.device, shape: tuple[int, int, int], dtype: torch.dtype, granularity: str
) -> None:
    tokens, out_features, in_features = shape
    if granularity.startswith("per_group") and in_features % 64:
        granularity = "per_channel"
    latent, x = torch.randn(out_features, in_features), torch.randn(tokens, in_features).to(dtype)
    group_size = 64 if granularity.startswith("per_group") else None
    packed = bitcore.ops.pack_weight(latent.to(gpu), granularity, group_size)
    expected_weight = bitcore.ops.pack_weight(latent, granularity, group_size)
    for ours, expected in zip(packed, expected_weight, strict=True):
        assert torch.equal(ours.cpu(), expected)
    multiplier = packed[2:]
    bias = torch.randn(out_features)
    for activation in ("int8_per_token", "int8_per_tensor"):
        end = (out_features, activation, torch.float32)
        y = torch.ops.bitlab.linear(x.to(gpu), *packed[:2], bias.to(gpu), *end, *multiplier)
        expected = reference.linear(x, *expected_weight[:2], bias, *end, *expected_weight[2:])
        assert torch.equal(y.cpu(), expected)
    end = (out_features, "float", torch.float32)
    y = torch.ops.bitlab.linear(x.to(gpu), *packed[:2], bias.to(gpu), *end, *multiplier)
    weight = reference.unpack_weight(
        *expected_weight[:2], out_features, torch.float64, *expected_weight[2:]
    )
    bound = (x.double().abs() @ weight.abs().t()) * (in_features + 8) * 2.0**-22 + 1e-6
    assert bool(((y.cpu().double() - x.double() @ weight.t() - bias).abs() <= bound).all())


def test_the_reference_gives_the_same_bits_there(gpu: torch.device) -> None:
    x = torch.randn(512, 192)
    found = reference.quantize_activation(x.to(gpu), False)
    for ours, expected in zip(found, reference.quantize_activation(x, False), strict=True):
        assert torch.equal(ours.cpu(), expected)
    found = reference.pack_weight(x.to(gpu), "per_group", 64)
    for ours, expected in zip(found, reference.pack_weight(x, "per_group", 64), strict=True):
        assert ours is not None
        assert expected is not None
        assert torch.equal(ours.cpu(), expected)


def test_a_layer_moves_to_the_gpu_and_gives_the_same_bits(gpu: torch.device) -> None:
    layer = BitLinear(320, 130).eval()
    layer.deploy()
    x = torch.randn(5, 320)
    expected = layer(x)
    assert torch.equal(layer.to(gpu)(x.to(gpu)).cpu(), expected)


def test_calls_are_captured_in_a_graph(gpu: torch.device) -> None:
    x = torch.randn(1, 2560, device=gpu, dtype=torch.bfloat16)
    latent = torch.randn(6912, 2560, device=gpu)
    qweight, scale = torch.ops.bitlab.pack_weight(latent, "per_tensor", 0)[:2]
    args = (qweight, scale, None, 6912, "int8_per_token", torch.bfloat16)
    torch.ops.bitlab.linear(x, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.bitlab.linear(x, *args)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert torch.equal(y, torch.ops.bitlab.linear(x, *args))


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
@pytest.mark.parametrize(("tokens", "width"), [(2, 2560), (5, 768), (16, 4096), (40, 1280)])
def test_few_tokens_through_layers_that_start_early(
    gpu: torch.device, tokens: int, width: int, granularity: str
) -> None:
    """Layers one after another, each beginning beside the one before, replayed: always the same."""
    group = 64 if granularity == "per_group" else None
    weights = [
        bitcore.ops.pack_weight(torch.randn(width, width, device=gpu), granularity, group)
        for _ in range(4)
    ]
    x = torch.randn(tokens, width, device=gpu, dtype=torch.bfloat16)

    def through(linear: Callable[..., torch.Tensor]) -> torch.Tensor:
        y = x
        for qweight, scale, *multiplier in weights:
            end = (None, width, "int8_per_token", torch.bfloat16)
            y = linear(y, qweight, scale, *end, *multiplier)
        return y

    through(torch.ops.bitlab.linear)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = through(torch.ops.bitlab.linear)
    for _ in range(10):
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, through(reference.linear))


def make_experts(
    experts: int, rows: int, columns: int, granularity: str
) -> tuple[torch.Tensor, ...]:
    """Packed weights of all experts, their scales and, of groups, multipliers."""
    group = 64 if granularity.startswith("per_group") else 0
    latent = torch.randn(experts, rows, columns)
    each = [reference.pack_weight(one, granularity, group) for one in latent]
    parts = [[one for one in found if one is not None] for found in zip(*each, strict=True)]
    return tuple(torch.stack(part) for part in parts if part)


@pytest.mark.parametrize("activation", ["int8_per_token", "int8_per_tensor"])
@pytest.mark.parametrize(
    "granularity", ["per_tensor", "per_channel", "per_group", "per_group_float32"]
)
@pytest.mark.parametrize(
    "shape",
    [(3, 2, 40, 67, 192), (1, 8, 16, 1536, 2048), (300, 2, 6, 515, 1088), (200, 4, 32, 130, 320)],
)
def test_experts_equal_the_reference(
    gpu: torch.device, shape: tuple[int, ...], granularity: str, activation: str
) -> None:
    tokens, choices, experts, rows, columns = shape
    qweight, scale, *multiplier = make_experts(experts, rows, columns, granularity)
    x, bias = torch.randn(tokens, columns).bfloat16(), torch.randn(experts, rows)
    index = torch.randint(-1, experts + 1, (tokens, choices))
    args = (x, index, qweight, scale, bias, rows, activation, torch.float32, *multiplier)
    moved = [one.to(gpu) if isinstance(one, torch.Tensor) else one for one in args]
    y = torch.ops.bitlab.experts_linear(*moved)
    assert torch.equal(y.cpu(), reference.experts_linear(*args))


def test_experts_are_captured_in_a_graph(gpu: torch.device) -> None:
    """The graph's tokens go to other experts at every replay."""
    qweight, scale = (one.to(gpu) for one in make_experts(16, 768, 512, "per_channel"))
    x = torch.randn(40, 512, device=gpu, dtype=torch.bfloat16)
    index = torch.randint(0, 16, (40, 4), device=gpu)
    args = (qweight, scale, None, 768, "int8_per_token", torch.bfloat16)
    torch.ops.bitlab.experts_linear(x, index, *args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = torch.ops.bitlab.experts_linear(x, index, *args)
    for most in (16, 2, 1):
        x.copy_(torch.randn_like(x))
        index.copy_(torch.randint(0, most, (40, 4), device=gpu))
        graph.replay()
        assert torch.equal(y, torch.ops.bitlab.experts_linear(x, index, *args))


def test_another_stream_and_every_device(gpu: torch.device) -> None:
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        x, latent = torch.randn(3, 192), torch.randn(64, 192)
        expected = reference.pack_weight(latent, "per_tensor", 0)[:2]
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            moved = [tensor.to(device) for tensor in (x, *expected)]
            y = torch.ops.bitlab.linear(*moved, None, 64, "int8_per_token", torch.float32)
        stream.synchronize()
        end = (None, 64, "int8_per_token", torch.float32)
        assert torch.equal(y.cpu(), reference.linear(x, *expected, *end))


def test_gradients_reach_the_input(gpu: torch.device) -> None:
    x = torch.randn(40, 320, device=gpu, requires_grad=True)
    qweight, scale, multiplier = bitcore.ops.pack_weight(
        torch.randn(130, 320, device=gpu), "per_group", 64
    )
    y = bitcore.ops.linear(x, qweight, scale, None, 130, "int8_per_token", multiplier)
    y.sum().backward()
    weight = reference.unpack_weight(qweight, scale, 130, torch.float64, multiplier)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), weight.sum(0).expand(40, -1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("shape", [(1, 1, 1), (67, 203, 7), (2560, 640, 10), (515, 6912, 54)])
def test_gradients_of_learned_scales_are_the_cpus(
    gpu: torch.device, shape: tuple[int, int, int], granularity: str
) -> None:
    for dtype in DTYPES:
        call = make_learned(shape, granularity, torch.bfloat16, dtype)
        found = torch.ops.bitlab.learned_gradients(*(one.to(gpu) for one in call))
        for ours, expected in zip(found, torch.ops.bitlab.learned_gradients(*call), strict=True):
            assert torch.equal(ours.cpu(), expected)


def test_int8_weights_equal_the_reference(gpu: torch.device) -> None:
    for tokens in (1, 7, 40):
        x, bias = torch.randn(tokens, 320).bfloat16(), torch.randn(130)
        qweight, scale = torch.randint(-127, 128, (130, 320), dtype=torch.int8), torch.rand(130)
        args = (x, qweight, scale, bias)
        y = torch.ops.bitlab.linear_int8(*(one.to(gpu) for one in args), torch.float32)
        assert torch.equal(y.cpu(), reference.linear_int8(*args, torch.float32))


@pytest.mark.parametrize("tokens", [1, 40])
def test_a_training_step_is_the_references(gpu: torch.device, tokens: int) -> None:
    x, weight, dy = torch.randn(tokens, 320), torch.randn(130, 320), torch.randn(tokens, 130)
    found = []
    for device in (gpu, torch.device("cpu")):
        leaves = [one.to(device).requires_grad_() for one in (x, weight)]
        y = bitcore.ops.qat_linear(*leaves, None, "per_channel", None, "int8_per_token")
        y.backward(dy.to(device))
        found.append([one.cpu() for one in (y.detach(), leaves[0].grad, leaves[1].grad)])
    assert torch.equal(found[0][0], found[1][0])
    # Sums of floats in another order.
    for ours, expected in zip(found[0][1:], found[1][1:], strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [40, 1024])
def test_a_training_step_in_bfloat16(gpu: torch.device, tokens: int) -> None:
    """As `scripts/bench/train.py` runs it: few tokens and many take different ways back."""
    x, weight = (torch.randn(n, 320).to(gpu, torch.bfloat16) for n in (tokens, 192))
    dy = torch.randn(tokens, 192).to(gpu, torch.bfloat16)
    leaves = [one.clone().requires_grad_() for one in (x, weight)]
    y = bitcore.ops.qat_linear(*leaves, None, "per_tensor", None, "int8_per_token")
    y.backward(dy)
    qweight, scale = bitcore.ops.pack_weight(weight, "per_tensor", None)
    codes, x_scale = torch.ops.bitlab.quantize_activation(x, False)
    w = bitcore.ops.unpack_weight(qweight, scale, 192, torch.float64)
    rounded = codes.double() * x_scale.double()
    for ours, first, second in ((leaves[0].grad, dy, w), (leaves[1].grad, dy.t(), rounded)):
        assert ours is not None
        exact, size = first.double() @ second, first.double().abs() @ second.abs()
        # Factors and results are rounded to bfloat16.
        assert bool(((ours.double() - exact).abs() <= size * 2.0**-7).all())
        assert not bool(((2 * ours.double() - exact).abs() <= size * 2.0**-7).all())


def test_tensors_on_two_devices_are_refused(gpu: torch.device) -> None:
    packed = reference.pack_weight(torch.randn(64, 192), "per_tensor", 0)[:2]
    with pytest.raises(ArgumentError, match="all tensors must be on cuda:0, got one on cpu"):
        torch.ops.bitlab.linear(
            torch.randn(3, 192, device=gpu), *packed, None, 64, "int8_per_token", torch.float32
        )
