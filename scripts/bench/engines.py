"""The contenders of bench/linear.py: BitLab and its peers, each with distinct copies of a weight.

All compute the same product of the same ternary codes: `check` compares them before any is timed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from ggml_peer import BLOCK, Ggml, GgmlLinear
from torch import Tensor, nn

from bitcore import ops
from bitcore.checks import MOST_MULTIPLIER
from bitcore.config import BitQuantConfig
from bitcore.kernels import kernels_for
from bitlayers.bitlinear import BitLinear

NAMES = (
    "bitlab", "bitlab bf16", "bitlab native", "torch f32", "torch bf16", "torch int8",
    "torch dynamic", "transformers", "ggml TQ2_0",
)  # fmt: skip


@dataclass(frozen=True)
class Granularity:
    """A scheme of scales, for what BitLab is timed with beside one scale for the matrix.

    Attributes:
        title: As in the tables.
        packing: How the ops call it, and its group size.
    """

    title: str
    packing: tuple[str, int]


GRANULARITIES = {
    "per_channel": Granularity("per channel", ("per_channel", 0)),
    "128": Granularity("groups of 128", ("per_group", 128)),
    "64": Granularity("groups of 64", ("per_group", 64)),
}
DEFAULT = tuple(name for name in NAMES if name != "torch dynamic")
# Relative to the largest output; int8 activations and 16-bit weights stay well below.
TOLERANCE = 0.05

Calls = list[Callable[[], object]]


@dataclass
class Engine:
    """One contender.

    Attributes:
        name: As in the tables.
        weight_bytes: Bytes of weights and scales that one call reads.
        calls: For an input [M, K] in float32, one call for each copy of the weight.
        output: What the last call gave, where calls do not return it.
        isa: The instruction set to select before each call; empty where it makes no difference.
    """

    name: str
    weight_bytes: int
    calls: Callable[[Tensor], Calls]
    output: Callable[[], Tensor] | None = None
    isa: str = ""

    def select(self) -> None:
        """Selects the engine's instruction set."""
        if self.isa:
            kernels: Any = kernels_for("cpu")
            kernels.select_isa(self.isa)


class Weight:
    """One ternary matrix [N, K] and everything that the engines make of it."""

    def __init__(self, out_features: int, in_features: int) -> None:
        linear = nn.Linear(in_features, out_features, bias=False)
        self.layer = BitLinear.from_linear(linear).deploy()
        self.scale = float(self.layer.qweight_scale)
        self.codes = ops.unpack_weight(
            self.layer.qweight, torch.ones(1), out_features, torch.float32
        ).to(torch.int8)

    def packed(self, granularity: str) -> tuple[Tensor, ...]:
        """Returns the same product's packed tensors with other scales, all equal."""
        rows, columns = self.codes.shape
        _, group_size = GRANULARITIES[granularity].packing
        qweight = self.layer.qweight.detach()
        if not group_size:
            return qweight, torch.full((rows,), self.scale)
        multiplier = torch.full((rows, columns // group_size), MOST_MULTIPLIER, dtype=torch.uint8)
        return qweight, torch.full((rows,), self.scale / MOST_MULTIPLIER), multiplier

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Returns codes times scale."""
        return (self.codes.float() * self.scale).to(dtype)


def int8_linear(x: Tensor, weight_t: Tensor, scale: Tensor | float) -> Tensor:
    """The activation quantization of BitNet and `_int_mm`, in torch's own ops."""
    largest = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    codes = (x * (127.0 / largest)).round().clamp(-128, 127).to(torch.int8)
    return torch._int_mm(codes, weight_t).float() * (largest / 127.0 * scale)


def _count(weight_bytes: int, cold: int) -> int:
    """Returns how many copies of a weight take `cold` bytes: too many for a cache to keep one."""
    return max(1, -(-cold // weight_bytes))


def _copies(tensor: Tensor, cold: int) -> list[Tensor]:
    count = _count(tensor.numel() * tensor.element_size(), cold)
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def _modules(module: nn.Module, weight_bytes: int, cold: int) -> list[nn.Module]:
    count = _count(weight_bytes, cold)
    return [module.eval(), *(copy.deepcopy(module) for _ in range(count - 1))]


def _applied(functions: list[Any], dtype: torch.dtype) -> Callable[[Tensor], Calls]:
    """Returns what makes the calls of functions that take one input of dtype."""

    def calls(x: Tensor) -> Calls:
        x = x.to(dtype)
        return [partial(function, x) for function in functions]

    return calls


def _bitlab(weight: Weight, cold: int, name: str, isa: str, label: str) -> Engine:
    layer = weight.layer
    size = layer.qweight.numel() + 4
    dtype = torch.bfloat16 if name == "bitlab bf16" else torch.float32
    functions: list[Any]
    if name == "bitlab native":
        kernels = kernels_for("cpu")
        functions = [
            lambda x, qweight=qweight: kernels.linear(
                x, qweight, layer.qweight_scale, None, layer.out_features,
                "int8_per_token", torch.float32,
            )
            for qweight in _copies(layer.qweight.detach(), cold)
        ]  # fmt: skip
    else:
        functions = list(_modules(layer, size, cold))
    return Engine(label, size, _applied(functions, dtype), isa=isa)


def _scaled(weight: Weight, cold: int, granularity: str, isa: str, label: str) -> Engine:
    """BitLab's layer with other scales than one for the matrix."""
    name, group_size = GRANULARITIES[granularity].packing
    rows, columns = weight.codes.shape
    config = BitQuantConfig(weight_granularity=name, group_size=group_size or None)
    layer = BitLinear.packed_skeleton(columns, rows, False, config)
    layer.commit_packed(*weight.packed(granularity))
    size = sum(tensor.numel() * tensor.element_size() for tensor in layer.packed())
    return Engine(label, size, _applied(list(_modules(layer, size, cold)), torch.float32), isa=isa)


def _dense(weight: Weight, cold: int, name: str) -> Engine:
    dtype = torch.bfloat16 if name == "torch bf16" else torch.float32
    rows, columns = weight.codes.shape
    linear = nn.Linear(columns, rows, bias=False, device="meta")
    linear.weight = nn.Parameter(weight.dense(dtype), requires_grad=False)
    size = rows * columns * dtype.itemsize
    return Engine(name, size, _applied(list(_modules(linear, size, cold)), dtype))


def _int8(weight: Weight, cold: int, name: str) -> Engine:
    weights = [codes.t() for codes in _copies(weight.codes, cold)]
    functions = [partial(int8_linear, weight_t=one, scale=weight.scale) for one in weights]
    return Engine(name, weight.codes.numel(), _applied(functions, torch.float32))


def _dynamic(weight: Weight, cold: int, name: str) -> Engine:
    """torch.ao's dynamically quantized linear layer, on oneDNN."""
    torch.backends.quantized.engine = "onednn"
    quantized = torch._make_per_tensor_quantized_tensor(weight.codes, weight.scale, 0)
    count = _count(weight.codes.numel(), cold)
    packed = [torch.ops.quantized.linear_prepack(quantized, None) for _ in range(count)]
    functions = [
        lambda x, one=one: torch.ops.quantized.linear_dynamic(x, one, False) for one in packed
    ]
    return Engine(name, weight.codes.numel(), _applied(functions, torch.float32))


def _transformers(weight: Weight, cold: int, name: str) -> Engine:
    """The layer that transformers has for packed bitnet checkpoints, not compiled."""
    from transformers.integrations.bitnet import BitLinear as StockBitLinear

    rows, columns = weight.codes.shape
    layer = StockBitLinear(columns, rows, bias=False, dtype=torch.bfloat16)
    layer.weight = weight.layer.qweight.detach().clone()
    layer.weight_scale = torch.tensor([1 / weight.scale], dtype=torch.bfloat16)  # it divides
    size = layer.weight.numel() + 2
    return Engine(name, size, _applied(list(_modules(layer, size, cold)), torch.bfloat16))


def _ggml(weight: Weight, cold: int, name: str, ggml: Ggml) -> Engine:
    size = weight.codes.numel() // BLOCK * 66
    linear = GgmlLinear(ggml, weight.dense(torch.float32), _count(size, cold))
    return Engine(name, linear.weight_bytes, linear.calls, output=lambda: linear.y)


def build(
    weight: Weight,
    names: list[str],
    granularities: list[str],
    isas: list[str],
    cold: int,
    ggml: Ggml | None,
) -> list[Engine]:
    """Returns the engines of these names that can run here.

    Args:
        weight: What they multiply with.
        names: Of `NAMES`.
        granularities: Of `GRANULARITIES`: further engines of BitLab.
        isas: The instruction set of BitLab's engines, and further ones for `bitlab` only.
        cold: Bytes of distinct weights that each engine rotates over.
        ggml: The library, or None where it is not installed.
    """
    makers: dict[str, Callable[[Weight, int, str], Engine]] = {
        "torch f32": _dense,
        "torch bf16": _dense,
        "torch int8": _int8,
        "torch dynamic": _dynamic,
        "transformers": _transformers,
    }
    engines: list[Engine] = []
    for name in names:
        if name.startswith("bitlab"):
            engines.append(_bitlab(weight, cold, name, isas[0], name))
        elif name in makers:
            engines.append(makers[name](weight, cold, name))
        elif ggml is not None:
            engines.append(_ggml(weight, cold, name, ggml))
    for name in granularities:
        title = GRANULARITIES[name].title
        engines.append(_scaled(weight, cold, name, isas[0], f"bitlab {title}"))
    for isa in isas[1:]:
        engines.append(_bitlab(weight, cold, "bitlab", isa, f"bitlab [{isa}]"))
        for name in granularities:
            title = GRANULARITIES[name].title
            engines.append(_scaled(weight, cold, name, isa, f"bitlab {title} [{isa}]"))
    return engines


def build_head(out_features: int, in_features: int) -> list[Engine]:
    """Returns the engines for an output head: one 16-bit or 8-bit weight, larger than any cache."""
    codes = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
    scale = torch.rand(out_features) * 1e-3 + 1e-3
    scale_bf16 = scale.bfloat16()
    linear = nn.Linear(in_features, out_features, bias=False, device="meta")
    dense = torch.empty((out_features, in_features), dtype=torch.bfloat16)
    torch.mul(codes, scale_bf16[:, None], out=dense)
    linear.weight = nn.Parameter(dense, requires_grad=False)
    torch.backends.quantized.engine = "onednn"
    quantized = torch._make_per_channel_quantized_tensor(
        codes, scale.double(), torch.zeros(out_features, dtype=torch.int64), 0
    )
    packed = torch.ops.quantized.linear_prepack(quantized, None)
    # Without VNNI, sums of two products of 8 bits saturate: torch's answer is 7 bits.
    reduce_range = not torch.cpu._is_vnni_supported()

    def bitlab(x: Tensor) -> Any:
        return torch.ops.bitlab.linear_int8(x, codes, scale, None, torch.float32)

    def int8pack(x: Tensor) -> Tensor:
        return torch._weight_int8pack_mm(x, codes, scale_bf16)

    def dynamic(x: Tensor) -> Any:
        return torch.ops.quantized.linear_dynamic(x, packed, reduce_range)

    int8 = partial(int8_linear, weight_t=codes.t(), scale=scale)
    size = codes.numel()
    contenders: list[tuple[str, Any, torch.dtype, int]] = [
        ("torch bf16", linear, torch.bfloat16, 2 * size),
        ("torch int8pack", int8pack, torch.bfloat16, size),
        ("torch int8", int8, torch.float32, size),
        ("torch dynamic", dynamic, torch.float32, size),
    ]
    if hasattr(torch.ops.bitlab, "linear_int8"):
        contenders.insert(0, ("bitlab int8", bitlab, torch.float32, size))
    return [
        Engine(name, size, _applied([function], dtype))
        for name, function, dtype, size in contenders
    ]


def check(engines: list[Engine], x: Tensor) -> None:
    """Checks that all engines compute the same product of x.

    Raises:
        SystemExit: One differs by more than rounding can explain.
    """
    outputs: dict[str, Tensor] = {}
    for engine in engines:
        engine.select()
        value: Any = engine.calls(x)[0]()
        outputs[engine.name] = (value if engine.output is None else engine.output()).float()
    name, first = next(iter(outputs.items()))
    for other, output in outputs.items():
        error = float((output - first).abs().max() / first.abs().max())
        if not error <= TOLERANCE:
            raise SystemExit(f"{other} differs from {name} by {error:.3g}: not the same product")
