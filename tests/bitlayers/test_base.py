"""The life of a layer: modes, cache, deployment, state dict, copies, moves."""

from __future__ import annotations

import copy
import io
import logging
import pickle
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import bitlayers.base
from bitcore import BitQuantConfig, ops
from bitcore.errors import ArgumentTypeError, LifecycleError, NonFiniteError
from bitlayers import BitLayerBase, BitLinear

CONFIGS = [
    BitQuantConfig(),
    BitQuantConfig(activation_granularity="per_tensor"),
    BitQuantConfig(weight_granularity="per_channel"),
    BitQuantConfig(weight_granularity="per_group", group_size=64),
    BitQuantConfig(weight_granularity="per_group", group_size=64, group_scale_dtype="float32"),
    BitQuantConfig(activation_dtype="float32"),
]


@pytest.fixture
def layer() -> BitLinear:
    return BitLinear(128, 30)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(5, 128)


@pytest.mark.parametrize("config", CONFIGS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_train_eval_and_deployed_outputs_are_equal(
    backend: str, num_threads: int, config: BitQuantConfig, dtype: torch.dtype
) -> None:
    layer = BitLinear(128, 30, quant_config=config, dtype=dtype)
    nn.init.normal_(layer.bias)
    x = torch.randn(5, 128, dtype=dtype)
    trained = layer.train()(x)
    evaluated = layer.eval()(x)
    deployed = layer.deploy()(x)
    assert torch.equal(trained, evaluated)
    assert torch.equal(evaluated, deployed)
    assert deployed.dtype == dtype


def test_states(layer: BitLinear) -> None:
    assert layer.training
    assert not layer.is_deployed
    assert not hasattr(layer, "qweight")
    assert not hasattr(layer, "qweight_scale")
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.eval()
    assert layer.qweight.dtype == torch.uint8
    assert layer.qweight_scale.dtype == torch.float32
    assert set(layer.state_dict()) == {"weight", "bias"}
    layer.train()
    assert not hasattr(layer, "qweight")
    assert layer.deploy() is layer
    assert layer.is_deployed
    assert layer._parameters["weight"] is None
    assert torch.equal(layer.weight, layer.dequantized_weight())
    assert set(layer.state_dict()) == {"qweight", "qweight_scale", "bias"}
    assert isinstance(layer.qweight, nn.Parameter)
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    with pytest.raises(AttributeError, match="no_such_thing"):
        layer.no_such_thing  # noqa: B018


def test_deployed_layer_stays_in_eval_mode_and_says_so_once(
    layer: BitLinear, caplog: pytest.LogCaptureFixture
) -> None:
    bitlayers.checks.log_deployed_stays.cache_clear()
    layer.deploy()
    with caplog.at_level(logging.WARNING, logger="bitlab"):
        assert layer.train() is layer
        layer.train()
    assert not layer.training
    assert len(caplog.records) == 1
    with pytest.raises(LifecycleError, match="deployed already"):
        layer.deploy()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_deploy_refuses_nonfinite_weights_and_changes_nothing(
    layer: BitLinear, value: float
) -> None:
    with torch.no_grad():
        layer.weight[7, 9] = value
    with pytest.raises(NonFiniteError, match="finite"):
        layer.deploy()
    assert not layer.is_deployed
    assert layer.weight[7, 9].isnan() or layer.weight[7, 9].isinf()


def test_deploy_refuses_the_meta_device() -> None:
    with pytest.raises(LifecycleError, match="meta"):
        BitLinear(8, 8, device="meta").deploy()


def test_deploy_refuses_parametrized_weights(layer: BitLinear) -> None:
    nn.utils.parametrizations.weight_norm(layer)
    with pytest.raises(LifecycleError, match="parametrized"):
        layer.deploy()


def write_in_place(layer: BitLinear) -> None:
    with torch.no_grad():
        layer.weight.mul_(-1)


def write_data_then_eval(layer: BitLinear) -> None:
    layer.weight.data.mul_(-1)
    layer.eval()


def write_data_then_invalidate(layer: BitLinear) -> None:
    layer.weight.data.mul_(-1)
    layer.invalidate_cache()


def new_parameter(layer: BitLinear) -> None:
    layer.weight = nn.Parameter(-layer.weight.detach())


def load(layer: BitLinear) -> None:
    layer.load_state_dict({"weight": -layer.weight.detach().clone(), "bias": layer.bias})


def step(layer: BitLinear) -> None:
    optimizer = torch.optim.SGD([layer.weight], lr=1.0)
    layer.weight.grad = 2 * layer.weight.detach().clone()
    optimizer.step()


@pytest.mark.parametrize(
    "change",
    [write_in_place, write_data_then_eval, write_data_then_invalidate, new_parameter, load, step],
)
def test_no_change_of_the_weight_leaves_a_stale_cache(
    layer: BitLinear, x: Tensor, change: Any
) -> None:
    layer.eval()
    before = layer(x)
    change(layer)
    assert torch.equal(layer(x), -before)


def test_eval_packs_once(layer: BitLinear, x: Tensor) -> None:
    layer.eval()
    first = layer.qweight
    layer(x[:1])
    assert layer.qweight is first
    layer(x)
    assert layer.qweight is not first
    first = layer.qweight
    layer.eval()
    assert layer.qweight is not first


def test_cache_made_in_inference_mode_serves_a_later_backward(layer: BitLinear, x: Tensor) -> None:
    layer.eval()
    with torch.inference_mode():
        layer(x)
    x = x.clone().requires_grad_()
    layer(x).sum().backward()
    assert x.grad is not None


def test_latent_eval_gives_a_gradient_to_its_input_only(layer: BitLinear, x: Tensor) -> None:
    x.requires_grad_()
    layer.eval()(x).sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is None
    assert layer.bias is not None
    assert layer.bias.grad is None


def test_deployed_gives_a_gradient_to_its_input(layer: BitLinear, x: Tensor) -> None:
    x.requires_grad_()
    layer.deploy()(x).sum().backward()
    assert x.grad is not None
    expected = torch.ones(5, 30) @ layer.dequantized_weight()
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("deployed", [False, True])
def test_copies_are_independent_and_equal(layer: BitLinear, x: Tensor, deployed: bool) -> None:
    layer.eval()
    if deployed:
        layer.deploy()
    expected = layer(x)
    saved = io.BytesIO()
    torch.save(layer, saved)
    saved.seek(0)
    for other in (
        copy.deepcopy(layer),
        copy.copy(layer),
        pickle.loads(pickle.dumps(layer)),
        torch.load(saved, weights_only=False),
    ):
        assert torch.equal(other(x), expected)
        assert other._cache is None or other._cache is not layer._cache
    clone = copy.deepcopy(layer)
    assert clone.bias is not None
    with torch.no_grad():
        clone.bias.add_(1)
    assert torch.equal(layer(x), expected)


def test_scale_stays_float32(layer: BitLinear, x: Tensor) -> None:
    layer.deploy()
    scale = layer.qweight_scale.clone()
    for move in (
        lambda: layer.to(torch.bfloat16),
        layer.half,
        layer.bfloat16,
        lambda: layer.to("cpu", torch.float16),
    ):
        move()
        assert layer.qweight_scale.dtype == torch.float32
        assert torch.equal(layer.qweight_scale, scale)
        assert layer.qweight.dtype == torch.uint8
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float16
    assert layer.to("meta").qweight_scale.is_meta


def test_latent_moves_drop_the_cache(layer: BitLinear, x: Tensor) -> None:
    layer.eval()(x)
    layer.to(torch.bfloat16)
    assert layer(x).dtype == torch.float32
    assert layer.latent_dtype == torch.bfloat16
    fresh = ops.pack_weight(layer.weight.detach(), "per_tensor", None)
    assert torch.equal(layer.qweight_scale, fresh[1])


def test_meta_device_runs_and_materializes() -> None:
    layer = BitLinear(64, 8, device="meta")
    for mode in (True, False):
        assert layer.train(mode)(torch.empty(3, 64, device="meta")).shape == (3, 8)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert real.eval()(torch.randn(3, 64)).shape == (3, 8)
    skeleton = BitLinear.packed_skeleton(64, 8, bias=True)
    assert skeleton.qweight.is_meta
    assert skeleton.is_deployed
    assert skeleton(torch.empty(3, 64, device="meta")).shape == (3, 8)


def test_state_dict_crossing_the_states_is_refused_even_if_not_strict(layer: BitLinear) -> None:
    deployed = BitLinear(128, 30).deploy()
    with pytest.raises(RuntimeError, match="weight is latent, but the layer is deployed"):
        deployed.load_state_dict(layer.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="qweight is packed, but the layer is latent"):
        layer.load_state_dict(deployed.state_dict(), strict=False)


def test_deployed_state_dict_loads_and_is_checked(layer: BitLinear, x: Tensor) -> None:
    expected = layer.deploy()(x)
    state = layer.state_dict()
    other = BitLinear(128, 30).deploy()
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)
    damaged = {**state, "qweight": state["qweight"] | 0x30}
    with pytest.raises(RuntimeError, match="invalid code 3"):
        other.load_state_dict(damaged)
    for name, tensor in (
        ("qweight", state["qweight"].to(torch.int32)),
        ("qweight_scale", state["qweight_scale"].double()),
        ("qweight", state["qweight"][:, :64]),
    ):
        with pytest.raises(RuntimeError, match=name):
            other.load_state_dict({**state, name: tensor})
    assert torch.equal(other(x), expected)


def test_a_deployed_files_tensors_load_with_their_sentinel(layer: BitLinear, x: Tensor) -> None:
    expected = layer.deploy()(x)
    state = {**layer.state_dict(), "weight": torch.empty(0, dtype=torch.uint8)}
    other = BitLinear(128, 30).deploy()
    other.load_state_dict(state)
    assert torch.equal(other(x), expected)


def test_the_cache_keeps_no_weight_alive(layer: BitLinear, x: Tensor) -> None:
    layer.eval()(x)
    weight = weakref.ref(layer.weight)
    layer.weight = nn.Parameter(torch.zeros(30, 128))
    assert weight() is None


def test_train_refuses_a_mode_that_is_no_bool(layer: BitLinear) -> None:
    with pytest.raises(ArgumentTypeError, match="mode must be a bool"):
        layer.train("yes")  # type: ignore[arg-type]


class Recorded(BitLinear):
    """A BitLinear that notes the calls of its hooks."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.calls: list[str] = []
        super().__init__(*args, **kwargs)

    def _on_enter_training_mode(self) -> None:
        self.calls.append("train")

    def _on_enter_eval_mode(self) -> None:
        self.calls.append("eval")


def test_hooks_run_on_real_transitions_only() -> None:
    layer = Recorded(8, 8)
    layer.train()
    layer.eval()
    layer.eval()
    layer.train()
    layer.deploy()
    layer.train()
    assert layer.calls == ["eval", "train"]


def test_abstract_methods() -> None:
    names = {
        "_train_forward",
        "_eval_forward",
        "_on_enter_training_mode",
        "_on_enter_eval_mode",
        "_perform_deployment",
    }
    for name in names:
        assert getattr(BitLayerBase, name).__isabstractmethod__
    with pytest.raises(ArgumentTypeError, match="must be subclassed"):
        BitLayerBase()

    class Bare(BitLayerBase):
        pass

    layer = Bare(in_features=10, out_features=5)
    assert layer.weight.shape == (5, 10)
    with pytest.raises(NotImplementedError, match="_train_forward"):
        layer(torch.randn(2, 10))
    with pytest.raises(NotImplementedError, match="_perform_deployment"):
        layer.deploy()


def test_deployment_must_return_packed_tensors_or_nothing() -> None:
    class Odd(BitLinear):
        def _perform_deployment(self) -> Any:
            return self.weight

    layer = Odd(8, 8)
    with pytest.raises(LifecycleError, match="must return"):
        layer.deploy()
    assert not layer.is_deployed


def test_a_custom_layer_without_sizes() -> None:
    class Own(BitLayerBase):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def _train_forward(self, x: Tensor) -> Tensor:
            return x * self.scale

        def _eval_forward(self, x: Tensor) -> Tensor:
            return x

        def _on_enter_training_mode(self) -> None: ...

        def _on_enter_eval_mode(self) -> None: ...

    layer = Own()
    assert layer(torch.ones(2)).requires_grad
    assert not layer.eval()(torch.ones(2)).requires_grad
    assert "latent" in repr(layer)
