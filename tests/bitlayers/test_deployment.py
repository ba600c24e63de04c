"""meta_twin: a layer like another, with nothing in common but its configuration."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bitcore.config import BitQuantConfig
from bitlayers import BitLinear
from bitlayers.deployment import meta_twin

SCHEMES = {
    "tensor": BitQuantConfig(),
    "groups": BitQuantConfig(weight_granularity="per_group", group_size=64),
}


@pytest.mark.parametrize("scheme", sorted(SCHEMES))
@pytest.mark.parametrize("bias", [False, True])
def test_a_twin_is_as_its_skeleton(scheme: str, bias: bool) -> None:
    first = BitLinear.packed_skeleton(128, 9, bias, SCHEMES[scheme], dtype=torch.bfloat16)
    twin, made = meta_twin(first), BitLinear.packed_skeleton(
        128, 9, bias, SCHEMES[scheme], dtype=torch.bfloat16
    )  # fmt: skip
    assert repr(twin) == repr(made)
    assert vars(twin).keys() == vars(made).keys()
    for name in ("latent_dtype", "float_dtype", "quant_config", "training", "_is_deployed"):
        assert getattr(twin, name) == getattr(made, name)
    ours, theirs = ({**dict(o.named_parameters()), **dict(o.named_buffers())} for o in (twin, made))
    assert ours.keys() == theirs.keys()
    for name, one in ours.items():
        other = theirs[name]
        assert (type(one), one.shape, one.dtype, one.device, one.requires_grad) == (
            type(other), other.shape, other.dtype, other.device, other.requires_grad,
        )  # fmt: skip
    held = {id(one) for one in (*first.parameters(), *first.buffers())}
    assert held.isdisjoint(map(id, ours.values()))


def test_filling_hooking_and_deploying_one_leaves_the_other() -> None:
    first = BitLinear.packed_skeleton(128, 8, False)
    twin = meta_twin(first)
    filled = BitLinear(128, 8, bias=False).deploy()
    twin.qweight = nn.Parameter(filled.qweight, requires_grad=False)
    twin.qweight_scale = filled.qweight_scale
    twin.register_forward_hook(lambda *_: None)
    twin.register_buffer("more", torch.zeros(1))
    assert first.qweight.is_meta
    assert first.qweight_scale.is_meta
    assert not first._forward_hooks
    assert "more" not in first._buffers
    x = torch.randn(3, 128)
    assert torch.equal(twin(x), filled(x))
