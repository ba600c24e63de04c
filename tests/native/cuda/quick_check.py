"""One call of every kernel at the shapes where it can go wrong: what the mutation test runs."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bitcore import pack_ternary, reference
from bitcore.errors import BitLabError
from tests.bitcore.learned import make_learned, step_gradient_in_lanes
from tests.native.cuda.host import CONFLICTS, HostKernels
from tests.native.cuda.quick_hopper import fused_pairs, kept, wgmma_pairs
from tests.native.cuda.test_emulator import documented

# Tokens, outputs, inputs: one token fused; one and two tiles; many tokens, narrow and wide.
SHAPES = [
    (1, 70, 1008),
    (1, 300, 1008),
    (2, 9, 31),
    (3, 70, 176),
    (11, 70, 640),
    (20, 130, 320),
    (70, 70, 112),
]


def ordered_shares(kernels: HostKernels, tokens: int) -> tuple[Tensor, Tensor]:
    """Shares of K whose float32 sum is 1 in ascending order and 0 in any other."""
    kernels.multiprocessors = 132
    in_features = 64 * 16 * 3
    x = torch.zeros(tokens, in_features, dtype=torch.bfloat16)
    x[:, 0], x[:, in_features // 2], x[:, -1] = 2.0**25, -(2.0**25), 1.0
    qweight = pack_ternary(torch.ones(1, in_features, dtype=torch.int8))
    y = kernels.linear(x, qweight, torch.ones(1), None, 1, "float", torch.float32)
    kernels.multiprocessors = 4
    return y, torch.ones(tokens, 1)


def tied_tokens() -> Tensor:
    """Tokens whose elements lie halfway between two codes: one rounding more changes a code."""
    most = torch.rand(64, 1) + 1.0
    return torch.cat([most, most * (torch.arange(126) + 0.5) / 127.0], dim=1)


def uneven_weight() -> Tensor:
    """A row whose float64 sum is halfway between two float32 numbers in ascending order alone."""
    return torch.tensor([[0.0, 2.0**53, 2.0**29] + [1.0] * 13])


def pairs(kernels: HostKernels) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """Calls that give a result and what it must be: integers and int8 layers exactly."""
    for tokens, out_features, in_features in SHAPES:
        bias = torch.randn(out_features)
        x = torch.randn(tokens, in_features)
        codes = torch.randint(-128, 128, (tokens, in_features), dtype=torch.int8)
        latent = torch.randn(out_features, in_features)
        weight = torch.randint(-127, 128, (out_features, in_features), dtype=torch.int8)
        grouped = ["per_group_float32"] if in_features % 64 == 0 else []
        for granularity in ("per_tensor", "per_channel", *grouped):
            packed, scale = reference.pack_weight(latent, granularity, 64)[:2]

            def layer(
                activation: str,
                x: Tensor = x,
                packed: Tensor = packed,
                scale: Tensor = scale,
                bias: Tensor = bias,
                count: int = out_features,
            ) -> tuple[Tensor, Tensor]:
                args = (x, packed, scale, bias, count, activation, torch.float32)
                return kernels.linear(*args), reference.linear(*args)

            def packing(
                granularity: str = granularity,
                latent: Tensor = latent,
                packed: Tensor = packed,
                scale: Tensor = scale,
            ) -> tuple[Tensor, Tensor]:
                ours = kernels.pack_weight(latent, granularity, 64)
                flat = [ours[0].flatten().float(), ours[1].flatten()]
                return torch.cat(flat), torch.cat([packed.flatten().float(), scale.flatten()])

            def unpacking(
                packed: Tensor = packed, scale: Tensor = scale, count: int = out_features
            ) -> tuple[Tensor, Tensor]:
                args = (packed, scale, count, torch.float32)
                return kernels.unpack_weight(*args), reference.unpack_weight(*args)

            if in_features % 64 == 0:
                yield lambda x=x, q=packed, s=scale, n=out_features: kept(kernels, x, q, s, n)
            yield lambda layer=layer: layer("int8_per_token")
            yield lambda layer=layer: layer("int8_per_tensor")
            yield packing
            yield unpacking
        yield lambda c=codes, q=packed, n=out_features: (
            kernels.matmul(c, q, n),
            reference.matmul(c, q, n),
        )
        yield lambda x=x, w=weight, b=bias: (
            kernels.linear_int8(x, w, b.abs(), b, torch.bfloat16),
            reference.linear_int8(x, w, b.abs(), b, torch.bfloat16),
        )
    yield from group_pairs(kernels)
    ties, uneven = tied_tokens(), uneven_weight()
    yield lambda: (
        kernels.quantize_activation(ties, False)[0],
        reference.quantize_activation(ties, False)[0],
    )
    for weight in (uneven, uneven.t().contiguous()):
        yield lambda w=weight: (
            kernels.pack_weight(w, "per_tensor", 0)[1],
            reference.pack_weight(w, "per_tensor", 0)[1],
        )
    one, (packed, scale) = (
        torch.randn(1, 128),
        reference.pack_weight(torch.randn(9, 128), "per_channel", 0)[:2],
    )
    yield lambda: kept(kernels, one, packed, scale, 9)
    yield lambda: ordered_shares(kernels, 3)
    yield lambda: ordered_shares(kernels, 20)


def group_pairs(kernels: HostKernels) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """One token and few tokens with groups: one kernel, and shares of K whose terms are added."""
    for tokens, group, multiprocessors in ((1, 64, 1), (1, 128, 1), (1, 64, 132), (3, 64, 132)):
        in_features = 64 * 38
        packed, scale = reference.pack_weight(
            torch.randn(70, in_features), "per_group_float32", group
        )[:2]
        args = (torch.randn(tokens, in_features), packed, scale, None, 70, "int8_per_token")

        def layer(
            args: tuple[Any, ...] = args, multiprocessors: int = multiprocessors
        ) -> tuple[Tensor, Tensor]:
            kernels.multiprocessors = multiprocessors
            ours = kernels.linear(*args, torch.float32)
            kernels.multiprocessors = 4
            return ours, reference.linear(*args, torch.float32)

        yield layer


def two_levels(out_features: int, in_features: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """A packed weight whose groups have multipliers of 0 to 127."""
    sizes = 10 ** (-2.5 * torch.rand(out_features, in_features // group))
    latent = torch.randn(out_features, in_features) * sizes.repeat_interleave(group, 1)
    qweight, scale, multiplier = reference.pack_weight(latent, "per_group", group)
    assert multiplier is not None
    multiplier[torch.rand(multiplier.shape) < 0.1] = 0
    return qweight, scale, multiplier


def multiplied_pairs(kernels: HostKernels) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """Groups in two levels: every kernel, shares of K, codes that are kept, packing."""
    for tokens, out_features, in_features, group, multiprocessors, wgmma in (
        (1, 70, 1408, 64, 4, False),
        (1, 300, 1408, 128, 1, False),
        (3, 9, 640, 64, 4, False),
        (11, 70, 1408, 128, 4, False),
        (5, 70, 2432, 64, 132, False),
        (20, 130, 384, 64, 4, False),
        (70, 70, 640, 128, 4, False),
        (20, 70, 2432, 64, 132, False),
        (40, 70, 1216, 64, 4, True),
        (66, 314, 1280, 128, 1, True),
        (40, 70, 2176, 64, 132, True),
    ):
        qweight, scale, multiplier = two_levels(out_features, in_features, group)
        x, bias = torch.randn(tokens, in_features), torch.randn(out_features)
        args = (x, qweight, scale, bias, out_features, "int8_per_token", torch.float32, multiplier)

        def layer(
            args: tuple[Any, ...] = args, count: int = multiprocessors, wgmma: bool = wgmma
        ) -> tuple[Tensor, Tensor]:
            kernels.set_hopper(wgmma)
            kernels.multiprocessors = count
            ours = kernels.linear(*args)
            kernels.multiprocessors = 4
            kernels.set_hopper(False)
            return ours, reference.linear(*args)

        yield layer
    for out_features, in_features, group in ((70, 640, 64), (9, 384, 128), (5, 2432, 64)):
        sizes = 10 ** (-3.5 * torch.rand(out_features, in_features // group))
        latent = torch.randn(out_features, in_features) * sizes.repeat_interleave(group, 1)
        latent[out_features // 2, 5] = float("nan") if out_features == 9 else 0.0

        def packing(latent: Tensor = latent, group: int = group) -> tuple[Tensor, Tensor]:
            found = [
                kernel.pack_weight(latent, "per_group", group) for kernel in (kernels, reference)
            ]
            flat = [[one.flatten().float() for one in parts if one is not None] for parts in found]
            ours, expected = (torch.cat(parts).nan_to_num(-7.0) for parts in flat)
            return ours, expected

        packed = two_levels(out_features, in_features, group)

        def unpacking(
            packed: tuple[Tensor, Tensor, Tensor] = packed, count: int = out_features
        ) -> tuple[Tensor, Tensor]:
            args = (*packed[:2], count, torch.float32, packed[2])
            return kernels.unpack_weight(*args), reference.unpack_weight(*args)

        yield packing
        yield unpacking


def float_pairs(kernels: HostKernels) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """Calls whose sums are floats, and their float64 values."""
    for tokens, out_features, in_features in SHAPES[1:]:
        latent = torch.randn(out_features, in_features)
        granularity = "per_group_float32" if in_features % 64 == 0 else "per_channel"
        for kind in (granularity, "per_tensor"):
            packed, scale = reference.pack_weight(latent, kind, 64)[:2]
            weight = reference.unpack_weight(packed, scale, out_features, torch.float64)
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.randn(tokens, in_features).to(dtype)
                dy = torch.randn(tokens, out_features).to(dtype)
                yield lambda x=x, q=packed, s=scale, w=weight, n=out_features: (
                    kernels.linear(x, q, s, None, n, "float", torch.float32),
                    x.double() @ w.t(),
                )
                if dtype != torch.bfloat16:
                    yield lambda dy=dy, q=packed, s=scale, w=weight, n=out_features: (
                        kernels.input_gradient(dy, q, s, n, torch.float32),
                        dy.double() @ w,
                    )


def multiplied_float_pairs(kernels: HostKernels) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """The same with multipliers."""
    for tokens, out_features, in_features, group in (
        (5, 21, 384, 64),
        (11, 70, 384, 128),
        (20, 70, 320, 64),
    ):
        qweight, scale, multiplier = two_levels(out_features, in_features, group)
        weight = reference.unpack_weight(qweight, scale, out_features, torch.float64, multiplier)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            x = torch.randn(tokens, in_features).to(dtype)
            args = (qweight, scale, None, out_features, "float", torch.float32, multiplier)
            yield lambda x=x, a=args, w=weight: (kernels.linear(x, *a), x.double() @ w.t())
        dy = torch.randn(tokens, out_features)
        args = (qweight, scale, out_features, torch.float32, multiplier)
        yield lambda dy=dy, a=args, w=weight: (kernels.input_gradient(dy, *a), dy.double() @ w)


def experts_pairs(kernels: HostKernels) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """All experts of a layer: tiles of few and of many tokens, every kind of scale, several rounds
    of rows and of experts, tokens without an expert.
    """
    for tokens, choices, experts, out_features, in_features, granularity, activation, *wgmma in (
        (2, 3, 5, 70, 192, "per_channel", "int8_per_token"),
        (5, 9, 5, 70, 64, "per_tensor", "int8_per_token"),
        (9, 12, 3, 300, 320, "per_channel", "int8_per_token"),
        (3, 70, 2, 9, 128, "per_channel", "int8_per_token"),
        (6, 3, 5, 70, 128, "per_channel", "int8_per_tensor"),
        (2, 3, 3, 70, 384, "per_group", "int8_per_token"),
        (2, 6, 2, 600, 640, "per_group 128", "int8_per_token"),
        (5, 8, 3, 9, 128, "per_group", "int8_per_token"),
        (3, 9, 3, 9, 192, "per_group_float32", "int8_per_token"),
        (2, 280, 2, 5, 64, "per_channel", "int8_per_token"),
        (2, 33, 1030, 5, 64, "per_channel", "int8_per_token"),
        (7, 20, 2, 300, 192, "per_channel", "int8_per_token", True),
        (9, 14, 2, 70, 384, "per_group 128", "int8_per_token", True),
        (9, 14, 2, 9, 72, "per_channel", "int8_per_tensor", True),
    ):
        kind, *group = granularity.split()
        width = int(group[0]) if group else 64
        latent = torch.randn(experts, out_features, in_features) * torch.rand(experts, 1, 1)
        each = [reference.pack_weight(one, kind, width) for one in latent]
        qweight, scale, *multiplier = (
            torch.stack([one for one in parts if one is not None])
            for parts in zip(*each, strict=True)
            if parts[0] is not None
        )
        bias = torch.randn(experts, out_features).bfloat16()
        index = torch.randint(-1, experts + 1, (tokens, choices))
        # Numbers of 33 bits that name an expert by their low ones, and an expert with many tokens.
        index[-1, :2], index[0, : choices // 2] = torch.tensor([2**32, -(2**32)]), experts - 1
        x = torch.randn(tokens, in_features)
        args = (x, index, qweight, scale, bias, out_features, activation, torch.float32)

        def layer(args: tuple[Any, ...] = (*args, *multiplier), wgmma: bool = bool(wgmma)) -> Any:
            kernels.set_hopper(wgmma)
            ours = kernels.experts_linear(*args)
            kernels.set_hopper(False)
            return ours, reference.experts_linear(*args)

        yield layer


def learned_pairs(kernels: HostKernels) -> Iterator[Callable[[], tuple[Tensor, Tensor]]]:
    """Gradients of learned scales: every kind of step, parts that end within a lane's loads, more
    rows than a block has threads, sums that come out in one order only, and NaN.
    """
    given = [
        make_learned(shape, granularity, dw_dtype, dtype)
        for shape, granularity, dw_dtype, dtype in (
            ((9, 128, 2), "per_group", torch.float32, torch.float32),
            ((35, 576, 9), "per_group", torch.bfloat16, torch.float16),
            ((5, 1031, 1), "per_channel", torch.float16, torch.bfloat16),
            ((300, 37, 1), "per_tensor", torch.float32, torch.float32),
        )
    ]
    # Beyond the bound a term is its dw.
    uneven = uneven_weight()
    given += [(one, torch.full_like(one, 2.0), torch.ones(1)) for one in (uneven, uneven.t())]
    given[0][1][3, 70], given[0][1][4, 70] = float("nan"), float("inf")
    for call in given:

        def gradients(call: tuple[Tensor, Tensor, Tensor] = call) -> tuple[Tensor, Tensor]:
            ours = kernels.learned_gradients(*call)
            copies = [one.contiguous() for one in call]
            expected = reference.learned_gradients(*copies)[0], step_gradient_in_lanes(*copies)
            flat = [torch.cat([one.flatten().float() for one in both]) for both in (ours, expected)]
            return flat[0].nan_to_num(-7.0), flat[1].nan_to_num(-7.0)

        yield gradients


# The calls, whether their results must be exact, and how the sources begin whose faults they notice
# soonest; `pairs`, of all sources, behind those.
CALLS = (
    (wgmma_pairs, True, ("ternary_wgmma",)),
    (multiplied_pairs, True, ("activations", "multiplied_int8", "ternary_wgmma")),
    (fused_pairs, True, ("fused",)),
    (experts_pairs, True, ("experts",)),
    (learned_pairs, True, ("learned",)),
    (multiplied_float_pairs, False, ("gradient", "multiplied_float")),
    (float_pairs, False, ("gradient", "ternary_16", "ternary_f32")),
    (pairs, True, ("",)),
)


def first_failure(library: ctypes.CDLL, unit: str = "") -> str | None:
    """Returns the first wrong result or what the emulator reports first; None if all is right.

    ``unit``: the source that what is looked for is in; the calls that notice it soonest come first.
    """
    torch.manual_seed(0)
    for k in (32, 16):
        operands = [(0, 16 if k == 32 else 8), (1, 8 if k == 32 else 4), (2, 4), (3, 16), (4, 32)]
        for operand, elements in operands[: 5 if k == 32 else 3]:
            for lane in range(32 if operand < 3 else 128):
                for i in range(elements):
                    if library.bk_emulator_place(k, operand, lane, i) != documented(
                        k, operand, lane, i
                    ):
                        return f"element {i} of lane {lane} is not where the PTX ISA says"
    kernels = HostKernels(library)
    library.bk_emulator_order(1)
    try:
        for calls, exact, _ in sorted(CALLS, key=lambda one: not unit.startswith(one[2])):
            for call in calls(kernels):
                ours, expected = call()
                if kernels.count(CONFLICTS):
                    return "bank conflicts"
                if exact and not torch.equal(ours, expected):
                    return f"{ours.flatten()[:2]} is not {expected.flatten()[:2]}"
                if not torch.allclose(ours.double(), expected.double(), rtol=2e-5, atol=2e-5):
                    return f"floats differ by {(ours - expected).abs().max():.3g}"
    except BitLabError as error:
        return str(error)
    return None
