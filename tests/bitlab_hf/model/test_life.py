"""The whole path of four architectures: from_pretrained, Trainer, deploy, save, a fresh process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, Trainer, TrainingArguments

from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.fresh import COMBINATIONS, fresh_outputs, outputs_of
from tests.bitlab_hf.models import CONFIGS, auto_class, logits_of, make_float_model, training_data

SCALES = [{}, {"weight_granularity": "per_group", "group_size": 64}]


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    values = {
        "output_dir": str(folder / "trainer"),
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_strategy": "no",
    }
    return TrainingArguments(**{**values, **changes})


def train(model: PreTrainedModel, folder: Path, **changes: Any) -> Trainer:
    trainer = Trainer(model=model, args=arguments(folder, **changes), train_dataset=training_data())
    trainer.train()
    return trainer


def assert_same(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    """Equal for each thread count; native and reference equal each other."""
    assert set(first) == set(second)
    for key in first:
        threads = key.split()[1]
        for backend in ("cpu", "reference"):
            other = f"{key.split()[0]} {threads} {backend}"
            assert torch.equal(first[key], second[other]), (key, other)


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_whole_path(name: str, tmp_path: Path) -> None:
    source = make_float_model(name, tmp_path)
    model = auto_class(name).from_pretrained(source, quantization_config=BitLabConfig())
    float_keys = set(load_file(source / "model.safetensors"))
    before = logits_of(model)
    train(model, tmp_path)

    assert not torch.equal(before, logits_of(model.eval()))
    evaluated = outputs_of(model.eval())
    # One more step between two evaluations: no stale packed weights.
    train(model, tmp_path, max_steps=1)
    trained = outputs_of(model.train())
    again = outputs_of(model.eval())
    assert not torch.equal(evaluated["logits 1 cpu"], again["logits 1 cpu"])
    for threads, backend in COMBINATIONS:
        key = f"logits {threads} {backend}"
        assert torch.equal(trained[key], again[key])

    # Latent keys are the float checkpoint's, in both modes.
    for mode in (True, False):
        model.train(mode)
        save(model, tmp_path / "latent")
        assert set(load_file(tmp_path / "latent" / "model.safetensors")) == float_keys

    deploy(model)
    assert_same(again, outputs_of(model))
    save(model, tmp_path / "deployed")
    assert_same(again, fresh_outputs(tmp_path / "deployed", name))

    check_file(model, tmp_path / "deployed" / "model.safetensors")


def check_file(model: PreTrainedModel, file: Path) -> None:
    """qweight and scale of every converted layer, the sentinel, no latent weight, and the size."""
    tensors = load_file(file)
    layers = quantized_layers(model)
    packed = bf16 = 0
    for found in layers:
        name, layer = found.names[0], found.module
        assert tensors[f"{name}.qweight"].dtype == torch.uint8
        assert tensors[f"{name}.qweight_scale"].dtype == torch.float32
        assert isinstance(layer.in_features, int)
        packed += tensors[f"{name}.qweight"].nbytes + tensors[f"{name}.qweight_scale"].nbytes
        bf16 += layer.in_features * layer.out_features * 2
    assert packed <= 0.13 * bf16
    latent = {name for f in layers for name in (f"{n}.weight" for n in f.names) if name in tensors}
    assert latent == {f"{layers[0].names[0]}.weight"}
    assert tensors[latent.pop()].shape == (0,)
    with safe_open(file, framework="pt") as handle:
        assert "bitlab_layers" in handle.metadata()


def test_bf16_model_trains_deploys_and_reloads(tmp_path: Path) -> None:
    """In bf16 the latent weights are float32, outputs bf16, and the reloaded logits equal."""
    source = make_float_model("llama", tmp_path, torch.bfloat16)
    model = auto_class("llama").from_pretrained(source, quantization_config=BitLabConfig())
    layer = model.model.layers[0].mlp.up_proj
    assert layer.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.bfloat16
    train(model, tmp_path)
    expected = logits_of(model.eval())
    assert expected.dtype == torch.bfloat16
    deploy(model)
    assert torch.equal(logits_of(model), expected)
    save(model, tmp_path / "deployed")
    again = auto_class("llama").from_pretrained(tmp_path / "deployed")
    assert again.model.layers[0].mlp.up_proj.qweight_scale.dtype == torch.float32
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"weight_granularity": "per_channel"},
        {"weight_granularity": "per_group", "group_size": 64},
        {"weight_granularity": "per_group", "group_size": 64, "group_scale_dtype": "float32"},
        {"weight_granularity": "per_group", "group_size": 64, "activation_dtype": "float32"},
        {"weight_granularity": "per_group", "group_size": 64, "head": "ternary"},
        {"activation_dtype": "float32"},
        {"activation_granularity": "per_tensor"},
        {"overrides": {"*.down_proj": {"weight_granularity": "per_channel"}}},
        {"overrides": {"*.down_proj": {"weight_granularity": "per_group", "group_size": 64}}},
        {"head": "ternary"},
        {"modules_to_not_convert": ["q_proj"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_scheme_goes_round(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    source = make_float_model(name, tmp_path)
    config = BitLabConfig(**fields)
    given = config.to_dict()
    model = auto_class(name).from_pretrained(source, quantization_config=config)
    assert config.to_dict() == given, "the caller's configuration was changed"
    train(model, tmp_path, max_steps=1)
    expected = logits_of(model.eval())
    deploy(model)
    assert torch.equal(logits_of(model), expected)
    save(model, tmp_path / "deployed")
    again = auto_class(name).from_pretrained(tmp_path / "deployed")
    assert torch.equal(logits_of(again), expected)
    layer = again.model.layers[1].mlp.down_proj
    assert layer.quant_config == model.config.quantization_config.layer_config(
        "model.layers.1.mlp.down_proj"
    )


def test_sharded_files(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    model = auto_class("llama").from_pretrained(source, quantization_config=BitLabConfig())
    expected = logits_of(model.eval())
    for state in ("latent", "deployed"):
        if state == "deployed":
            deploy(model)
        save(model, tmp_path / state, max_shard_size="40KB")
        assert len(list((tmp_path / state).glob("*.safetensors"))) > 1
        again = auto_class("llama").from_pretrained(tmp_path / state)
        assert torch.equal(logits_of(again), expected)
    # Over the very files that the model is mapped from.
    save(again, tmp_path / "deployed")
    assert [f.name for f in (tmp_path / "deployed").glob("*.safetensors")] == ["model.safetensors"]
    assert torch.equal(
        logits_of(auto_class("llama").from_pretrained(tmp_path / "deployed")), expected
    )


@pytest.mark.parametrize("scales", SCALES, ids=["tensor", "groups"])
def test_generate_with_a_static_cache_and_compiled(tmp_path: Path, scales: dict[str, Any]) -> None:
    source = make_float_model("llama", tmp_path)
    model = auto_class("llama").from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer", **scales)
    )
    ids = torch.arange(8)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_device_map_auto(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    expected = None
    for mode in ("auto", "infer"):
        model = auto_class("llama").from_pretrained(
            source, quantization_config=BitLabConfig(mode=mode), device_map="auto"
        )
        logits = logits_of(model)
        expected = logits if expected is None else expected
        assert torch.equal(logits, expected)
    save(model, tmp_path / "deployed")
    again = auto_class("llama").from_pretrained(tmp_path / "deployed", device_map="auto")
    assert torch.equal(logits_of(again), expected)


@pytest.mark.parametrize("scales", SCALES, ids=["tensor", "groups"])
def test_packed_layers_offload_to_disk(tmp_path: Path, scales: dict[str, Any]) -> None:
    source = make_float_model("llama", tmp_path)
    model = auto_class("llama").from_pretrained(
        source, quantization_config=BitLabConfig(mode="infer", **scales)
    )
    expected = logits_of(model)
    save(model, tmp_path / "deployed")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "cpu"}  # fmt: skip
    for buffers in (False, True):
        again = auto_class("llama").from_pretrained(
            tmp_path / "deployed",
            device_map=places,
            offload_folder=tmp_path / "offload",
            offload_buffers=buffers,
        )
        for _ in range(2):
            assert torch.equal(logits_of(again), expected)
            # Brought in for a pass, and out again.
            layer = again.model.layers[0].mlp.up_proj
            first, *scales_of = [getattr(layer, name).is_meta for name in layer.packed_tensors()]
            assert first
            assert scales_of == [buffers] * len(scales_of)


@pytest.mark.parametrize("scales", SCALES, ids=["tensor", "groups"])
def test_dequantize_is_exactly_code_times_scale(tmp_path: Path, scales: dict[str, Any]) -> None:
    source = make_float_model("qwen2", tmp_path)
    scheme = BitLabConfig(mode="infer", activation_dtype="float32", **scales)
    model = auto_class("qwen2").from_pretrained(source, quantization_config=scheme)
    expected = logits_of(model)
    weights = {f.names[0]: f.module.dequantized_weight() for f in quantized_layers(model)}
    codes = {f.names[0]: f.module for f in quantized_layers(model)}
    model = model.dequantize()
    for name, weight in weights.items():
        linear = model.get_submodule(name)
        assert type(linear) is torch.nn.Linear
        assert torch.equal(linear.weight, weight)
        if not scales:
            values = set(torch.unique(linear.weight).tolist())
            scale = codes[name].qweight_scale.item()
            assert values == {-scale, 0.0, scale}
        assert linear.weight.requires_grad
    assert torch.equal(logits_of(model), expected)
    model.save_pretrained(tmp_path / "float")
    assert torch.equal(logits_of(auto_class("qwen2").from_pretrained(tmp_path / "float")), expected)
