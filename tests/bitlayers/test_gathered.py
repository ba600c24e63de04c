"""What FSDP2 makes of a weight's packed rows; with FSDP2 itself: tests/bitlab_hf/train/test_gather.

Here one process plays both.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from bitcore.config import BitQuantConfig
from bitcore.errors import LifecycleError
from bitlayers import BitLinear
from bitlayers.gathered import GatheredWeight, PackedShard

SHAPE = torch.Size((12, 64))


def gathered(layer: BitLinear, dtype: torch.dtype = torch.float32) -> GatheredWeight:
    """The weight of a layer that two processes have six rows each of."""
    shards = [part.as_subclass(PackedShard) for part in layer.weight.detach().chunk(2)]
    policy = MixedPrecisionPolicy(param_dtype=dtype)
    sent, facts = [], None
    for shard in shards:
        tensors, facts = shard.fsdp_pre_all_gather(None, SHAPE, (64, 1), layer, policy)
        sent.append(tensors)
    arrived = tuple(torch.cat(parts) for parts in zip(*sent, strict=True))
    made = shards[0].fsdp_post_all_gather(arrived, facts, dtype)
    assert made is not None
    weight, inner = made
    assert isinstance(weight, GatheredWeight)
    assert [one.data_ptr() for one in inner] == [weight.packed[0].data_ptr()]
    return weight


def make(**config: object) -> BitLinear:
    fields = {"weight_granularity": "per_channel", **config}
    return BitLinear(64, 12, quant_config=BitQuantConfig(**fields))  # type: ignore[arg-type]


def step(layer: BitLinear, x: Tensor) -> tuple[Tensor, Tensor | None]:
    y = layer(x)
    y.square().sum().backward()
    return y.detach(), layer.weight.grad


@pytest.mark.parametrize("granularity", ["per_channel", "per_group"])
def test_a_layer_trains_and_runs_on_it(granularity: str) -> None:
    group = 64 if granularity == "per_group" else None
    layer = make(weight_granularity=granularity, group_size=group)
    x = torch.randn(2, 5, 64)
    expected, gradient = step(layer, x)
    evaluated = layer.eval()(x)
    weight = nn.Parameter(gathered(layer.train()))
    assert weight.requires_grad
    assert isinstance(weight, GatheredWeight)
    layer.weight = weight
    found, again = step(layer, x)
    assert torch.equal(found, expected)
    assert again is not None
    assert gradient is not None
    assert type(again) is Tensor
    assert torch.equal(again, gradient)
    assert torch.equal(layer.eval()(x), evaluated)
    # A step of decoding, which keeps what is packed.
    assert torch.equal(layer(x[:, :1]), evaluated[:, :1])


def test_a_later_gather_fills_the_same_memory() -> None:
    layer = make()
    weight = gathered(layer)
    version, before = weight.packed[0]._version, weight.packed[0].clone()
    with torch.no_grad():
        layer.weight.neg_()
    changed = gathered(layer)
    pieces = torch.cat(
        [
            part.as_subclass(PackedShard).fsdp_pre_all_gather(
                None, SHAPE, (64, 1), layer, MixedPrecisionPolicy()
            )[0][0]
            for part in layer.weight.detach().chunk(2)
        ]
    )
    facts = 12, 64, 2, False
    shard = layer.weight.detach()[:6].as_subclass(PackedShard)
    arrived = pieces, weight.packed[1]
    assert shard.fsdp_post_all_gather(arrived, facts, torch.float32, out=weight) is None
    assert torch.equal(weight.packed[0], changed.packed[0])
    assert not torch.equal(weight.packed[0], before)
    # Autograd finds what it kept unchanged.
    assert weight.packed[0]._version == version


def test_codes_are_of_float32_weights() -> None:
    layer = make()
    rounded, exact = gathered(layer, torch.bfloat16), gathered(layer)
    assert rounded.dtype == torch.bfloat16
    for one, other in zip(rounded.packed, exact.packed, strict=True):
        assert torch.equal(one, other)


def test_a_layer_quantized_in_part_sends_floats() -> None:
    layer = make()
    layer.quant_strength = 0.5
    shard = layer.weight.detach()[:6].as_subclass(PackedShard)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    for _ in range(2):
        (rows,), facts = shard.fsdp_pre_all_gather(None, SHAPE, (64, 1), layer, policy)
        assert type(rows) is Tensor
        assert torch.equal(rows, layer.weight[:6].bfloat16())
        # It stays so: torch has made the memory.
        layer.quant_strength = 1.0
    assert facts is None
    assert shard.fsdp_post_all_gather((rows,), facts, torch.bfloat16) == (rows, ())
    assert shard.fsdp_post_all_gather((rows,), facts, torch.bfloat16, out=rows) is None


def test_its_values_are_not_to_be_read() -> None:
    weight = gathered(make())
    assert "GatheredWeight([12, 64], dtype=torch.float32" in repr(weight)
    assert torch.equal(torch.zeros_like(weight), torch.zeros(12, 64))
    assert weight.is_finite
    reads = [
        lambda: weight * 2, lambda: torch.ones(64) + weight, lambda: torch.stack([weight]),
        lambda: weight[0], lambda: weight.t(), weight.clone,
    ]  # fmt: skip
    for read in reads:
        with pytest.raises(LifecycleError, match="must be whole to be read by aten"):
            read()


def test_a_shard_is_an_ordinary_tensor() -> None:
    shard = torch.randn(6, 64).as_subclass(PackedShard)
    assert type(shard + 1) is Tensor
    assert type(shard.detach()) is Tensor
    moved = shard.to(torch.float64)
    assert type(moved) is PackedShard
    assert moved.dtype == torch.float64
