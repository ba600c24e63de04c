"""Calls of the kernels that only a Hopper runs, at the shapes where they can go wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from bitcore import reference
from tests.native.cuda.host import HostKernels

Pairs = Iterator[Callable[[], tuple[Tensor, Tensor]]]


def kept(
    kernels: HostKernels, x: Tensor, packed: Tensor, scale: Tensor, out_features: int
) -> tuple[Tensor, Tensor]:
    """A layer's outputs with the codes and scales of its input, in one tensor."""
    args = (x, packed, scale, None, out_features, "int8_per_token", torch.float32)
    found = (kernels.linear_with_codes(*args), reference.linear_with_codes(*args))
    ours, expected = (torch.cat([part.float() for part in parts], dim=1) for parts in found)
    return ours, expected


def on_hopper(
    kernels: HostKernels, multiprocessors: int, call: Callable[[HostKernels], Tensor]
) -> Tensor:
    """What a call gives on a device that has wgmma."""
    kernels.multiprocessors = multiprocessors
    kernels._library.bk_emulator_hopper(1)
    try:
        return call(kernels)
    finally:
        kernels._library.bk_emulator_hopper(0)
        kernels.multiprocessors = 4


def wgmma_pairs(kernels: HostKernels) -> Pairs:
    """Many tokens with wgmma: by columns, by rows, and shares of K; codes that are kept."""
    for tokens, out_features, in_features, multiprocessors in (
        (40, 70, 1168, 4),
        (66, 314, 1168, 1),
        (40, 70, 2128, 132),
    ):
        x, bias = torch.randn(tokens, in_features), torch.randn(out_features)
        latent = torch.randn(out_features, in_features)
        packed, scale = reference.pack_weight(latent, "per_channel", 0)[:2]
        codes = torch.randint(-128, 128, (tokens, in_features), dtype=torch.int8)
        yield lambda c=codes, q=packed, n=out_features, m=multiprocessors: (
            on_hopper(kernels, m, lambda k: k.matmul(c, q, n)),
            reference.matmul(c, q, n),
        )
        for dtype in (torch.float32, torch.bfloat16):
            args = (x, packed, scale, bias, out_features, "int8_per_token", dtype)
            yield lambda a=args, m=multiprocessors: (
                on_hopper(kernels, m, lambda k: k.linear(*a)),
                reference.linear(*a),
            )
    some = torch.randn(40, 192)
    few, few_scale = reference.pack_weight(torch.randn(9, 192), "per_channel", 0)[:2]
    yield lambda: (
        on_hopper(kernels, 4, lambda k: kept(k, some, few, few_scale, 9)[0]),
        kept(kernels, some, few, few_scale, 9)[1],
    )


def misaligned(x: Tensor) -> Tensor:
    """The same rows, none of them aligned to 16 bytes."""
    wide = torch.zeros(x.shape[0], x.shape[1] + 8, dtype=x.dtype)
    wide[:, 1:-7] = x
    return wide[:, 1:-7]


def fused_pairs(kernels: HostKernels) -> Pairs:
    """Few tokens in one launch: every team, several steps, two tiles and more; and what cannot."""
    for tokens, out_features, in_features, multiprocessors, activation in (
        (2, 9, 80, 4, "int8_per_token"),
        (3, 700, 592, 4, "int8_per_tensor"),
        (5, 70, 2064, 132, "int8_per_token"),
        (16, 315, 1104, 16, "int8_per_token"),
        (18, 70, 272, 132, "int8_per_token"),
    ):
        x = (torch.randn(tokens, in_features) * torch.rand(tokens, 1)).bfloat16()
        latent, bias = torch.randn(out_features, in_features), torch.randn(out_features)
        packed, scale = reference.pack_weight(latent, "per_channel", 0)[:2]
        args = (x, packed, scale, bias, out_features, activation, torch.float32)
        yield lambda a=args, m=multiprocessors: (
            on_hopper(kernels, m, lambda k: k.linear(*a)),
            reference.linear(*a),
        )
    for tokens, out_features, in_features, group, multiprocessors in (
        (3, 101, 2304, 64, 4),
        (12, 300, 1024, 128, 4),
        (4, 9, 4096, 128, 132),
        (5, 70, 640, 64, 4),
    ):
        x = torch.randn(tokens, in_features).half()
        sizes = 10 ** (-2.5 * torch.rand(out_features, in_features // group))
        latent = torch.randn(out_features, in_features) * sizes.repeat_interleave(group, 1)
        packed, scale, multiplier = reference.pack_weight(latent, "per_group", group)
        args = (x, packed, scale, None, out_features, "int8_per_token", torch.float32, multiplier)
        yield lambda a=args, m=multiprocessors: (
            on_hopper(kernels, m, lambda k: k.linear(*a)),
            reference.linear(*a),
        )
    x, latent = torch.randn(3, 256), torch.randn(70, 256)
    packed, scale = reference.pack_weight(latent, "per_channel", 0)[:2]
    groups, group_scale = reference.pack_weight(latent, "per_group_float32", 64)[:2]
    half, room = x.bfloat16(), torch.zeros(packed.numel() + 16, dtype=torch.uint8)
    start = -room.data_ptr() % 16 + 8
    moved = room[start : start + packed.numel()].view(packed.shape).copy_(packed)
    for args in (
        (x, packed, scale),
        (misaligned(half), packed, scale),
        (half, moved, scale),
        (half, groups, group_scale),
    ):
        rest = (*args, None, 70, "int8_per_token", torch.float32)
        yield lambda a=rest: (on_hopper(kernels, 4, lambda k: k.linear(*a)), reference.linear(*a))
    yield lambda: (
        on_hopper(kernels, 4, lambda k: kept(k, half, packed, scale, 70)[0]),
        kept(kernels, half, packed, scale, 70)[1],
    )
    many = torch.randn(18, 256).bfloat16()
    rest = (many, packed, scale, None, 70, "int8_per_tensor", torch.float32)
    yield lambda a=rest: (on_hopper(kernels, 132, lambda k: k.linear(*a)), reference.linear(*a))
