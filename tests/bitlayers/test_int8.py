"""Int8Linear and Int8Embedding: what they compute, hold, load, move and copy."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from bitcore import ops
from bitcore.errors import ArgumentError, ArgumentTypeError
from bitcore.quantize import quantize_rows_int8
from bitlayers import Int8Embedding, Int8Linear

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.tensor([[0, 96, 3], [7, 7, 1]])


def linear(bias: bool = True) -> Int8Linear:
    return Int8Linear.from_linear(nn.Linear(64, 97, bias=bias))


def embedding(dtype: torch.dtype = torch.float32) -> Int8Embedding:
    return Int8Embedding.from_embedding(nn.Embedding(97, 64, dtype=dtype))


def test_a_linear_layer_in_int8() -> None:
    source = nn.Linear(64, 97).eval()
    layer = Int8Linear.from_linear(source)
    assert isinstance(layer, nn.Linear)
    assert layer._parameters["weight"] is None
    assert layer.bias is source.bias
    assert not layer.training
    assert set(layer.state_dict()) == {"qweight", "qweight_scale", "bias"}
    codes, scale = quantize_rows_int8(source.weight)
    assert torch.equal(layer.qweight, codes)
    assert not layer.qweight.requires_grad
    x = torch.randn(2, 3, 64)
    assert torch.equal(layer(x), ops.linear_int8(x, codes, scale, source.bias))
    # Half a step of 127 in the activations and in the weights.
    error = (layer(x) - source(x)).abs().max()
    assert 0 < error < 0.05
    assert set(linear(bias=False).state_dict()) == {"qweight", "qweight_scale"}


def test_gradients_reach_the_input_only() -> None:
    layer = linear()
    x = torch.randn(5, 64, requires_grad=True)
    dy = torch.randn(5, 97)
    layer(x).backward(dy)
    exact = dy.double() @ layer.dequantized_weight(torch.float64)
    assert x.grad is not None
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-5, atol=1e-5)
    assert all(p.grad is None and not p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_in_int8(dtype: torch.dtype) -> None:
    source = nn.Embedding(97, 64, padding_idx=3, dtype=dtype)
    layer = Int8Embedding.from_embedding(source)
    assert isinstance(layer, nn.Embedding)
    assert layer._parameters["weight"] is None
    assert layer.padding_idx == 3
    assert set(layer.state_dict()) == {"qweight", "qweight_scale"}
    rows = layer(IDS)
    assert rows.dtype == dtype
    assert torch.equal(rows, F.embedding(IDS, layer.dequantized_weight(dtype)))
    assert not rows[0, 2].any(), "the padding row is zero, as in the source"
    assert torch.equal(layer(input=IDS.int()), rows)
    assert layer(IDS[:0]).shape == (0, 3, 64)
    with pytest.raises(IndexError):
        layer(torch.tensor([97]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_embedding_that_scales_its_rows(dtype: torch.dtype) -> None:
    class Scaled(nn.Embedding):
        def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002
            return super().forward(input) * torch.tensor(50**0.5).to(self.weight.dtype)

    source = Scaled(97, 50, dtype=dtype)
    layer = Int8Embedding.from_embedding(source, embed_scale=50**0.5)
    source.weight = nn.Parameter(layer.dequantized_weight(dtype))
    assert torch.equal(layer(IDS), source(IDS))
    for other in DTYPES:
        assert torch.equal(
            copy.deepcopy(layer).to(other)(IDS),
            F.embedding(IDS, layer.dequantized_weight(other)) * torch.tensor(50**0.5).to(other),
        )


def test_what_is_refused() -> None:
    class Other(nn.Embedding):
        pass

    with pytest.raises(ArgumentTypeError, match="must be a plain nn.Embedding.*got Other"):
        Int8Embedding.from_embedding(Other(4, 4))
    with pytest.raises(ArgumentTypeError, match="must be a plain nn.Embedding.*got Linear"):
        Int8Embedding.from_embedding(nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ArgumentTypeError, match="must be a plain nn.Linear, got Int8Linear"):
        Int8Linear.from_linear(linear())
    with pytest.raises(ArgumentError, match="no max_norm, got 1"):
        Int8Embedding.from_embedding(nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(ArgumentTypeError, match="must be float32, bfloat16 or float16"):
        Int8Embedding.from_embedding(nn.Embedding(4, 4, dtype=torch.float64))
    with pytest.raises(ArgumentError, match="at most 131071"):
        Int8Linear(131072, 1, device="meta")
    with pytest.raises(ArgumentError, match=r"qweight must be \[97, 64\], got \[96, 64\]"):
        linear().commit(torch.zeros(96, 64, dtype=torch.int8), torch.ones(96))


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_round_no_scale(dtype: torch.dtype) -> None:
    both = nn.ModuleList([linear(), embedding()])
    before = [both[0].qweight_scale.clone(), both[1].qweight_scale.clone()]
    both.to(dtype)
    for module, scale in zip(both, before, strict=True):
        assert module.qweight.dtype == torch.int8
        assert torch.equal(module.qweight_scale, scale)
    assert both[0].bias.dtype == dtype
    assert both[1].dtype == both[1](IDS).dtype == dtype
    assert both[0](torch.randn(2, 64, dtype=dtype)).dtype == dtype
    # A move without a cast leaves the output dtype as it is.
    both.to("cpu").share_memory()
    assert both[1].dtype == dtype


def test_moves_and_empty_modules() -> None:
    for module in (linear(), embedding()):
        skeleton = copy.deepcopy(module).to("meta")
        assert skeleton.qweight.is_meta
        assert skeleton.qweight_scale.is_meta
        filled = skeleton.to_empty(device="cpu")
        filled.load_state_dict(module.state_dict())
        assert torch.equal(filled.qweight, module.qweight)
        assert torch.equal(filled.qweight_scale, module.qweight_scale)
    for skeleton in (
        Int8Linear.skeleton(nn.Linear(64, 97, device="meta")),
        Int8Embedding.skeleton(nn.Embedding(97, 64, device="meta", dtype=torch.bfloat16)),
        Int8Linear(64, 97, device="meta"),
    ):
        assert skeleton.qweight.is_meta
        assert skeleton.qweight.shape == (97, 64)
        assert skeleton.qweight_scale.shape == (97,)
    assert Int8Embedding.skeleton(nn.Embedding(4, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_copies_and_pickles() -> None:
    x = torch.randn(2, 64)
    for module, argument in ((linear(), x), (embedding(torch.bfloat16), IDS)):
        expected = module(argument)
        assert torch.equal(copy.deepcopy(module)(argument), expected)
        file = io.BytesIO()
        torch.save(module, file)
        file.seek(0)
        again = torch.load(file, weights_only=False)
        assert torch.equal(again(argument), expected)
        assert again.qweight_scale.dtype == torch.float32


def test_two_modules_share_one_matrix() -> None:
    rows, head = embedding(), Int8Linear(64, 97, bias=False, device="meta")
    head.commit(rows.qweight, rows.qweight_scale)
    both = nn.ModuleList([rows, head])
    assert head.qweight is rows.qweight
    assert len(list(both.parameters())) == 1
    for same in (copy.deepcopy(both), copy.deepcopy(both).to(torch.bfloat16)):
        assert same[0].qweight is same[1].qweight
        assert same[0].qweight.data_ptr() == same[1].qweight.data_ptr()
        assert torch.equal(same[0].qweight_scale, same[1].qweight_scale)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(97, 64)}, "a.qweight must be torch.int8, got torch.float32"),
        ({"qweight_scale": torch.ones(97).half()}, "a.qweight_scale must be torch.float32"),
        ({"qweight": torch.zeros(96, 64, dtype=torch.int8)}, "size mismatch for a.qweight"),
        ({"qweight_scale": torch.ones(1)}, "size mismatch for a.qweight_scale"),
        ({"qweight": torch.full((97, 64), -128, dtype=torch.int8)}, "a.qweight .*got -128"),
        ({"qweight_scale": torch.zeros(97)}, "a.qweight_scale must be finite and positive"),
        ({"qweight_scale": torch.full((97,), float("nan"))}, "a.qweight_scale must be finite"),
        ({"weight": torch.zeros(97, 64)}, "a.weight is float, but the module is int8"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_state_dicts_that_do_not_fit(
    change: dict[str, torch.Tensor], message: str, strict: bool
) -> None:
    for module in (linear(bias=False), embedding()):
        parent = nn.ModuleDict({"a": module})
        before = module.qweight.clone()
        state = {**parent.state_dict(), **{f"a.{name}": value for name, value in change.items()}}
        with pytest.raises(RuntimeError, match=message):
            parent.load_state_dict(state, strict=strict)
        assert torch.equal(module.qweight, before)


def test_compiled_whole() -> None:
    model = nn.Sequential(embedding(), linear())
    expected = model(IDS)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(IDS), expected)


def test_repr() -> None:
    assert repr(linear()) == "Int8Linear(in_features=64, out_features=97, bias=True)"
    scaled = Int8Embedding(97, 64, 3, embed_scale=8.0, dtype=torch.bfloat16)
    assert repr(scaled) == (
        "Int8Embedding(97, 64, padding_idx=3, embed_scale=8, dtype=torch.bfloat16)"
    )
