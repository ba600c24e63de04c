"""TernaryEmbedding: what it looks up, holds, loads, moves and copies; a head that shares it."""

from __future__ import annotations

import copy
import io
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bitcore import BitQuantConfig
from bitcore.errors import ArgumentError, ArgumentTypeError, LifecycleError
from bitlayers import BitLinear, TernaryEmbedding, estimate_memory_usage

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IDS = torch.tensor([[0, 96, 3], [7, 7, 1]])
SCHEMES: dict[str, dict[str, Any]] = {
    "per_tensor": {},
    "per_channel": {"weight_granularity": "per_channel"},
    "groups": {"weight_granularity": "per_group", "group_size": 64},
    "float groups": {
        "weight_granularity": "per_group",
        "group_size": 64,
        "group_scale_dtype": "float32",
    },
}


def config(scheme: str = "groups", **fields: Any) -> BitQuantConfig:
    return BitQuantConfig(**SCHEMES[scheme], **fields)


def packed(scheme: str = "groups") -> tuple[Tensor, ...]:
    """The packed tensors of a matrix [97, 128]."""
    torch.manual_seed(0)
    layer = BitLinear(128, 97, bias=False, quant_config=config(scheme)).deploy()
    return tuple(tensor.detach() for tensor in layer.packed())


def embedding(
    scheme: str = "groups", dtype: torch.dtype = torch.float32, **options: Any
) -> TernaryEmbedding:
    made = TernaryEmbedding(97, 128, quant_config=config(scheme), dtype=dtype, **options)
    return made.commit(*packed(scheme))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scheme", list(SCHEMES))
def test_rows(scheme: str, dtype: torch.dtype) -> None:
    layer = embedding(scheme, dtype, padding_idx=3)
    assert isinstance(layer, nn.Embedding)
    assert layer._parameters["weight"] is None
    assert layer.padding_idx == 3
    leaves = {"qweight", "qweight_scale"} | (
        {"qweight_multiplier"} if scheme == "groups" else set()
    )
    assert set(layer.state_dict()) == leaves
    rows = layer(IDS)
    assert rows.dtype == layer.weight.dtype == dtype
    assert torch.equal(rows, F.embedding(IDS, layer.dequantized_weight(dtype)))
    assert torch.equal(rows, F.embedding(IDS, layer.weight + 0))
    assert torch.equal(layer(input=IDS.int()), rows)
    assert layer(IDS[:0]).shape == (0, 3, 128)
    for wrong in (97, 98, 99, 100, -1):
        with pytest.raises(IndexError):
            layer(torch.tensor([wrong]))


@pytest.mark.parametrize("rounds", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_scaled_rows(dtype: torch.dtype, rounds: bool) -> None:
    layer = embedding(dtype=dtype, embed_scale=50**0.5, rounds_scale=rounds)
    for other in (dtype, *DTYPES):
        moved = copy.deepcopy(layer).to(other)
        factor: Any = torch.tensor(50**0.5).to(other) if rounds else 50**0.5
        expected = F.embedding(IDS, layer.dequantized_weight(other)) * factor
        assert torch.equal(moved(IDS), expected)
    assert "embed_scale=7.07107, dtype" in repr(layer)


@pytest.mark.parametrize("scheme", list(SCHEMES))
@pytest.mark.parametrize("activation", ["int8", "float32"])
def test_a_tied_head_shares_one_matrix(scheme: str, activation: str) -> None:
    rows = embedding(scheme)
    scheme_of_head = config(scheme, activation_dtype=activation)
    head = BitLinear.packed_skeleton(128, 97, False, scheme_of_head)
    head.qweight = rows.qweight
    for leaf, buffer in rows._buffers.items():
        head._buffers[leaf] = buffer
    alone = BitLinear.packed_skeleton(128, 97, False, scheme_of_head, device="cpu")
    alone.load_state_dict(rows.state_dict())
    both = nn.ModuleList([rows, head])
    assert len(list(both.parameters())) == 1
    x = torch.randn(5, 128)
    assert torch.equal(head(x), alone(x))
    for same in (copy.deepcopy(both), copy.deepcopy(both).to(torch.bfloat16)):
        assert same[0].qweight is same[1].qweight
        assert torch.equal(same[0].qweight_scale, same[1].qweight_scale)


def test_memory() -> None:
    found = estimate_memory_usage(embedding(dtype=torch.bfloat16))
    assert found["original"] == 2 * 97 * 128
    assert found["quantized"] == 25 * 128 + 4 * 97 + 2 * 97


def test_it_does_not_train() -> None:
    layer = embedding()
    assert not layer.training
    assert not layer.train().training
    nn.ModuleList([layer]).train()
    assert not layer.training
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert not layer(IDS).requires_grad
    with pytest.raises(LifecycleError, match="weight must stay as it is once packed"):
        layer.weight = nn.Parameter(torch.zeros(97, 128))


@pytest.mark.parametrize("dtype", DTYPES)
def test_casts_round_no_scale(dtype: torch.dtype) -> None:
    layer = embedding()
    before = layer.qweight_scale.clone()
    layer.to(dtype)
    assert layer.qweight.dtype == layer.qweight_multiplier.dtype == torch.uint8
    assert torch.equal(layer.qweight_scale, before)
    assert layer.dtype == layer(IDS).dtype == dtype
    layer.to("cpu").share_memory()
    assert layer.dtype == dtype


def test_moves_and_empty_modules() -> None:
    layer = embedding()
    skeleton = copy.deepcopy(layer).to("meta")
    assert all(tensor.is_meta for tensor in skeleton.packed())
    filled = skeleton.to_empty(device="cpu")
    filled.load_state_dict(layer.state_dict())
    assert torch.equal(filled(IDS), layer(IDS))
    source = nn.Embedding(97, 128, padding_idx=5, device="meta", dtype=torch.bfloat16)
    empty = TernaryEmbedding.skeleton(source, config())
    assert [tuple(tensor.shape) for tensor in empty.packed()] == [(25, 128), (97,), (97, 2)]
    assert all(tensor.is_meta for tensor in empty.packed())
    assert (empty.dtype, empty.padding_idx, empty.embed_scale) == (torch.bfloat16, 5, 1.0)


def test_copies_and_pickles() -> None:
    layer = embedding("per_channel", torch.bfloat16)
    assert torch.equal(copy.deepcopy(layer)(IDS), layer(IDS))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert torch.equal(again(IDS), layer(IDS))
    assert again.qweight_scale.dtype == torch.float32


def test_what_is_refused() -> None:
    class Other(nn.Embedding):
        pass

    with pytest.raises(ArgumentTypeError, match=r"must be a plain nn.Embedding.*got Other"):
        TernaryEmbedding.skeleton(Other(4, 4))
    with pytest.raises(ArgumentTypeError, match=r"must be a plain nn.Embedding.*got Linear"):
        TernaryEmbedding.skeleton(nn.Linear(4, 4))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no max_norm, got 1"):
        TernaryEmbedding.skeleton(nn.Embedding(4, 4, max_norm=1.0))
    with pytest.raises(ArgumentError, match="group_size"):
        TernaryEmbedding(97, 100, quant_config=config())
    qweight, scale, multiplier = packed()
    for tensors, message in (
        ((qweight, scale), "tensors must be qweight, qweight_scale, qweight_multiplier"),
        ((qweight[:24], scale, multiplier), "qweight must be [25, 128], got [24, 128]"),
        ((qweight, scale[:1], multiplier), "qweight_scale must be [97], got [1]"),
        ((qweight, scale, multiplier[:, :1]), "qweight_multiplier must be [97, 2], got [97, 1]"),
    ):
        with pytest.raises(ArgumentError, match=re.escape(f"TernaryEmbedding: {message}")):
            embedding().commit(*tensors)
    with pytest.raises(ArgumentTypeError, match=r"qweight must be torch.uint8, got torch.int8"):
        embedding().commit(qweight.view(torch.int8), scale, multiplier)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qweight": torch.zeros(25, 128)}, "a.qweight must be torch.uint8, got torch.float32"),
        ({"qweight": torch.full((25, 128), 255, dtype=torch.uint8)}, "a.qweight holds the invalid"),
        ({"qweight_scale": torch.ones(97).half()}, "a.qweight_scale must be torch.float32"),
        ({"qweight": torch.zeros(24, 128, dtype=torch.uint8)}, "size mismatch for a.qweight"),
        ({"qweight_multiplier": torch.full((97, 2), 128, dtype=torch.uint8)}, "0 to 127, got 128"),
        ({"weight": torch.zeros(97, 128)}, "a.weight is latent, but the layer is deployed"),
    ],
)
@pytest.mark.parametrize("strict", [True, False])
def test_state_dicts_that_do_not_fit(change: dict[str, Tensor], message: str, strict: bool) -> None:
    layer = embedding()
    parent = nn.ModuleDict({"a": layer})
    before = layer.qweight.clone()
    state = {**parent.state_dict(), **{f"a.{name}": value for name, value in change.items()}}
    with pytest.raises(RuntimeError, match=re.escape(message)):
        parent.load_state_dict(state, strict=strict)
    assert torch.equal(layer.qweight, before)
