"""Calibration of whole models: codes and scales from samples."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitcore import register_estimator
from bitcore.errors import ArgumentError, ConfigError, LifecycleError, NonFiniteError
from bitcore.estimators import ESTIMATORS
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import calibrate
from tests.bitlab_hf.models import VOCABULARY, auto_class, logits_of, make_float_model, token_ids


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("float")
    return {name: make_float_model(name, folder) for name in ("llama", "qwen2", "bert")}


GROUPS = {"weight_granularity": "per_group", "group_size": 64}


def load(sources: dict[str, Path], name: str = "llama", **fields: Any) -> Any:
    return auto_class(name).from_pretrained(
        sources[name], quantization_config=BitLabConfig(**fields)
    )


def samples(count: int = 24) -> Tensor:
    return torch.randint(0, VOCABULARY, (count, 32), generator=torch.Generator().manual_seed(5))


def distance(model: Any, original: Tensor) -> float:
    return float((logits_of(model.eval()) - original).square().mean())


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("llama", {}),
        ("llama", {**GROUPS, "head": "ternary"}),
        ("llama", {**GROUPS, "group_scale_dtype": "float32"}),
        ("llama", {**GROUPS, "weight_quantizer": "lsq"}),
        ("llama", {"weight_quantizer": "twn", "activation_dtype": "float32"}),
        ("qwen2", {"weight_quantizer": "lsq", "weight_granularity": "per_channel"}),
        ("bert", {"activation_granularity": "per_tensor"}),
    ],
)
def test_whole_path(
    sources: dict[str, Path], tmp_path: Path, name: str, fields: dict[str, Any]
) -> None:
    original = logits_of(auto_class(name).from_pretrained(sources[name]))
    model = load(sources, name, **fields)
    rounded = distance(model, original)
    seen: list[tuple[int, int, str]] = []
    model.train()
    report = calibrate(model, samples(), progress=lambda *args: seen.append(args))
    assert all(module.training for module in model.modules())
    layers = quantized_layers(model)
    assert {layer.name for layer in report.layers} == {found.names[0] for found in layers}
    assert [count for count, _, _ in seen] == list(range(1, len(layers) + 1))
    assert (report.samples, report.tokens) == (24, 24 * 32)
    for layer in report.layers:
        assert layer.error < 0.8 * layer.rounding_error, layer
    assert f"{len(layers)} layers calibrated on 24 samples" in str(report)
    calibrated = logits_of(model.eval())
    assert distance(model, original) < 0.6 * rounded
    # The float keys are all that a latent checkpoint has; training starts from here.
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    model.zero_grad()
    deploy(model)
    assert torch.equal(logits_of(model), calibrated)
    save(model, tmp_path / "deployed")
    again = auto_class(name).from_pretrained(tmp_path / "deployed")
    assert torch.equal(logits_of(again), calibrated)


def test_samples_of_every_kind(sources: dict[str, Path]) -> None:
    """Tensors, lists, dicts, a Dataset, padded rows: the same tokens give the same weights."""
    ids = samples(6)
    padded = [
        {
            "input_ids": torch.cat([torch.zeros(4, dtype=torch.long), row]),
            "attention_mask": [0] * 4 + [1] * 32,
            "labels": row,
        }
        for row in ids
    ]
    kinds: list[Any] = [
        ids,
        ids.tolist(),
        [{"input_ids": row[None]} for row in ids],
        Dataset.from_dict({"input_ids": ids.tolist()}),
        padded,
        iter(ids),
    ]
    reference: dict[str, Tensor] | None = None
    for number, kind in enumerate(kinds):
        model = load(sources)
        calibrate(model, kind, batch_size=6, rounds=1)
        state = model.state_dict()
        reference = reference or state
        assert all(torch.equal(state[key], reference[key]) for key in state), number
    # Rows of several lengths are not padded, but run by themselves.
    report = calibrate(load(sources), [*ids, ids[0, :9], ids[1, :9]], batch_size=4, rounds=1)
    assert (report.samples, report.tokens) == (8, 6 * 32 + 18)


def test_models_outside_transformers() -> None:
    """No list of blocks, one layer under two calls, one that is never called."""

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = torch.nn.Embedding(VOCABULARY, 64)
            self.one, self.unused = torch.nn.Linear(64, 64), torch.nn.Linear(64, 8)
            self.out = torch.nn.Linear(64, 16)

        def forward(self, ids: Tensor) -> Tensor:
            x: Tensor = self.embed(ids)
            return self.out(self.one(self.one(x).tanh()).tanh())

    torch.manual_seed(0)
    model = replace_linear(Model())
    unused = model.unused.weight.detach().clone()
    report = calibrate(model, samples(8))
    assert [layer.name for layer in report.layers] == ["one", "out"]
    assert torch.equal(model.unused.weight, unused)


def test_refusals(sources: dict[str, Path]) -> None:
    model = load(sources)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for bad, message in (
        ([], "texts of at least 2 tokens, got no samples"),
        (
            [[], [3]],
            r"texts of at least 2 tokens, got 2 samples, all shorter\nPass tokenized texts",
        ),
        (["text"], "must be token ids, got str"),
        ([{"text": "a"}], "must have input_ids, got one with"),
        (torch.rand(2, 8), "must be integers"),
        ([samples(4)], "must be integers"),
    ):
        with pytest.raises(ArgumentError, match=message):
            calibrate(model, bad)
    with pytest.raises(ArgumentError, match="batch_size must be an int of at least 1, got 0"):
        calibrate(model, samples(), batch_size=0)
    with pytest.raises(ArgumentError, match="damping must be"):
        calibrate(model, samples(), damping=0.0)
    with pytest.raises(ArgumentError, match="rounds must be"):
        calibrate(model, samples(), rounds=-1)
    with pytest.raises(LifecycleError, match="must hold quantized layers, got none"):
        calibrate(AutoModelForCausalLM.from_pretrained(sources["llama"]), samples())
    tied = load(sources, "qwen2", head="ternary")
    with pytest.raises(LifecycleError, match=r"lm_head\.weight must belong to one module"):
        calibrate(tied, samples())
    with pytest.raises(ConfigError, match=r"layers\.0.*64"):
        load(sources, weight_granularity="per_group", group_size=128)
    state = model.state_dict()
    assert all(torch.equal(state[key], before[key]) for key in before)
    with pytest.raises(
        LifecycleError, match="q_proj.*must be latent, got a layer that is deployed"
    ):
        calibrate(deploy(model), samples())


def test_values_that_are_not_finite(sources: dict[str, Path]) -> None:
    model = load(sources)
    with torch.no_grad():
        model.model.layers[1].post_attention_layernorm.weight[3] = math.nan
    before = model.model.layers[0].mlp.up_proj.weight.clone()
    with pytest.raises(NonFiniteError, match=r"input of model\.layers\.1\.mlp\.gate_proj must be"):
        calibrate(model, samples())
    assert torch.equal(model.model.layers[0].mlp.up_proj.weight, before)
    assert "_eval_forward" not in vars(model.model.layers[0].mlp.up_proj)
    model = load(sources)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=r"layers\.1\.mlp\.up_proj\.weight must be finite"):
        calibrate(model, samples())


def test_estimators_that_cannot_be_inverted(sources: dict[str, Path]) -> None:
    @register_estimator("half")
    def half(groups: Tensor) -> tuple[Tensor, Tensor]:
        scale = groups.mean(1) / 2
        return scale, scale

    try:
        with pytest.raises(ConfigError, match="'absmax', 'twn' or a learned one, got 'half'"):
            calibrate(load(sources, weight_quantizer="half"), samples())
    finally:
        del ESTIMATORS["half"]
