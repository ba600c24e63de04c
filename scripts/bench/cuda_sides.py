"""What bench/cuda.py times: layers, the quantizers of training, and the GPU's own limits.

Without a GPU the same code runs on the CPU (`bench/cuda.py --quick`), call by call instead of as
CUDA graphs, so that nobody with a GPU finds it broken; those times mean nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Call = Callable[[], object]
WARM_UP = 3
MOST_COPIES = 64
# Group sizes by engine: a scale a row, and a multiplier for every so many inputs.
GROUPED = {"bitlab, groups of 128": 128, "bitlab, groups of 64": 64}
# One scale a matrix with the codes of x kept, which no fused kernel does: in several launches. From
# the fewest tokens to the most that any layer fuses.
SEVERAL, SEVERAL_TOKENS = "bitlab, several launches", range(2, 529)
# A kernel must be faster than torch.compile's by this much; else the simpler one is kept.
WORTH = 1.1


@dataclass(frozen=True)
class Bench:
    """How much is measured.

    Attributes:
        device: Where.
        replays: Of each side.
        l2_bytes: Weights rotate through four times as much, or 64 copies.
        ceiling_side: Of the square matmul; the copy moves 8 times its square in bytes.
    """

    device: torch.device
    replays: int = 30
    l2_bytes: int = 64 * 2**20
    ceiling_side: int = 8192


@dataclass(frozen=True)
class Row:
    """One measured side of a layer.

    Attributes:
        shape: Outputs x inputs.
        tokens: M.
        engine: ``"bitlab"`` (one scale a matrix), ``"cublas bf16"``, `SEVERAL` or one of `GROUPED`.
        us: Microseconds of one call, median.
        us_p10: Tenth percentile.
        us_p90: Ninetieth percentile.
        gbs: Bytes of weights, and of groups' multipliers, read a second, in 1e9.
        tops: Multiplications and additions a second, in 1e12.
    """

    shape: str
    tokens: int
    engine: str
    us: float
    us_p10: float
    us_p90: float
    gbs: float
    tops: float


@dataclass(frozen=True)
class Quantizer:
    """A quantizer of training: BitLab's op, and torch.compile's fusion of the same formula.

    Attributes:
        name: What is quantized.
        shape: Of the tensor.
        dtype: Of the tensor.
        us: Microseconds of BitLab's op, median.
        compiled_us: Of the compiled formula.
        equal: Share of the codes (of the numbers, where it gives floats) that are the same.
    """

    name: str
    shape: str
    dtype: str
    us: float
    compiled_us: float
    equal: float

    @property
    def keep(self) -> str:
        """Which of the two the measurement speaks for."""
        return "kernel" if self.compiled_us >= WORTH * self.us else "torch.compile"


def captured(calls: list[Call]) -> Call:
    """Returns the replay of a graph that makes the calls one after another."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def on_gpu(replay: Call) -> float:
    """Returns the microseconds between two events around a replay."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    replay()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1e3


def on_cpu(replay: Call) -> float:
    """Returns the microseconds of a replay."""
    started = time.perf_counter()
    replay()
    return (time.perf_counter() - started) * 1e6


def race(bench: Bench, sides: dict[str, list[Call]]) -> dict[str, list[float]]:
    """Replays the sides in turn; returns the microseconds of one call, sorted."""
    timed = on_gpu if bench.device.type == "cuda" else on_cpu
    replays: dict[str, Call] = {}
    for name, calls in sides.items():
        one_by_one = lambda calls=calls: [call() for call in calls]  # noqa: E731
        replays[name] = captured(calls) if bench.device.type == "cuda" else one_by_one
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(WARM_UP + bench.replays):
        for name, replay in replays.items():
            us = timed(replay)
            if index >= WARM_UP:
                times[name].append(us / len(sides[name]))
    return {name: sorted(found) for name, found in times.items()}


def ceilings(bench: Bench) -> dict[str, float]:
    """Measures what this device can do: a copy in GB/s, a bf16 matmul in TFLOP/s.

    A graph's memcpy is slower than a kernel that copies: the faster of the two counts.
    """
    side, device = bench.ceiling_side, bench.device
    source = torch.randn(2 * side * side, device=device)
    to = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    times = race(
        bench,
        {
            "memcpy": [lambda: to.copy_(source)],
            "kernel": [lambda: torch.neg(source, out=to)],
            "matmul": [lambda: a @ b],
        },
    )
    copy = min(statistics.median(times[name]) for name in ("memcpy", "kernel"))
    return {
        "copy_gbs": 2 * source.nbytes / copy / 1e3,
        "bf16_tops": 2 * side**3 / statistics.median(times["matmul"]) / 1e6,
    }


def copies(bench: Bench, tensor: Tensor) -> list[Tensor]:
    """Returns so many copies of a tensor that none is in the L2 cache when its turn comes."""
    size = tensor.numel() * tensor.element_size()
    return [tensor.clone() for _ in range(min(MOST_COPIES, max(2, -(-4 * bench.l2_bytes // size))))]


def check(call: Call, x: Tensor, packed: tuple[Tensor, ...], out_features: int) -> str | None:
    """Compares the first tokens with plain torch on this device, bit for bit, and makes the call
    that will be timed; returns what is wrong, or None.
    """
    from bitcore import reference

    qweight, scale, *multiplier = packed
    end = (None, out_features, "int8_per_token", torch.float32, *multiplier)
    args: tuple[Any, ...] = (x[:64], qweight, scale, *end)
    try:
        right = torch.equal(torch.ops.bitlab.linear(*args), reference.linear(*args))
        call()
        if x.is_cuda:
            torch.cuda.synchronize()
    except Exception as error:  # the other sides are measured all the same
        return f"{type(error).__name__}: {error}"
    return None if right else "a wrong result"


def measure(bench: Bench, shape: str, tokens: int) -> tuple[list[Row], dict[str, str]]:
    """Times one layer on all sides; returns besides what is wrong with those that are left out."""
    out_features, in_features = (int(size) for size in shape.split("x"))
    x = torch.randn(tokens, in_features, device=bench.device, dtype=torch.bfloat16)
    latent = torch.randn(out_features, in_features, device=bench.device, dtype=torch.bfloat16)
    from bitcore import ops, ops_ternary

    packed = {"bitlab": ops.pack_weight(latent, "per_tensor", None)}
    for engine, group in GROUPED.items():
        if in_features % group == 0:
            packed[engine] = ops.pack_weight(latent, "per_group", group)

    def layer(qweight: Tensor, scale: Tensor, *multiplier: Tensor) -> Call:
        args = (x, qweight, scale, None, out_features, "int8_per_token", torch.bfloat16)
        return lambda: torch.ops.bitlab.linear(*args, *multiplier)

    sides: dict[str, list[Call]] = {}
    failed: dict[str, str] = {}
    for engine, (qweight, *scales) in packed.items():
        problem = check(layer(qweight, *scales), x, (qweight, *scales), out_features)
        if problem is not None:
            failed[engine] = problem
            continue
        rotated = copies(bench, qweight)
        sides[engine] = [layer(one, *(scale.clone() for scale in scales)) for one in rotated]
    if tokens in SEVERAL_TOKENS:
        qweight, scale = packed["bitlab"]
        rest = (scale, None, out_features, "int8_per_token", torch.bfloat16)
        sides[SEVERAL] = [
            lambda q=one: ops_ternary.linear_with_codes(x, q, *rest)
            for one in copies(bench, qweight)
        ]
    sides["cublas bf16"] = [
        lambda w=w: torch.nn.functional.linear(x, w) for w in copies(bench, latent)
    ]
    sizes = {engine: sum(one.nbytes for one in parts) for engine, parts in packed.items()}
    sizes[SEVERAL] = sizes["bitlab"]
    rows = []
    for engine, times in race(bench, sides).items():
        us, tenth = statistics.median(times), len(times) // 10
        size = sizes.get(engine, 2 * latent.numel())
        work = 2 * tokens * latent.numel()
        rows.append(
            Row(shape, tokens, engine, us, times[tenth], times[-1 - tenth], size / us / 1e3,
                work / us / 1e6)
        )  # fmt: skip
    return rows, failed


def quantize_activation(x: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of `torch.ops.bitlab.quantize_activation`, per token."""
    most = x.float().abs().amax(-1, keepdim=True).clamp(min=1e-5)
    codes = (x.float() * (127.0 / most)).round().clamp(-128, 127).to(torch.int8)
    return codes, most / 127.0


def pack_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """The formula of `torch.ops.bitlab.pack_weight`, per tensor, with float32 sums."""
    scale = weight.float().abs().mean().clamp(min=1e-5)
    codes = (weight.float() * (1.0 / scale)).round().clamp(-1, 1).add(1).to(torch.uint8)
    lanes = codes.view(4, -1, weight.shape[1])
    return lanes[0] | lanes[1] << 2 | lanes[2] << 4 | lanes[3] << 6, scale.view(1)


def unpack_weight(qweight: Tensor, scale: Tensor) -> Tensor:
    """The formula of `torch.ops.bitlab.unpack_weight` to bfloat16: what a backward pass reads."""
    lanes = torch.stack([qweight >> shift & 3 for shift in (0, 2, 4, 6)])
    return ((lanes.view(-1, qweight.shape[1]).float() - 1) * scale).to(torch.bfloat16)


def compiled(function: Callable[..., object], device: torch.device) -> Callable[..., object]:
    """Compiles with torch.compile; on a CPU, where nothing is measured, only traced."""
    backend = "inductor" if device.type == "cuda" else "eager"
    return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)


def first_of(result: object) -> Tensor:
    """Returns a tensor, or the first of several."""
    found = result[0] if isinstance(result, tuple) else result
    assert isinstance(found, Tensor)
    return found


def quantizers(bench: Bench, shape: str, tokens: int, dtype: torch.dtype) -> list[Quantizer]:
    """Times the quantizers of a training step's forward and backward pass for one layer."""
    torch.compiler.reset()  # dynamo keeps a few shapes of a function at most
    out_features, in_features = (int(size) for size in shape.split("x"))
    x = torch.randn(tokens, in_features, device=bench.device, dtype=dtype)
    latent = torch.randn(out_features, in_features, device=bench.device, dtype=dtype)
    qweight, scale = torch.ops.bitlab.pack_weight(latent, "per_tensor", 0)[:2]
    unpack = (out_features, torch.bfloat16)
    ops = torch.ops.bitlab
    raced: list[tuple[str, list[Tensor], Callable[..., object], Callable[..., object]]] = [
        ("forward: x", [x], lambda x: ops.quantize_activation(x, False), quantize_activation),
        ("forward: W", [latent], lambda w: ops.pack_weight(w, "per_tensor", 0), pack_weight),
        ("backward: W", [qweight, scale], lambda q, s: ops.unpack_weight(q, s, *unpack),
         unpack_weight),
    ]  # fmt: skip
    found = []
    for name, inputs, ours, formula in raced:
        fused = compiled(formula, bench.device)
        same = first_of(ours(*inputs)) == first_of(fused(*inputs))
        rotated = copies(bench, inputs[0])
        sides: dict[str, list[Call]] = {
            "bitlab": [lambda t=t, f=ours, rest=inputs[1:]: f(t, *rest) for t in rotated],
            "compiled": [lambda t=t, f=fused, rest=inputs[1:]: f(t, *rest) for t in rotated],
        }
        times = {side: statistics.median(us) for side, us in race(bench, sides).items()}
        described = "x".join(map(str, inputs[0].shape)) if name.endswith("x") else shape
        kind = str(dtype).removeprefix("torch.")
        equal = float(same.float().mean())
        found.append(Quantizer(name, described, kind, times["bitlab"], times["compiled"], equal))
    return found


def gradients(bench: Bench, shape: str) -> list[Row]:
    """Times the two products of a layer's backward pass in bfloat16, beside dense ones: of the most
    tokens whose input gradient goes through the packed weight, and of one more.
    """
    from bitcore import gradients as backward
    from bitcore.kernels.cuda import UNPACKED_TOKENS

    out_features, in_features = (int(size) for size in shape.split("x"))
    latent = torch.randn(out_features, in_features, device=bench.device, dtype=torch.bfloat16)
    qweight, scale = torch.ops.bitlab.pack_weight(latent, "per_tensor", 0)[:2]
    rows = []
    for tokens in (UNPACKED_TOKENS - 1, UNPACKED_TOKENS):
        x, dy = (
            torch.randn(tokens, size, device=bench.device, dtype=torch.bfloat16)
            for size in (in_features, out_features)
        )
        inputs = [*torch.ops.bitlab.quantize_activation(x, False)]
        rest = (scale, out_features, torch.bfloat16)
        sides: dict[str, list[Call]] = {
            "bitlab, dx": [
                lambda q=one, dy=dy, rest=rest: torch.ops.bitlab.input_gradient(dy, q, *rest)
                for one in copies(bench, qweight)
            ],
            "cublas bf16, dx": [lambda w=w, dy=dy: dy @ w for w in copies(bench, latent)],
            "bitlab, dW": [lambda dy=dy, i=inputs: backward.weight_gradient(dy, i, torch.bfloat16)],
            "cublas bf16, dW": [lambda x=x, dy=dy: dy.t() @ x],
        }
        work = 2 * tokens * latent.numel()
        for engine, times in race(bench, sides).items():
            us, tenth = statistics.median(times), len(times) // 10
            size = (qweight if engine == "bitlab, dx" else latent).nbytes
            rows.append(
                Row(shape, tokens, engine, us, times[tenth], times[-1 - tenth], size / us / 1e3,
                    work / us / 1e6)
            )  # fmt: skip
    return rows
