"""The three loads: what is converted, from which file, under which names."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaPreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from bitcore.errors import ArgumentError, ConfigError, LifecycleError
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.quantizer import register
from bitlayers import LAYER_REGISTRY, BitLinear, register_layer
from tests.bitlab_hf.models import logits_of, make_float_model, token_ids

SCALES = [{}, {"weight_granularity": "per_group", "group_size": 64}]


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return make_float_model("llama", tmp_path)


@pytest.fixture
def deployed(source: Path, tmp_path: Path) -> Path:
    model = load(source, BitLabConfig(mode="infer"))
    save(model, tmp_path / "deployed")
    return tmp_path / "deployed"


def load(path: Path, config: Any = None, **options: Any) -> Any:
    if config is not None:
        options["quantization_config"] = config
    return AutoModelForCausalLM.from_pretrained(path, **options)


@pytest.mark.parametrize("scales", SCALES, ids=["tensor", "groups"])
def test_all_ways_give_the_same_logits(
    source: Path, tmp_path: Path, scales: dict[str, Any]
) -> None:
    latent = load(source, BitLabConfig(**scales))
    expected = logits_of(latent)
    save(latent, tmp_path / "latent")
    deployed = tmp_path / "deployed"
    save(load(source, BitLabConfig(mode="infer", **scales)), deployed)
    for path, config in (
        (source, {"quant_method": "bitlab", **scales}),
        (source, BitLabConfig(mode="train", **scales)),
        (source, BitLabConfig(mode="infer", **scales)),
        (tmp_path / "latent", None),
        (tmp_path / "latent", BitLabConfig(mode="train")),
        (tmp_path / "latent", BitLabConfig(mode="infer")),
        (deployed, None),
        (deployed, BitLabConfig()),
        (deployed, BitLabConfig(mode="infer", verify=False)),
    ):
        model = load(path, config)
        assert torch.equal(logits_of(model), expected), (path, config)
        packed = path == deployed or (isinstance(config, BitLabConfig) and config.mode == "infer")
        assert all(layer.module.is_deployed is packed for layer in quantized_layers(model))
        assert (getattr(model, "hf_quantizer", None) is not None) is packed
        assert bool(model.is_quantized) is packed
        assert model.config.quantization_config.weight_format == ("packed" if packed else "latent")


def test_a_float32_file_is_packed_from_float32_in_a_bf16_model(source: Path) -> None:
    latent = load(source, BitLabConfig(), dtype=torch.bfloat16)
    packed = load(source, BitLabConfig(mode="infer"), dtype=torch.bfloat16)
    for first, second in zip(quantized_layers(latent), quantized_layers(packed), strict=True):
        assert torch.equal(first.module.qweight, second.module.qweight)
        assert torch.equal(first.module.qweight_scale, second.module.qweight_scale)
    assert torch.equal(logits_of(latent), logits_of(packed))


def test_latent_dtype_keep(source: Path) -> None:
    model = load(source, BitLabConfig(latent_dtype="keep"), dtype=torch.bfloat16)
    assert model.model.layers[0].mlp.up_proj.weight.dtype == torch.bfloat16


def test_latent_is_a_float_model_to_transformers(source: Path) -> None:
    model = load(source, BitLabConfig())
    assert not hasattr(model, "hf_quantizer")
    assert model.half().dtype == torch.float16


def test_what_is_skipped(source: Path) -> None:
    model = load(source, BitLabConfig(modules_to_not_convert=["down_proj"]))
    assert type(model.lm_head) is nn.Linear
    assert type(model.model.layers[0].mlp.down_proj) is nn.Linear
    assert isinstance(model.model.layers[0].mlp.up_proj, BitLinear)
    skipped = model.config.quantization_config.modules_to_not_convert
    assert {"lm_head", "down_proj"} <= set(skipped)


def test_bert_keeps_its_heads_float(tmp_path: Path) -> None:
    path = make_float_model("bert", tmp_path)
    model = AutoModelForSequenceClassification.from_pretrained(
        path, quantization_config=BitLabConfig(), num_labels=3
    )
    assert type(model.classifier) is nn.Linear
    # The pooler is not in a masked-language-model checkpoint: newly made, and left alone.
    assert type(model.bert.pooler.dense) is nn.Linear
    assert isinstance(model.bert.encoder.layer[0].intermediate.dense, BitLinear)
    deploy(model)
    save(model, tmp_path / "deployed")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "deployed")
    assert torch.equal(logits_of(model), logits_of(again))


def test_other_heads_from_a_deployed_file(deployed: Path) -> None:
    base = AutoModel.from_pretrained(deployed)
    assert isinstance(base.layers[0].mlp.up_proj, BitLinear)
    model = AutoModelForSequenceClassification.from_pretrained(deployed, num_labels=3)
    assert type(model.score) is nn.Linear
    assert model.score.weight.requires_grad
    full = load(deployed)
    assert torch.equal(
        base(input_ids=token_ids()).last_hidden_state,
        full.model(input_ids=token_ids()).last_hidden_state,
    )


def test_the_sentinel_is_not_reported(deployed: Path, caplog: pytest.LogCaptureFixture) -> None:
    for auto in (AutoModelForCausalLM, AutoModel):
        _, info = auto.from_pretrained(deployed, output_loading_info=True)
        assert not info["missing_keys"]
        assert {k for k in info["unexpected_keys"] if not k.startswith("lm_head")} == set()


def test_without_bitlab_the_load_fails(deployed: Path) -> None:
    """The sentinel: a stock load ends in a size mismatch instead of random weights."""
    config = AutoConfig.from_pretrained(deployed)
    del config.quantization_config
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        LlamaForCausalLM.from_pretrained(deployed, config=config)


def test_a_packed_file_cannot_be_trained(deployed: Path) -> None:
    with pytest.raises(LifecycleError, match=r"mode must be .* got 'train'"):
        load(deployed, BitLabConfig(mode="train"))


def test_custom_layer(source: Path, tmp_path: Path) -> None:
    @register_layer("Mine")
    class Mine(BitLinear):
        pass

    try:
        model = load(source, BitLabConfig(layer="Mine"))
        assert type(model.model.layers[0].mlp.up_proj) is Mine
        expected = logits_of(model)
        save(deploy(model), tmp_path / "mine")
        again = load(tmp_path / "mine")
        assert type(again.model.layers[0].mlp.up_proj) is Mine
        assert torch.equal(logits_of(again), expected)
    finally:
        del LAYER_REGISTRY["Mine"]
    with pytest.raises(ArgumentError, match="register_layer"):
        load(tmp_path / "mine")


def test_nothing_to_convert(tmp_path: Path) -> None:
    GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=32, n_layer=1, n_head=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ConfigError, match="Conv1D"):
        load(tmp_path, BitLabConfig())


def test_experts_that_stay_float_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, moe_intermediate_size=64,
        num_experts=4, num_experts_per_tok=2, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=32,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    with caplog.at_level(logging.WARNING, logger="bitlab"):
        load(tmp_path, BitLabConfig(experts="keep"))
    told = next(r.getMessage() for r in caplog.records if "expert tensors" in r.getMessage())
    assert re.search(r"\d+ % of the weights, stay float", told)


def test_a_group_size_that_does_not_divide_names_the_layer(source: Path) -> None:
    config = BitLabConfig(weight_granularity="per_group", group_size=128)
    with pytest.raises(ConfigError, match=r"model.layers.0.*multiple of group_size 128, got 64"):
        load(source, config)


class TwoNames(LlamaPreTrainedModel):
    """One Linear under two names, and two Linears with one weight."""

    _tied_weights_keys = {"second.weight": "first.weight"}  # noqa: RUF012

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.first = nn.Linear(64, 64, bias=False)
        self.second = nn.Linear(64, 64, bias=False)
        self.once = nn.Linear(64, 64)
        self.again = self.once
        self.norm = nn.LayerNorm(64)
        self.post_init()

    def get_expanded_tied_weights_keys(self, all_submodels: bool = False) -> dict[str, str]:
        return dict(self._tied_weights_keys)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.again(self.once(self.second(self.first(x)))))


@pytest.mark.parametrize("scales", SCALES, ids=["tensor", "groups"])
def test_shared_modules_and_shared_weights(tmp_path: Path, scales: dict[str, Any]) -> None:
    config = LlamaConfig(hidden_size=64, tie_word_embeddings=True)
    model = TwoNames(config)
    del model.again
    model.save_pretrained(tmp_path / "float")
    x = torch.randn(3, 64)
    source = tmp_path / "float"
    latent, packed = (
        TwoNames.from_pretrained(source, quantization_config=BitLabConfig(mode=mode, **scales))
        for mode in ("auto", "infer")
    )
    replaced = replace_linear(TwoNames.from_pretrained(source), BitLabConfig(**scales))
    for result in (latent, packed, replaced):
        assert isinstance(result.first, BitLinear)
        assert isinstance(result.second, BitLinear)
        assert isinstance(result.once, BitLinear)
        assert result.once is result.again
        expected = result.eval()(x)
        if not result.once.is_deployed:
            assert torch.equal(result.train()(x), expected)
            deploy(result)
        assert torch.equal(result(x), expected)
        save(result, tmp_path / "deployed")
        stored = load_file(tmp_path / "deployed" / "model.safetensors")
        packed_keys = {key for key in stored if key.endswith(".qweight")}
        assert "once.qweight" in packed_keys
        # What is tied is stored once.
        again = TwoNames.from_pretrained(tmp_path / "deployed")
        for leaf in again.first.packed_tensors():
            assert len(stored.keys() & {f"first.{leaf}", f"second.{leaf}"}) == 1
            held = [getattr(layer, leaf) for layer in (again.first, again.second)]
            assert held[0].data_ptr() == held[1].data_ptr()
        assert again.once is again.again
        assert torch.equal(again(x), expected)


class Undeclared(LlamaPreTrainedModel):
    """Two Linears with one weight, of which transformers knows nothing."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.a = nn.Linear(64, 64)
        self.b = nn.Linear(64, 64)
        self.b.weight = self.a.weight
        self.norm = nn.LayerNorm(64)
        self.post_init()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.b(self.a(x)))


@pytest.mark.parametrize("scales", SCALES, ids=["tensor", "groups"])
def test_layers_that_share_one_weight_share_one_qweight(
    tmp_path: Path, scales: dict[str, Any]
) -> None:
    model = replace_linear(Undeclared(LlamaConfig(hidden_size=64)), BitLabConfig(**scales))
    assert model.a.weight is model.b.weight
    x = torch.randn(3, 64)
    expected = model.eval()(x)
    deploy(model)
    assert model.a.qweight is model.b.qweight
    assert torch.equal(model(x), expected)
    save(model, tmp_path)
    assert torch.equal(Undeclared.from_pretrained(tmp_path)(x), expected)


def test_a_compiled_model_deploys(source: Path, tmp_path: Path) -> None:
    model = load(source, BitLabConfig())
    expected = logits_of(model)
    deploy(torch.compile(model))
    save(model, tmp_path / "deployed")
    assert torch.equal(logits_of(load(tmp_path / "deployed")), expected)


def test_names_with_and_without_the_prefix(source: Path, tmp_path: Path) -> None:
    """What a causal model's configuration says of a layer holds for the base model too."""
    config = BitLabConfig(
        modules_to_not_convert=["model.layers.0.mlp.down_proj"],
        overrides={"model.layers.1.*": {"activation_granularity": "per_tensor"}},
    )
    model = load(source, config)
    expected = model.model(input_ids=token_ids()).last_hidden_state
    for state in ("latent", "deployed"):
        if state == "deployed":
            deploy(model)
        save(model, tmp_path / state)
        base = AutoModel.from_pretrained(tmp_path / state)
        assert type(base.layers[0].mlp.down_proj) is nn.Linear
        assert torch.equal(base(input_ids=token_ids()).last_hidden_state, expected)
    # And the other way: a base model's file in a causal model.
    save(base, tmp_path / "base")
    again = load(tmp_path / "base")
    assert type(again.lm_head) is nn.Linear
    assert torch.equal(again.model(input_ids=token_ids()).last_hidden_state, expected)


def test_an_override_that_matches_nothing_is_refused(source: Path) -> None:
    config = BitLabConfig(overrides={"q_proj": {"weight_granularity": "per_channel"}})
    with pytest.raises(ConfigError, match=r"'q_proj', which matches none"):
        load(source, config)


def test_ternary_heads_that_cannot_be(tmp_path: Path) -> None:
    tied = make_float_model("qwen2", tmp_path, torch.bfloat16)
    with pytest.raises(ConfigError, match="must be float32 with the embedding"):
        load(tied, BitLabConfig(head="ternary"))
    with pytest.raises(ConfigError, match="tied head must not be packed at load"):
        load(tied, BitLabConfig(head="ternary", mode="infer"))
    with pytest.raises(ConfigError, match='head="ternary" must find'):
        AutoModel.from_pretrained(tied, quantization_config=BitLabConfig(head="ternary"))


def test_from_config_builds_plain_linears_as_documented(deployed: Path) -> None:
    """transformers ignores the quantization config here; docs/layers.md says so."""
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(deployed))
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear


def test_registering_twice_changes_nothing() -> None:
    register()
    register()
