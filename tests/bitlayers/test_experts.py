"""The life of ternary experts, on a class of experts that no library knows."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore import BitQuantConfig, use_backend
from bitcore.errors import LifecycleError, NonFiniteError
from bitcore.kernels.cpu_experts import CpuExperts
from bitlayers import estimate_memory_usage
from bitlayers.bitlinear import BitLinear
from bitlayers.experts import BitExperts, convert_experts
from bitlayers.stack import Stack
from bitlayers.training import set_quant_strength

E, H, WIDE = 5, 64, 68
SCHEMES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"weight_granularity": "per_channel"},
    "group": {"weight_granularity": "per_group", "group_size": 64},
    "float32 groups": {
        "weight_granularity": "per_group", "group_size": 64, "group_scale_dtype": "float32",
    },
    "float activations": {"activation_dtype": "float32"},
}  # fmt: skip
KINDS = ("plain", "transposed", "no gate")


class Experts(nn.Module):
    """As transformers' classes are, with a gate of its own."""

    def __init__(self, kind: str = "plain", wide: int = WIDE) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.num_experts, self.has_gate, self.has_post_expert_norm = E, kind != "no gate", False
        self.transposed, self.wide = kind == "transposed", wide
        first, rows = ("gate_up_proj", 2 * wide) if self.has_gate else ("up_proj", wide)
        for name, sizes in ((first, (rows, H)), ("down_proj", (H, wide))):
            sizes = sizes[::-1] if self.transposed else sizes
            setattr(self, name, nn.Parameter(0.1 * torch.randn(E, *sizes)))
            if self.transposed:
                bias = torch.randn(E, sizes[1])
                setattr(self, f"{name}_bias", nn.Parameter(bias))
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        if self.transposed:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
            return (up + 1) * torch.sigmoid(1.7 * gate) * gate
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def stacks(self, config: BitQuantConfig) -> list[Stack]:
        turned = self.transposed
        first = Stack("up_proj", E, self.wide, H, config)
        if self.has_gate:
            first = Stack("gate_up_proj", E, 2 * self.wide, H, config, 2, turned, turned)
        return [first, Stack("down_proj", E, H, self.wide, config, transposed=turned)]


def ternary(kind: str = "plain", **fields: Any) -> BitExperts:
    module = Experts(kind, 64 if "group_size" in fields else WIDE)
    return convert_experts(module, module.stacks(BitQuantConfig(**fields)))


def inputs(tokens: int = 23) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(tokens, H, generator=generator)
    # Expert 3 gets none.
    index = torch.stack([torch.randperm(4, generator=generator)[:2] for _ in range(tokens)])
    return x, torch.where(index == 3, 4, index), torch.rand(tokens, 2, generator=generator)


def run(module: nn.Module, tokens: int = 23) -> Tensor:
    with torch.no_grad():
        return module(*inputs(tokens))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_train_eval_and_deployed_compute_the_same(scheme: str, kind: str) -> None:
    module = ternary(kind, **SCHEMES[scheme])
    assert isinstance(module, Experts)
    assert not module.is_deployed
    trained = run(module.train())
    evaluated = run(module.eval())
    again = run(module)
    deployed = run(module.deploy())
    assert module.is_deployed
    assert trained.abs().sum() > 0
    exact = scheme != "float activations"
    for one, other in ((trained, evaluated), (evaluated, again), (evaluated, deployed)):
        assert torch.equal(one, other) if exact else torch.allclose(one, other, atol=1e-5)
    with use_backend("reference"):
        reference = run(module)
    if exact:
        assert torch.equal(reference, deployed)
    torch.testing.assert_close(reference, deployed, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scheme", ["tensor", "channel", "group"])
def test_every_expert_is_what_linear_layers_of_its_matrices_are(scheme: str) -> None:
    fields = SCHEMES[scheme]
    module = ternary(**fields)
    wide = module.stacks["down_proj"].in_features

    def layer(weight: Tensor) -> BitLinear:
        linear = nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight = nn.Parameter(weight.detach().clone())
        return BitLinear.from_linear(linear, BitQuantConfig(**fields)).deploy()

    x, index, weights = inputs()
    wanted = torch.zeros(len(x), 2, H)
    with torch.no_grad():
        for expert in range(E):
            gate_up = module._parameters["gate_up_proj"][expert]  # type: ignore[index]
            gate, up = layer(gate_up[:wide]), layer(gate_up[wide:])
            down = layer(module._parameters["down_proj"][expert])  # type: ignore[index]
            tokens, place = (index == expert).nonzero(as_tuple=True)
            if len(tokens):
                wanted[tokens, place] = down(F.silu(gate(x[tokens])) * up(x[tokens]))
    assert torch.equal(run(module.eval()), (wanted * weights[..., None]).sum(1))


def test_gradients() -> None:
    module = ternary("transposed").train()
    x, index, weights = inputs()
    x.requires_grad_()
    weights.requires_grad_()
    module(x, index, weights).square().sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    assert weights.grad is not None
    assert bool((weights.grad != 0).all())
    for name in ("gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"):
        gradient = module._parameters[name].grad  # type: ignore[union-attr]
        assert gradient is not None
        reached = gradient.flatten(1).abs().sum(1) > 0
        assert reached.tolist() == [True, True, True, False, True], name
    # Nothing reached any expert: no gradient is made.
    module.zero_grad()
    (x + module(x, torch.full_like(index, E), weights)).sum().backward()
    assert all(parameter.grad is None for parameter in module.parameters())


def test_a_gradient_is_the_straight_through_one_of_a_linear_layer() -> None:
    module = ternary("no gate").train()
    module.act_fn = nn.Identity()
    x = torch.randn(9, H)
    index, weights = torch.full((9, 1), 2), torch.ones(9, 1)
    module(x, index, weights).square().sum().backward()
    layers = []
    for name in ("up_proj", "down_proj"):
        weight = module._parameters[name][2].detach().clone()  # type: ignore[index]
        linear = nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight = nn.Parameter(weight)
        layers.append(BitLinear.from_linear(linear).train())
    layers[1](layers[0](x)).square().sum().backward()
    for name, layer in zip(("up_proj", "down_proj"), layers, strict=True):
        gradient = module._parameters[name].grad  # type: ignore[union-attr]
        assert gradient is not None
        assert torch.equal(gradient[2], layer.weight.grad)


@pytest.mark.parametrize("tokens", [3, 40])
def test_a_write_is_seen(tokens: int) -> None:
    module = ternary().eval()
    before = run(module, tokens)
    weight = module._parameters["down_proj"]
    assert weight is not None
    with torch.no_grad():
        weight.mul_(-1)
    assert torch.equal(run(module, tokens), -before)
    weight.data.mul_(-1)
    assert torch.equal(run(module, tokens), before)


def test_a_decoding_step_packs_an_expert_once(monkeypatch: pytest.MonkeyPatch) -> None:
    module, packed = ternary().eval(), []
    made = Stack.pack
    monkeypatch.setattr(Stack, "pack", lambda *given: packed.append(0) or made(*given))
    first = run(module, 3)
    count = len(packed)
    assert count > 0
    assert torch.equal(run(module, 3), first)
    assert len(packed) == count
    run(module.train().eval(), 3)
    assert len(packed) == 2 * count


def test_strength() -> None:
    module = ternary("transposed").train()
    full = run(module)
    set_quant_strength(module, 0.0)
    x, index, weights = inputs()
    wanted = torch.zeros(len(x), 2, H)
    for token, place in ((t, p) for t in range(len(x)) for p in range(2)):
        e, held = int(index[token, place]), module._parameters
        inner = x[token] @ held["gate_up_proj"][e] + held["gate_up_proj_bias"][e]  # type: ignore[index]
        outer = module._apply_gate(inner) @ held["down_proj"][e] + held["down_proj_bias"][e]  # type: ignore[index]
        wanted[token, place] = outer
    wanted = (wanted * weights[..., None]).sum(1).detach()
    torch.testing.assert_close(run(module), wanted)
    set_quant_strength(module, 0.999)
    torch.testing.assert_close(run(module), full, atol=0.1, rtol=0.1)
    assert not torch.equal(run(module), full)
    # Evaluation always quantizes fully.
    assert torch.equal(run(module.eval()), full)


def test_state_dicts() -> None:
    module, other = ternary("transposed"), ternary("transposed")
    assert set(module.state_dict()) == set(Experts("transposed").state_dict())
    latent = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    deployed = module.deploy().state_dict()
    assert sorted(deployed) == [
        "down_proj_bias", "down_proj_qweight", "down_proj_qweight_scale",
        "gate_up_proj_bias", "gate_up_proj_qweight", "gate_up_proj_qweight_scale",
    ]  # fmt: skip
    for target, state, message in (
        (other, deployed, "gate_up_proj_qweight is packed, but the experts are latent"),
        (module, latent, "gate_up_proj is latent, but the experts are deployed"),
        (module, {**deployed, "down_proj_qweight": torch.full((E, 16, WIDE), 255).byte()},
         "down_proj_qweight must hold the codes 0, 1 and 2"),
        (module, {**deployed, "down_proj_qweight_scale": torch.ones(E, H).double()},
         "down_proj_qweight_scale must be torch.float32, got torch.float64"),
    ):  # fmt: skip
        with pytest.raises(RuntimeError) as error:
            target.load_state_dict(state)
        assert message in str(error.value)
    scale = deployed["down_proj_qweight_scale"].clone()
    scale[2, 5] = -1
    with pytest.raises(RuntimeError, match=r"down_proj_qweight_scale must be finite .*expert 2"):
        module.load_state_dict({**deployed, "down_proj_qweight_scale": scale})
    again = ternary("transposed")
    again.make_skeleton()
    again.load_state_dict(deployed)
    assert torch.equal(run(again), run(module))


def test_multipliers_are_checked() -> None:
    module = ternary(**SCHEMES["group"]).deploy()
    state = dict(module.state_dict())
    state["down_proj_qweight_multiplier"] = state["down_proj_qweight_multiplier"].clone()
    state["down_proj_qweight_multiplier"][1, 4, 0] = 200
    with pytest.raises(RuntimeError, match=r"multipliers of 0 to 127, got 200.*in expert 1"):
        module.load_state_dict(state)


def test_what_cannot_be_deployed() -> None:
    module = ternary()
    before = run(module.eval())
    weight = module._parameters["down_proj"]
    assert weight is not None
    kept = weight.detach()[3, 7, 1].item()
    weight.data[3, 7, 1] = float("nan")
    with pytest.raises(NonFiniteError, match="experts.down_proj must be finite.*in expert 3"):
        module.deploy()
    assert not module.is_packed("gate_up_proj")
    weight.data[3, 7, 1] = kept
    assert torch.equal(run(module), before)
    module.deploy()
    with pytest.raises(LifecycleError, match="deployed already"):
        module.deploy()
    with pytest.raises(LifecycleError, match="must hold data"):
        ternary().to("meta").deploy()
    with pytest.raises(LifecycleError, match="must be float"):
        convert_experts(module, [])


def test_deployed_stays_in_eval_mode_and_passes_gradients_on() -> None:
    module = ternary("transposed").deploy().train()
    assert not module.training
    x, index, weights = inputs()
    x.requires_grad_()
    module(x, index, weights).sum().backward()
    assert x.grad is not None
    assert bool((x.grad != 0).any())
    assert all(parameter.grad is None for parameter in module.parameters())


def test_copies_pickles_and_casts() -> None:
    for deploys in (False, True):
        module = ternary("transposed").eval()
        if deploys:
            module.deploy()
        wanted = run(module)
        for one in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
            assert type(one) is type(module)
            assert torch.equal(run(one), wanted)
    scale = module._buffers["down_proj_qweight_scale"]
    assert scale is not None
    module.to(torch.bfloat16)
    assert module._buffers["down_proj_qweight_scale"] is not None
    assert torch.equal(module._buffers["down_proj_qweight_scale"], scale)
    assert module.float_dtype == torch.bfloat16
    assert module(*(one.bfloat16() if one.is_floating_point() else one for one in inputs())).dtype


def test_what_stands_for_the_float_tensor() -> None:
    module = ternary("transposed").deploy()
    stands = module.down_proj
    assert (tuple(stands.shape), stands.dtype) == ((E, WIDE, H), torch.float32)
    assert stands.is_meta
    assert "down_proj" not in module.state_dict()


@pytest.mark.parametrize("kind", KINDS)
def test_back_to_float(kind: str) -> None:
    module = ternary(kind).deploy()
    wanted = run(module)
    held = {name: module.dequantized(name) for name in list(module.stacks)}
    floats = module.to_float()
    assert type(floats) is Experts
    assert set(floats.state_dict()) == set(Experts(kind).state_dict())
    for name, weight in held.items():
        assert torch.equal(getattr(floats, name), weight)
        # A scale for each logical matrix, its negative and zero.
        assert len(weight[0].unique()) == (5 if name == "gate_up_proj" else 3)
    # Weights that are ternary are read back by their largest.
    config = BitQuantConfig(weight_quantizer="absmax")
    again = convert_experts(floats, floats.stacks(config)).deploy()
    assert torch.equal(run(again), wanted)


def test_memory() -> None:
    module = ternary("transposed")
    latent = estimate_memory_usage(module)
    weights, biases = E * 3 * WIDE * H, E * (2 * WIDE + H)
    assert latent["original"] == 4 * (weights + biases)
    packed = E * (WIDE // 2 * H + 16 * WIDE) + 4 * E * (2 * WIDE + H) + 4 * biases
    assert latent["quantized"] == packed
    assert estimate_memory_usage(module.deploy()) == latent
    held = [*module.parameters(), *module.buffers()]
    assert sum(one.nbytes for one in held) == packed


@pytest.mark.parametrize("kind", KINDS)
def test_deployed_experts_are_one_call_a_projection(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    native = CpuExperts._run_experts

    def counted(self: CpuExperts, constants: Any, experts: int, *rest: Any) -> Tensor:
        calls.append(constants.out_features)
        return native(self, constants, experts, *rest)

    module = ternary(kind)
    expected = run(module)
    monkeypatch.setattr(CpuExperts, "_run_experts", counted)
    module.deploy()
    with use_backend("cpu"):
        for _ in range(2):
            with torch.no_grad():
                assert torch.equal(run(module), expected)
    rows = [stack.out_features for stack in module.stacks.values()]
    assert calls == rows * 2


def test_deployed_experts_compile_without_a_graph_break() -> None:
    module = ternary().eval().deploy()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for tokens in (23, 5):
        with torch.no_grad():
            assert torch.equal(compiled(*inputs(tokens)), module(*inputs(tokens)))


def test_a_copied_parameter_is_seen_by_the_next_forward_pass() -> None:
    """What was prepared holds the addresses of the tensors that it was made of."""
    module, other = ternary().eval().deploy(), ternary().eval()
    for parameter in other.parameters():
        parameter.data.neg_()
    other.deploy()
    with torch.no_grad():
        before = run(module)
        module.load_state_dict(other.state_dict(), assign=True)
        assert torch.equal(run(module), run(other))
        assert not torch.equal(run(module), before)
