"""Layers that stay float by a rule: found from the model's source and shape, and named."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from bitlab_hf import BitLabConfig, deploy, quantized_layers, replace_linear, save
from bitlab_hf.model.reads import find_reads, reads_of

SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip


class Block(nn.Module):
    """Reads some of its weights, in ways that matter and in ways that do not."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("called", "cast", "sized", "multiplied", "rescaled", "handed", "listed"):
            setattr(self, name, nn.Linear(64, 64))
        self.stack = nn.ModuleList([nn.Linear(64, 64) for _ in range(2)])

    def _scale(self) -> None:
        if not self.training:
            self.rescaled.weight.data.mul_(1.0)

    def other(self, x: Tensor) -> Tensor:
        """A method of its own that a model calls in place of forward."""
        projection = self.handed
        return F.linear(x, projection.weight)

    def reset_parameters(self) -> None:
        """Runs when the model is made: it may write."""
        nn.init.zeros_(self.called.weight)

    def forward(self, x: Tensor) -> Tensor:
        self._scale()
        x = self.called(x).to(self.cast.weight.dtype)
        assert self.sized.weight.shape[0] == x.shape[-1]
        if isinstance(self.sized.weight, Tensor) and self.sized.weight is not None:
            x = self.sized(x)
        x = x @ self.multiplied.weight.t() + self.rescaled(self.cast(x))
        for layer in self.stack:
            x = x + F.linear(x, layer.weight)
        return self.other(x) + self.listed(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x) * block.listed.weight.mean()
        return x


def test_reads_are_found_by_what_is_made_of_them() -> None:
    reads = reads_of(Block)
    assert reads.values.keys() == {("multiplied",), ("rescaled",), ("handed",), ("stack", "*")}
    assert reads.dtypes.keys() == {("cast",)}
    values, dtypes = find_reads(Model())
    per_block = {"multiplied", "rescaled", "handed", "stack.0", "stack.1", "listed"}
    assert values == {f"blocks.{i}.{name}" for i in (0, 1) for name in per_block}
    assert dtypes == {"blocks.0.cast", "blocks.1.cast"}


def test_what_is_read_stays_float_and_one_warning_names_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = Model()
    with caplog.at_level(logging.WARNING, logger="bitlab"):
        replace_linear(model)
    names = {name for found in quantized_layers(model) for name in found.names}
    assert names == {f"blocks.{i}.{n}" for i in (0, 1) for n in ("called", "cast", "sized")}
    assert len(caplog.records) == 1
    assert "blocks.*.multiplied" in caplog.text
    assert "reads their weights itself" in caplog.text
    x = torch.randn(3, 64)
    trained = model.train()(x)
    expected = model.eval()(x)
    torch.testing.assert_close(trained, expected)
    torch.testing.assert_close(deploy(model)(x), expected)


class Inherits(Block):
    """Hides its base's forward, and calls it."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Replaces(Block):
    """Hides its base's forward for good."""

    def forward(self, x: Tensor) -> Tensor:
        return self.called(x)


class Switched(nn.Module):
    """Reads a weight behind settings."""

    def __init__(self, ways: int, exact: bool) -> None:
        super().__init__()
        self.ways, self.exact = ways, exact
        self.fc = nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        if self.ways > 1 and self.exact:
            return F.linear(x, self.fc.weight)
        return self.fc(x)


def test_what_a_base_reads_counts_where_it_runs() -> None:
    assert reads_of(Inherits).values.keys() == reads_of(Block).values.keys()
    # `other` is still a method of its own.
    assert reads_of(Replaces).values.keys() == {("handed",)}


def test_a_branch_that_settings_turn_off_is_not_read() -> None:
    assert find_reads(Switched(2, True))[0] == {"fc"}
    assert find_reads(Switched(1, True))[0] == find_reads(Switched(2, False))[0] == set()
    config = transformers.BloomConfig(n_layer=1, hidden_size=64, n_head=4)
    with torch.device("meta"):
        bloom = AutoModelForCausalLM.from_config(config)
        slow = transformers.BloomConfig(
            n_layer=1, hidden_size=64, n_head=4, pretraining_tp=2, slow_but_exact=True
        )
        read = find_reads(AutoModelForCausalLM.from_config(slow))[0]
    assert not find_reads(bloom)[0]
    assert {name.rpartition(".")[2] for name in read} == {"dense", "dense_4h_to_h"}


@pytest.mark.parametrize(
    ("kind", "left"),
    [
        ("MambaConfig", {"x_proj", "dt_proj", "out_proj"}),
        ("FalconMambaConfig", {"x_proj", "dt_proj", "out_proj"}),
        ("Mamba2Config", {"out_proj"}),
        ("BambaConfig", {"out_proj"}),
        ("FalconH1Config", {"out_proj"}),
        ("RwkvConfig", {"output", "value"}),
    ],
)
def test_transformers_families(kind: str, left: set[str]) -> None:
    """By their classes alone: what a fused kernel or a rescaling takes."""
    config = getattr(transformers, kind)(num_hidden_layers=2)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    values, _ = find_reads(model)
    linears = {name for name, module in model.named_modules() if type(module) is nn.Linear}
    assert {name.rpartition(".")[2] for name in values & linears} == left


MOE = {
    "Qwen2MoeConfig": ({"num_experts": 6}, {"shared_expert_gate"}),
    "JetMoeConfig": ({"num_local_experts": 6, "kv_channels": 16}, {"layer"}),
    "AfmoeConfig": ({"num_experts": 6, "num_dense_layers": 0}, {"gate"}),
}


@pytest.mark.parametrize("kind", MOE)
def test_routers_stay_float_also_when_all_is_asked_for(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options, routers = MOE[kind]
    sizes: dict[str, Any] = {**SIZES, "num_hidden_layers": 1, **options}
    config = getattr(transformers, kind)(**sizes)
    source = tmp_path / "float"
    AutoModelForCausalLM.from_config(config).save_pretrained(source)
    scheme = BitLabConfig(modules_to_not_convert=[])
    with caplog.at_level(logging.WARNING, logger="bitlab"):
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=scheme)
    plain = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if type(module) is nn.Linear
    }
    assert routers <= plain
    assert "route tokens to experts" in caplog.text
    if kind == "Qwen2MoeConfig":
        named = BitLabConfig(
            overrides={"*shared_expert_gate": {"weight_granularity": "per_channel"}}
        )
        model = AutoModelForCausalLM.from_pretrained(source, quantization_config=named)
        converted = {found.names[0].rpartition(".")[2] for found in quantized_layers(model)}
        assert "shared_expert_gate" in converted


def test_what_transformers_leaves_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = transformers.T5Config(
        vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
    )
    source = tmp_path / "float"
    transformers.T5ForConditionalGeneration(config).save_pretrained(source)
    with caplog.at_level(logging.WARNING, logger="bitlab"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(
            source, quantization_config=BitLabConfig()
        )
    assert "encoder.block.*.layer.*.DenseReluDense.wo" in caplog.text


def test_a_weight_that_is_computed_stays_float(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    nn.utils.weight_norm(model[0])
    with caplog.at_level(logging.WARNING, logger="bitlab"):
        replace_linear(model)
    assert [found.names for found in quantized_layers(model)] == [["1"]]
    assert "computed from other tensors" in caplog.text


def test_hooks_of_a_replaced_layer_survive() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("forward"))
    model[0].register_forward_pre_hook(lambda *_, **__: calls.append("before"), with_kwargs=True)
    model[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    handle = model[1].register_forward_hook(lambda *_: calls.append("removed"))
    replace_linear(model)
    handle.remove()
    model(torch.randn(2, 64)).sum().backward()
    assert calls == ["before", "forward", "backward"]
    calls.clear()
    deploy(model)(torch.randn(2, 64))
    assert calls == ["before", "forward"]


def test_layers_in_accelerates_hands_are_refused(tmp_path: Path) -> None:
    from accelerate import cpu_offload

    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    cpu_offload(model, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="accelerate dispatches or offloads"):
        replace_linear(model)
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_that_casts_to_the_dtype_of_a_weight(dtype: torch.dtype, tmp_path: Path) -> None:
    """A float32 latent weight must not widen what the float model would not."""
    config = transformers.SwitchTransformersConfig(
        vocab_size=97, d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4, num_experts=2,
        num_sparse_encoder_layers=0, num_sparse_decoder_layers=0,
    )  # fmt: skip
    source = tmp_path / "float"
    auto = transformers.AutoModelForSeq2SeqLM
    auto.from_config(config).to(dtype).save_pretrained(source)
    scheme = BitLabConfig()
    latent = auto.from_pretrained(source, dtype=dtype, quantization_config=scheme).eval()
    cast = [found for found in quantized_layers(latent) if found.module.casts_input]
    assert {found.names[0].rpartition(".")[2] for found in cast} == {"wo"}
    inputs = {
        "input_ids": torch.arange(3, 15).view(2, 6),
        "decoder_input_ids": torch.ones(2, 3).int(),
    }
    expected = latent(**inputs).logits
    assert expected.dtype == dtype
    save(deploy(latent), tmp_path / "packed")
    assert torch.equal(latent(**inputs).logits, expected)
    again = auto.from_pretrained(tmp_path / "packed", dtype=dtype)
    assert torch.equal(again(**inputs).logits, expected)
