"""One factor in the last norm makes a calibrated model as sure as it can be."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPTNeoXConfig,
    GraniteConfig,
    PhiConfig,
)

from bitlab_hf.fit import confidence
from bitlab_hf.fit.confidence import fit_confidence
from bitlab_hf.fit.taps import Streams
from bitlab_hf.train import calibrate
from tests.bitlab_hf.models import (
    _SIZES,
    CONFIGS,
    auto_class,
    logits_of,
    make_float_model,
    taught,
    token_ids,
    training_data,
)
from tests.bitlab_hf.test_trainer import assert_equal_states, state_of
from tests.bitlab_hf.train.test_trainer import load

MODELS: dict[str, Any] = {
    **{name: CONFIGS[name] for name in ("llama", "qwen2", "gemma")},
    "soft cap": Gemma2Config(
        **_SIZES, num_key_value_heads=2, head_dim=16, final_logit_softcapping=0.5
    ),
    "factor": CohereConfig(**_SIZES, logit_scale=0.25),
    "divisor": GraniteConfig(**_SIZES, logits_scaling=8.0),
    "layer norm": GPTNeoXConfig(**_SIZES),
    "bias of the head": PhiConfig(**_SIZES),
}


def make(config: Any) -> Any:
    """Returns a random float model, no parameter of which is 0 or 1."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for value in model.parameters():
            value.add_(torch.randn_like(value), alpha=0.1)
    return model


def fitted(model: nn.Module) -> float:
    """Fits a model without any ternary layer to itself."""
    with torch.no_grad():
        return fit_confidence(model, [token_ids()], Streams())


def scaled(name: str, logits: Tensor, model: Any, factor: float) -> Tensor:
    """Returns what a model's logits are when its last norm is multiplied."""
    if name == "soft cap":
        return 0.5 * torch.tanh(factor * torch.atanh(logits / 0.5))
    if name == "bias of the head":
        return (logits - model.lm_head.bias) * factor + model.lm_head.bias
    return logits * factor


@pytest.mark.parametrize("name", MODELS)
def test_the_factor_is_one_of_the_logits(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(MODELS[name])
    before, found = logits_of(model), list[Tensor]()

    def lowest(losses: Tensor) -> float:
        found.append(losses)
        return -0.5

    monkeypatch.setattr(confidence, "_lowest", lowest)
    assert fitted(model) == 2**-0.5
    torch.testing.assert_close(logits_of(model), scaled(name, before, model, 2**-0.5))
    wanted = before.softmax(-1)
    for loss, exponent in zip(found[0], confidence._EXPONENTS, strict=True):
        log = scaled(name, before, model, 2**exponent).log_softmax(-1)
        assert float(loss) == pytest.approx(float(-(wanted * log).sum()), rel=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_as_sure_as_itself(name: str) -> None:
    assert fitted(make(MODELS[name])) == pytest.approx(1.0, abs=0.01)


def test_what_is_no_norm_before_a_head_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(confidence, "_lowest", lambda _: -0.5)
    masked = auto_class("bert").from_pretrained(make_float_model("bert", tmp_path))
    headless = AutoModel.from_pretrained(make_float_model("llama", tmp_path))
    shared = make(CONFIGS["llama"])
    shared.again = nn.Module()
    shared.again.weight = shared.model.norm.weight
    frozen = make(CONFIGS["llama"])
    frozen.model.norm.requires_grad_(False)
    for model in (masked, headless, shared, frozen):
        before = state_of(model)
        assert fitted(model) == 1.0
        assert_equal_states(state_of(model), before)


def test_logits_that_are_not_finite_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make(CONFIGS["llama"])
    before = state_of(model)
    wrong = torch.full((len(confidence._EXPONENTS),), torch.nan, dtype=torch.float64)
    monkeypatch.setattr(confidence, "_losses", lambda *_: wrong)
    assert fitted(model) == 1.0
    assert_equal_states(state_of(model), before)


def test_a_calibrated_model_is_nearest_to_its_original(tmp_path: Path) -> None:
    source = taught(make_float_model("llama", tmp_path))
    original, model = AutoModelForCausalLM.from_pretrained(source), load(source)
    wanted = logits(original).softmax(-1)
    report = calibrate(model, training_data())
    assert report.logit_scale != 1.0
    assert f"logits times {report.logit_scale:.2f}" in str(report)
    norm, before = model.model.norm.weight, original.model.norm.weight
    torch.testing.assert_close(norm, before * report.logit_scale)
    losses = {}
    for factor in (1.0, 0.9, 1.1, 1 / report.logit_scale):
        with torch.no_grad():
            norm.copy_(before * report.logit_scale * factor)
        losses[factor] = float(-(wanted * logits(model).log_softmax(-1)).sum())
    assert min(losses, key=losses.__getitem__) == 1.0


def logits(model: Any) -> Tensor:
    """Returns the logits of the calibration's samples."""
    with torch.no_grad():
        found: Tensor = model.eval()(torch.stack([r["input_ids"] for r in training_data()])).logits
    return found


@pytest.mark.parametrize("lowest", [-0.9, -0.3, 0.0, 0.21])
def test_the_lowest_point_of_a_parabola(lowest: float) -> None:
    losses = torch.tensor([(one - lowest) ** 2 for one in confidence._EXPONENTS])
    assert confidence._lowest(losses.double()) == pytest.approx(lowest, abs=1e-6)


@pytest.mark.parametrize("end", [-1, 0])
def test_the_lowest_point_at_an_end(end: int) -> None:
    losses = torch.arange(len(confidence._EXPONENTS)).double() * (1 if end == 0 else -1)
    assert confidence._lowest(losses) == confidence._EXPONENTS[end]
