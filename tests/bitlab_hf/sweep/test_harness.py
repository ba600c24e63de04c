"""The sweep notices what it is there for: each fault, put into a model, must be found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP

from bitlab_hf import BitLabConfig
from bitlayers.bitlinear import BitLinear
from tests.bitlab_hf.sweep.compare import equal
from tests.bitlab_hf.sweep.configs import small
from tests.bitlab_hf.sweep.floats import left_float, without_numbers
from tests.bitlab_hf.sweep.life import live
from tests.bitlab_hf.sweep.models import architectures, config_class
from tests.bitlab_hf.sweep.results import Result, row

Forward = Callable[[Any, Tensor], Tensor]


def faults(folder: Path) -> set[str]:
    result = live("llama", folder)
    assert result.outcome == "fault" or not result.faults
    return {step for step, _ in result.faults}


def test_a_sound_model_has_none(tmp_path: Path) -> None:
    result = live("llama", tmp_path)
    assert result.outcome == "works"
    assert result.faults == []
    assert result.converted == 14
    assert 0.5 < result.share < 1


@pytest.mark.parametrize("always", [True, False])
def test_a_model_that_reads_a_weight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, always: bool
) -> None:
    def forward(self: Any, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x)
        if always or self.training:
            return nn.functional.linear(hidden, self.down_proj.weight)
        down: Tensor = self.down_proj(hidden)
        return down

    monkeypatch.setattr(LlamaMLP, "forward", forward)
    assert {"hidden weights", "training"} <= faults(tmp_path)


def test_training_that_differs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = BitLinear._train_forward
    monkeypatch.setattr(BitLinear, "_train_forward", lambda self, x: before(self, x) * 1.001)
    assert faults(tmp_path) == {"train mode against eval mode"}


def test_gradients_that_are_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = BitLinear._train_forward
    monkeypatch.setattr(BitLinear, "_train_forward", lambda self, x: before(self, x).detach())
    assert faults(tmp_path) == {"training"}


def test_a_deployed_layer_that_computes_something_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = BitLinear._eval_forward

    def forward(self: BitLinear, x: Tensor) -> Tensor:
        y = before(self, x)
        return y * 1.001 if self.is_deployed else y

    monkeypatch.setattr(BitLinear, "_eval_forward", forward)
    assert faults(tmp_path) == {"deployed"}


def test_a_crash_is_a_fault_with_its_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(self: BitLinear, x: Tensor) -> Tensor:
        raise TypeError("no such thing")

    monkeypatch.setattr(BitLinear, "_eval_forward", forward)
    result = live("llama", tmp_path)
    assert result.outcome == "fault"
    ((step, what),) = result.faults
    assert step == "eval"
    assert what.startswith("TypeError: no such thing at test_harness.py:")


def test_what_transformers_cannot_do_is_not_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda self: None)
    result = live("llama", tmp_path)
    assert result.outcome == "not swept"
    assert "TypeError" in result.reason


@pytest.fixture
def latent(tmp_path: Path) -> PreTrainedModel:
    AutoModelForCausalLM.from_config(small(LlamaConfig)).save_pretrained(tmp_path)
    skip = ["down_proj"]
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=BitLabConfig(modules_to_not_convert=skip)
    )
    return model


@pytest.mark.parametrize(
    ("said", "explained"),
    [
        ([], False),
        (["bitlab: something stays float"], False),
        (["bitlab: model.layers.0.mlp.up_proj stays float"], False),
        (["bitlab: 2 layers such as model.layers.1.mlp.down_proj stay float"], True),
        (["bitlab: model.layers.*.mlp.down_proj stay float: because"], True),
        (["bitlab: mlp.down_proj stays float"], True),
    ],
)
def test_what_stays_float(latent: PreTrainedModel, said: list[str], explained: bool) -> None:
    reasons, unexplained = left_float(latent, said)
    kind = "model.layers.*.mlp.down_proj"
    assert unexplained == ([] if explained else [f"{kind} (Linear)"])
    assert reasons == ({kind: without_numbers(said[0])} if explained else {})


def test_messages_lose_the_numbers_of_a_small_model() -> None:
    text = "bitlab: 4 tensors such as layers.0.w1, 63 % of the weights, stay float\nmore"
    assert without_numbers(text) == "* tensors such as layers.*.w1 stay float"


@pytest.mark.parametrize(
    "other",
    [
        lambda t: [t * (1 + 1e-3)],
        lambda t: [torch.cat([t[:1], -t[1:]])],
        lambda t: [t[:1]],
        lambda t: [t, t],
        lambda t: [torch.full_like(t, torch.nan)],
    ],
)
def test_the_comparison_bites(other: Callable[[Tensor], list[Tensor]]) -> None:
    t = torch.randn(3, 5)
    assert equal([t], [t.clone()], 0.0)
    assert not equal(other(t), [t], 1e-5)


def test_rows_hold_no_bars_of_their_own() -> None:
    result = Result("x", "X", "refused", reason="bitlab: a | b among 3 Conv1D\nmore")
    assert row(result) == r"| x | `X` | refused | a \| b among \* Conv1D |"


@pytest.mark.parametrize("architecture", architectures()[::25])
def test_small_configurations_are_small(architecture: str) -> None:
    config = small(config_class(architecture))
    assert type(config) is config_class(architecture)
    for name in ("hidden_size", "vocab_size", "num_hidden_layers"):
        value = vars(config).get(name)
        assert not isinstance(value, int) or value <= 512, name
