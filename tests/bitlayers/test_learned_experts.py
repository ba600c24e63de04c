"""Learned scales of experts: each expert as linear layers with these scales are."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore import BitQuantConfig
from bitcore.errors import NonFiniteError
from bitlayers import learned_experts
from bitlayers.bitlinear import BitLinear
from bitlayers.experts import BitExperts
from bitlayers.training import set_quant_strength
from tests.bitlayers.test_experts import KINDS, SCHEMES, H, inputs, run, ternary

LEARNED = {name: {**fields, "weight_quantizer": "lsq"} for name, fields in SCHEMES.items()}


def moved(module: BitExperts) -> BitExperts:
    """Gives learned scales values of their own, so that those of the start show."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name in learned_experts.names(module):
            scale = module.get_parameter(name)
            scale.mul_(0.5 + torch.rand(scale.shape, generator=generator))
    return module


def layer(weight: Tensor, scale: Tensor | None, fields: dict[str, Any]) -> BitLinear:
    """Returns a linear layer of a matrix [N, K], with this learned scale or that of its start."""
    linear = nn.Linear(*weight.shape[::-1], bias=False)
    linear.weight = nn.Parameter(weight.detach().clone())
    made = BitLinear.from_linear(linear, BitQuantConfig(**fields))
    if scale is not None:
        with torch.no_grad():
            made.learned_scale.copy_(scale.reshape(made.learned_scale.shape))  # type: ignore[union-attr]
    return made


def halves(scale: Tensor, scheme: str) -> list[Tensor]:
    """Returns the scales of gate and up of an expert's."""
    return list(scale.chunk(2)) if scheme != "tensor" else [scale[:1], scale[1:]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", LEARNED)
def test_train_eval_and_deployed_compute_the_same(scheme: str, kind: str) -> None:
    module = moved(ternary(kind, **LEARNED[scheme]))
    assert len(learned_experts.names(module)) == 2
    trained, evaluated = run(module.train()), run(module.eval())
    deployed = run(copy.deepcopy(module).deploy())
    for one in (evaluated, deployed):
        exact = scheme != "float activations"
        assert torch.equal(one, trained) if exact else torch.allclose(one, trained, atol=1e-5)
    assert not learned_experts.names(module.deploy())


@pytest.mark.parametrize("strength", [1.0, 0.5])
@pytest.mark.parametrize("scheme", ["tensor", "channel", "group"])
def test_outputs_and_gradients_are_those_of_linear_layers(scheme: str, strength: float) -> None:
    fields = LEARNED[scheme]
    module = moved(ternary(**fields)).train()
    wide = module.stacks["down_proj"].in_features
    x, index, weights = inputs()
    set_quant_strength(module, strength)
    output = module(x, index, weights)
    output.square().sum().backward()

    wanted, layers = torch.zeros(len(x), 2, H), {}
    for expert in range(module.num_experts):
        tokens, place = (index == expert).nonzero(as_tuple=True)
        if not len(tokens):
            continue
        gate_up, first = (
            p[expert] for p in (module.gate_up_proj, module.gate_up_proj_learned_scale)
        )
        down, last = (p[expert] for p in (module.down_proj, module.down_proj_learned_scale))
        pairs = zip((gate_up[:wide], gate_up[wide:]), halves(first, scheme), strict=True)
        made = [*(layer(w, s, fields) for w, s in pairs), layer(down, last, fields)]
        for one in made:
            one.train().quant_strength = strength
        layers[expert] = made
        inner = F.silu(made[0](x[tokens])) * made[1](x[tokens])
        wanted = wanted.index_put((tokens, place), made[2](inner))
    reference = (wanted * weights[..., None]).sum(1)
    reference.square().sum().backward()

    if strength == 1.0:
        assert torch.equal(output, reference)
    torch.testing.assert_close(output, reference, rtol=1e-5, atol=1e-5)
    for expert in range(module.num_experts):
        for name, parts in (("gate_up_proj", (0, 1)), ("down_proj", (2,))):
            held = (
                module.get_parameter(name).grad,
                module.get_parameter(f"{name}_learned_scale").grad,
            )
            got = [gradient[expert] for gradient in held if gradient is not None]
            if expert not in layers:
                assert not any(one.any() for one in got)
                continue
            own = [layers[expert][part] for part in parts]
            weight = torch.cat([one.weight.grad for one in own])
            scale = torch.cat([one.learned_scale.grad for one in own])  # type: ignore[union-attr, misc]
            torch.testing.assert_close(got[0], weight, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(got[1], scale.view(got[1].shape), rtol=1e-4, atol=1e-5)
            assert got[1].abs().sum() > 0


@pytest.mark.parametrize("scheme", ["tensor", "channel", "group"])
def test_they_start_as_those_of_linear_layers(scheme: str) -> None:
    fields = LEARNED[scheme]
    module = ternary(**fields)
    wide = module.stacks["down_proj"].in_features
    gate_up, start = module.gate_up_proj[2], module.gate_up_proj_learned_scale[2]
    for rows, scale in zip(gate_up.split(wide), halves(start, scheme), strict=True):
        assert torch.equal(scale.flatten(), layer(rows, None, fields).learned_scale.flatten())  # type: ignore[union-attr]


def test_a_file_packed_as_it_comes_is_packed_as_training_starts() -> None:
    for fields in LEARNED.values():
        module = ternary(**fields)
        for name, stack in module.stacks.items():
            matrix = stack.apart(module.get_parameter(name))[1]
            with_start = module.packed(name, 1)
            for one, other in zip(stack.pack(matrix), with_start, strict=True):
                assert torch.equal(one, other)


def test_state_dicts_casts_and_float() -> None:
    module = moved(ternary(weight_quantizer="lsq"))
    held = {name: module.get_parameter(name).clone() for name in learned_experts.names(module)}
    other = ternary(weight_quantizer="lsq")
    other.load_state_dict(module.state_dict())
    assert torch.equal(run(other.eval()), run(module.eval()))
    floats = {key: one for key, one in module.state_dict().items() if key not in held}
    other.load_state_dict(floats)
    assert not torch.equal(other.down_proj_learned_scale, held["down_proj_learned_scale"])
    module.to(torch.bfloat16)
    for name, before in held.items():
        assert torch.equal(module.get_parameter(name), before)
    assert not learned_experts.names(module.to_float())


def test_a_write_to_a_scale_is_seen() -> None:
    module = ternary(weight_quantizer="lsq").eval()
    before = run(module, 3)
    with torch.no_grad():
        module.down_proj_learned_scale.mul_(2)
    assert torch.allclose(run(module, 3), run(copy.deepcopy(module), 3))
    assert not torch.allclose(run(module, 3), before)


def test_a_scale_that_is_not_finite_is_named() -> None:
    module = ternary(weight_quantizer="lsq")
    with torch.no_grad():
        module.down_proj_learned_scale[3] = float("nan")
    with pytest.raises(NonFiniteError, match="down_proj_learned_scale must be .* in expert 3"):
        module.deploy()
    assert not module.is_deployed
