"""compressed-tensors folders: written, read back, and read by stock transformers in CI."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM, PreTrainedModel

from bitcore import unpack_ternary
from bitcore.errors import ArgumentError, ArgumentTypeError, CheckpointError, ConfigError
from bitlab_hf import (
    BitLabConfig,
    deploy,
    export_compressed_tensors,
    import_compressed_tensors,
    load_compressed_tensors,
    replace_linear,
    save,
)
from bitlab_hf.interop.compressed import pack_words, unpack_words
from bitlab_hf.model.tree import quantized_layers
from tests.bitlab_hf.interop.stock import ARCHITECTURES, outputs, rewrite_config, stock_outputs
from tests.processes import Elsewhere

LAYER = "model.layers.1.mlp.up_proj"
GROUPS = {"weight_granularity": "per_group", "group_size": 64}
SCHEMES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"weight_granularity": "per_channel"},
    "groups": GROUPS,
    "float_groups": {**GROUPS, "group_scale_dtype": "float32"},
    "mixed": {
        **GROUPS,
        "overrides": {"*.down_proj": {"weight_granularity": "per_channel", "group_size": None}},
    },
    "weights_alone": {**GROUPS, "activation_dtype": "float32"},
}


def latent(name: str) -> Any:
    """A float model, with two and three groups of 64 in a row."""
    small = ARCHITECTURES[name]()
    small.config.hidden_size, small.config.head_dim = 128, 32
    small.config.architectures = [type(small).__name__]
    torch.manual_seed(0)
    return type(small)(small.config)


def build(name: str = "llama", scheme: str = "groups", **changes: Any) -> PreTrainedModel:
    model = latent(name)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_()
    replace_linear(model, BitLabConfig(**{**SCHEMES[scheme], **changes}))
    return deploy(model)


def folder_of(tmp_path: Path, *given: Any, **options: Any) -> Path:
    export_compressed_tensors(build(*given, **options), tmp_path / "ct")
    return tmp_path / "ct"


def edited(folder: Path, **changes: Tensor | None) -> None:
    """Puts other tensors under ``LAYER``, or leaves some out."""
    tensors = load_file(folder / "model.safetensors")
    for leaf, tensor in changes.items():
        tensors.pop(f"{LAYER}.{leaf}", None)
        if tensor is not None:
            tensors[f"{LAYER}.{leaf}"] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("columns", [1, 3, 15, 16, 17, 33, 576])
def test_words(columns: int) -> None:
    """Code j of a row stands, plus 2, in bits 2 (j % 16) and the next of word j // 16."""
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (5, columns), dtype=torch.int8)
    words = pack_words(codes)
    assert words.dtype == torch.int32
    assert words.shape == (5, (columns + 15) // 16)
    for row in range(5):
        for at in range(columns):
            assert (int(words[row, at // 16]) >> 2 * (at % 16) & 3) - 2 == codes[row, at]
    # What no code stands in is 0.
    if columns % 16:
        assert bool(((words[:, -1].long() & 0xFFFFFFFF) >> 2 * (columns % 16) == 0).all())
    assert torch.equal(unpack_words(words, columns), codes)
    assert unpack_words(torch.zeros(1, 1, dtype=torch.int32), 3).tolist() == [[-2, -2, -2]]


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_round_trip(name: str, scheme: str, tmp_path: Path) -> None:
    model = build(name, scheme)
    assert export_compressed_tensors(model, tmp_path / "ct") == 0
    config = json.loads((tmp_path / "ct/config.json").read_text())["quantization_config"]
    assert config["quant_method"] == "compressed-tensors"
    stored = load_file(tmp_path / "ct/model.safetensors")
    for found in quantized_layers(model):
        layer, key = found.module, found.names[0]
        expected = layer.dequantized_weight(torch.float32)
        codes = unpack_words(stored[f"{key}.weight_packed"], layer.in_features)
        assert torch.equal(codes, unpack_ternary(layer.packed()[0], layer.out_features))
        assert stored[f"{key}.weight_shape"].tolist() == [layer.out_features, layer.in_features]
        scale = stored[f"{key}.weight_scale"]
        assert scale.dtype == torch.float32
        assert torch.equal(codes * scale.repeat_interleave(codes.shape[1] // scale.shape[1], 1),
                           expected)  # fmt: skip
    fields = SCHEMES[scheme]
    again = load_compressed_tensors(
        tmp_path / "ct",
        activation_dtype=fields.get("activation_dtype", "int8"),
        group_scale_dtype=fields.get("group_scale_dtype", "uint8"),
    )
    assert type(again) is type(model)
    for ours, theirs in zip(quantized_layers(model), quantized_layers(again), strict=True):
        assert ours.names == theirs.names
        for before, after in zip(ours.module.packed(), theirs.module.packed(), strict=True):
            assert torch.equal(before, after)
    assert torch.equal(outputs(again)["logits"], outputs(model)["logits"])


def test_configuration(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, "llama", "mixed")
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    weights = {"num_bits": 2, "type": "int", "symmetric": True, "dynamic": False}
    inner = {"input_activations": None, "output_activations": None}
    named = [f"model.layers.{block}.mlp.down_proj" for block in (0, 1)]
    assert config["config_groups"] == {
        "group_0": {
            "targets": named,
            "weights": {**weights, "strategy": "channel", "group_size": None}, **inner,
        },
        "group_1": {
            "targets": ["Linear"],
            "weights": {**weights, "strategy": "group", "group_size": 64}, **inner,
        },
    }  # fmt: skip
    assert config["ignore"] == ["lm_head"]
    assert config["format"] == "pack-quantized"
    assert config["quantization_status"] == "compressed"


def test_latent_models_and_parts(tmp_path: Path) -> None:
    model = latent("qwen2")
    replace_linear(model, BitLabConfig(**GROUPS))
    model.to(torch.bfloat16).eval()
    change = export_compressed_tensors(model, tmp_path / "ct", max_shard_size="30KB")
    # What a reader that computes in bfloat16 makes of the scales.
    assert 0 < change <= 2**-8
    assert not quantized_layers(model)[0].module.is_deployed
    assert len(list((tmp_path / "ct").glob("model-*.safetensors"))) > 2
    given: list[int] = []
    assert import_compressed_tensors(tmp_path / "ct", tmp_path / "back", advance=given.append) == 0
    assert sum(given) > 10_000
    assert (tmp_path / "back/README.md").exists()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "back")
    assert again.config.quantization_config.activation_dtype == "float32"
    assert again.dtype == torch.bfloat16
    for ours, theirs in zip(quantized_layers(model), quantized_layers(again), strict=True):
        expected = ours.module.dequantized_weight(torch.float32)
        assert torch.equal(theirs.module.dequantized_weight(torch.float32), expected)


def test_int8_activations_of_a_checkpoint(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    inputs = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    config["config_groups"]["group_0"]["input_activations"] = inputs
    rewrite_config(folder, config_groups=config["config_groups"])
    assert load_compressed_tensors(folder).config.quantization_config.activation_dtype == "int8"
    config["config_groups"]["group_0"]["input_activations"] = {**inputs, "dynamic": False}
    rewrite_config(folder, config_groups=config["config_groups"])
    with pytest.raises(ConfigError, match="input_activations must be None or symmetric"):
        load_compressed_tensors(folder)


def test_a_code_of_minus_two_is_refused(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    words = load_file(folder / "model.safetensors")[f"{LAYER}.weight_packed"]
    words[7, 2] &= ~(3 << 10)
    edited(folder, weight_packed=words)
    with pytest.raises(CheckpointError) as error:
        import_compressed_tensors(folder, tmp_path / "out")
    assert f"{LAYER}.weight_packed must hold codes of -1, 0 and 1, got -2" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"weight_scale": None}, "weight_scale must be in the checkpoint, got none"),
        ({"weight_shape": None}, "weight_shape must be in the checkpoint, got none"),
        ({"weight_packed": None}, "weight must be in the checkpoint, got none"),
        ({"weight_shape": torch.tensor([192, 144])}, "weight_packed must be I32 .* got I32"),
        ({"weight_shape": torch.tensor([192])}, "weight_packed must be I32"),
        ({"weight_packed": torch.zeros(192, 8)}, "must be I32 .* got F32"),
        ({"weight_scale": torch.ones(192, 3)}, "weight_scale must be .* got \\[192, 3\\]"),
        ({"weight_scale": torch.ones(64, 1)}, "weight_scale must be .* got \\[64, 1\\]"),
        ({"weight_scale": torch.ones(192, 1).int()}, "weight_scale must be a tensor of F32"),
        ({"weight_scale": torch.full((192, 1), torch.nan)}, "weight must have finite scales"),
        ({"weight_g_idx": torch.zeros(64).int()}, "must be one that LlamaForCausalLM has, got"),
        (
            {"weight_packed": torch.full((192, 5), -1431655766).int(),
             "weight_shape": torch.tensor([192, 80]), "weight_scale": torch.ones(192, 1)},
            "weight must be of shape",
        ),
    ],
)  # fmt: skip
def test_damaged_tensors(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    edited(folder, **changes)
    with pytest.raises(CheckpointError, match=message):
        import_compressed_tensors(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant_method": "gptq"}, "quant_method must be 'compressed-tensors', got 'gptq'"),
        ({"format": "int-quantized"}, "format must be 'pack-quantized', got 'int-quantized'"),
        ({"quantization_status": "frozen"}, "quantization_status must be 'compressed'"),
        ({"transform_config": {"config_groups": {"R1": {}}}}, "transform_config must be empty"),
        ({"kv_cache_scheme": {"num_bits": 8}}, "kv_cache_scheme must be empty"),
        ({"config_groups": {}}, "config_groups must hold schemes"),
        ({"config_groups": {"group_0": ["Linear"]}}, "config_groups must hold schemes"),
    ],
)
def test_other_checkpoints(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    rewrite_config(folder, **changes)
    with pytest.raises(ConfigError, match=message):
        import_compressed_tensors(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_bits": 4}, "weights must be of 2 bits, got 4"),
        ({"type": "float"}, "weights must be of 2 bits, got 2 of the type 'float'"),
        ({"symmetric": False}, "weights must be symmetric"),
        ({"actorder": "group"}, "actorder must be None"),
    ],
)
def test_other_weights(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    config = json.loads((folder / "config.json").read_text())["quantization_config"]
    config["config_groups"]["group_0"]["weights"].update(changes)
    rewrite_config(folder, config_groups=config["config_groups"])
    with pytest.raises(ConfigError, match=message):
        import_compressed_tensors(folder, tmp_path / "out")


def test_other_refusals(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="must be a transformers PreTrainedModel"):
        export_compressed_tensors(nn.Linear(4, 4), tmp_path / "ct")  # type: ignore[arg-type]
    plain: LlamaForCausalLM = latent("llama")
    with pytest.raises(ArgumentError, match="model must hold quantized layers, got none"):
        export_compressed_tensors(plain, tmp_path / "ct")
    with pytest.raises(ArgumentError, match="lm_head must be a BitLinear or a plain module"):
        export_compressed_tensors(build(head="int8"), tmp_path / "ct")
    save(build(), tmp_path / "ours")
    with pytest.raises(ConfigError, match="got 'bitlab'"):
        import_compressed_tensors(tmp_path / "ours", tmp_path / "out")
    folder = folder_of(tmp_path)
    with pytest.raises(ArgumentError, match="directory must not be the source"):
        import_compressed_tensors(folder, folder)
    with pytest.raises(ArgumentError, match="group_scale_dtype must be one of"):
        import_compressed_tensors(folder, tmp_path / "out", group_scale_dtype="int8")


@pytest.mark.ci
@pytest.mark.parametrize(
    ("name", "scheme"),
    [("llama", "groups"), ("qwen2", "mixed"), ("bitnet", "tensor"), ("tied", "groups")],
)
def test_stock_transformers(name: str, scheme: str, stock: Elsewhere, tmp_path: Path) -> None:
    """The real reader, without BitLab: the same float32 weights, and logits bit for bit."""
    model: Any = build(name, scheme)
    export_compressed_tensors(model, tmp_path / "ct")
    expected = stock_outputs(stock, tmp_path / "ct", tmp_path)
    ours = outputs(model.dequantize())
    assert torch.equal(expected["logits"], ours["logits"])
    assert torch.equal(expected["tokens"], ours["tokens"])
