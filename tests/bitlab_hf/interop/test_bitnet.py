"""Stock bitnet checkpoints in, and exports that stock transformers loads without BitLab."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.integrations.bitnet import ActQuant, WeightQuant, unpack_weights
from transformers.integrations.bitnet import BitLinear as StockBitLinear

from bitcore import quantize, unpack_ternary
from bitcore.errors import ArgumentError, ArgumentTypeError, CheckpointError, ConfigError
from bitlab_hf import BitLabConfig, deploy, export_bitnet, load_bitnet, replace_linear, save
from bitlab_hf.model.tree import quantized_layers
from bitlayers import BitLinear, RMSNormBitLinear
from tests.bitlab_hf.interop.stock import (
    ROOT,
    build,
    outputs,
    rewrite_config,
    stock_outputs,
    token_ids,
)
from tests.processes import Elsewhere

DEMO = ROOT / "bitlab_hf/demo/model"
OFFLINE = {"linear_class": "autobitlinear", "quantization_mode": "offline"}
ONLINE = {"linear_class": "autobitlinear", "quantization_mode": "online"}
KINDS: dict[str, dict[str, Any]] = {
    "bitlinear": {},
    "autobitlinear": OFFLINE,
    "rms_norm": {"use_rms_norm": True},
    "autobitlinear_rms_norm": {**OFFLINE, "use_rms_norm": True},
}
LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(autouse=True)
def _eager() -> Any:
    """Stock's functions are compiled at import; compiling them takes longer than the tests."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def assert_close_to_stock(model: PreTrainedModel, stock: dict[str, Tensor]) -> None:
    ours = outputs(model)
    assert torch.isfinite(ours["logits"]).all()
    torch.testing.assert_close(ours["logits"], stock["logits"], atol=1e-4, rtol=0)
    assert torch.equal(ours["tokens"], stock["tokens"])


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["bitnet", "llama"])
def test_import_of_packed(kind: str, name: str, tmp_path: Path) -> None:
    folder = build(name, tmp_path / "stock", **KINDS[kind])
    model = load_bitnet(folder)
    layers = quantized_layers(model)
    assert len(layers) == 14
    stored = load_file(folder / "model.safetensors")
    for found in layers:
        layer = found.module
        assert layer.is_deployed
        packed, scale = stored[f"{found.names[0]}.weight"], stored[f"{found.names[0]}.weight_scale"]
        assert torch.equal(layer.qweight, packed)
        codes = unpack_ternary(layer.qweight, layer.out_features)
        assert torch.equal(codes.float(), unpack_weights(packed, torch.float32))
        divides = KINDS[kind].get("linear_class", "bitlinear") == "bitlinear"
        assert torch.equal(layer.qweight_scale, 1 / scale if divides else scale)
    assert isinstance(layers[0].module, RMSNormBitLinear) == ("rms_norm" in kind)
    stock: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert_close_to_stock(model, outputs(stock))
    # It is BitLab's from here on.
    save(model, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(outputs(again)["logits"], outputs(model)["logits"])
    assert again.config.quantization_config.quant_method == "bitlab"


def test_import_with_biases_and_sixteen_bits(tmp_path: Path) -> None:
    folder = build("qwen2", tmp_path / "stock", torch.bfloat16)
    model = load_bitnet(folder)
    assert model.dtype == torch.bfloat16
    layer = quantized_layers(model)[0].module
    assert layer.qweight_scale.dtype == torch.float32
    assert layer.bias.dtype == torch.bfloat16
    exact = load_bitnet(folder, dtype=torch.float32)
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert_close_to_stock(exact, outputs(stock))


def test_tied_head_and_other_classes(tmp_path: Path) -> None:
    folder = build("tied", tmp_path / "stock", **OFFLINE)
    model = load_bitnet(folder)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight is model.get_input_embeddings().weight
    base = load_bitnet(folder, auto_class=AutoModel)
    assert len(quantized_layers(base)) == 14
    classifier_folder = build("llama", tmp_path / "llama")
    classifier = load_bitnet(classifier_folder, auto_class=AutoModelForSequenceClassification)
    assert type(classifier.score) is nn.Linear
    assert len(quantized_layers(classifier)) == 14


def test_import_of_latent(tmp_path: Path) -> None:
    folder = build("bitnet", tmp_path / "stock", torch.bfloat16, **ONLINE)
    model = load_bitnet(folder)
    stored = load_file(folder / "model.safetensors")
    for found in quantized_layers(model):
        layer = found.module
        assert not layer.is_deployed
        weight = stored[f"{found.names[0]}.weight"].float()
        assert layer.weight.dtype == torch.float32
        assert torch.equal(layer.weight, weight)
        codes = unpack_ternary(layer.eval().qweight, layer.out_features)
        assert torch.equal(codes.float(), WeightQuant.apply(weight).sign())
    model.train()(input_ids=token_ids(), labels=token_ids()).loss.backward()
    assert quantized_layers(model)[0].module.weight.grad.abs().sum() > 0
    model.eval()
    stock: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    exact = load_bitnet(folder, dtype=torch.float32)
    assert_close_to_stock(exact, outputs(stock))
    packed = load_bitnet(folder, dtype=torch.float32, mode="infer")
    assert torch.equal(outputs(packed)["logits"], outputs(exact)["logits"])
    assert torch.equal(outputs(deploy(exact))["logits"], outputs(packed)["logits"])
    save(packed, tmp_path / "ours")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(outputs(again)["logits"], outputs(packed)["logits"])


@pytest.mark.parametrize("scale", [1e-7, 1.0, 300.0])
def test_activation_codes_are_stock_codes(scale: float) -> None:
    x = torch.randn(33, 65) * scale
    x[3] = 0
    x[4, 0], x[4, 1:] = 1.0, 2.5 / 127
    codes, scales = quantize.quantize_activation(x, per_tensor=False)
    # Stock returns codes divided by 127 / max: its codes come back by the same factor.
    factor = 127 / x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    assert torch.equal(codes.float(), (ActQuant.apply(x.clone()) * factor).round())
    assert scales.shape == (33, 1)


def test_import_is_memory_mapped(tmp_path: Path) -> None:
    folder = build("llama", tmp_path / "stock")
    model = load_bitnet(folder)
    ranges = [
        tuple(int(part, 16) for part in line.split()[0].split("-"))
        for line in Path("/proc/self/maps").read_text().splitlines()
        if line.endswith(str(folder / "model.safetensors"))
    ]
    assert ranges
    for found in quantized_layers(model):
        address = found.module.qweight.data_ptr()
        assert any(start <= address < end for start, end in ranges)


@pytest.mark.parametrize("state", ["latent", "deployed"])
@pytest.mark.parametrize(
    "name",
    [
        "llama",
        *(pytest.param(name, marks=pytest.mark.ci) for name in ("bitnet", "qwen2", "rms_norm")),
    ],
)
def test_export(name: str, state: str, tmp_path: Path, stock: Elsewhere) -> None:
    source = build("llama" if name == "rms_norm" else name, tmp_path / "source", **ONLINE,
                   use_rms_norm=name == "rms_norm")  # fmt: skip
    model = load_bitnet(source, mode="auto" if state == "latent" else "infer")
    before = {key: value.clone() for key, value in model.state_dict().items()}
    config = model.config.to_dict()
    export_bitnet(model, tmp_path / "exported")
    # The model is as it was.
    assert model.config.to_dict() == config
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert (getattr(model, "hf_quantizer", None) is not None) == (state == "deployed")
    assert_close_to_stock(model, stock_outputs(stock, tmp_path / "exported", tmp_path))
    # No card of BitLab's in a folder that needs no BitLab; and the way back.
    assert not (tmp_path / "exported/README.md").exists()
    again = load_bitnet(tmp_path / "exported")
    for ours, theirs in zip(quantized_layers(model), quantized_layers(again), strict=True):
        assert torch.equal(ours.module.packed()[0], theirs.module.packed()[0])


def test_export_of_the_demo_model(tmp_path: Path, stock: Elsewhere) -> None:
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, quantization_config=BitLabConfig(mode="infer")
    )
    export_bitnet(
        model,
        tmp_path / "exported",
        tokenizer=AutoTokenizer.from_pretrained(DEMO),
        max_shard_size="2MB",
    )
    assert len(list((tmp_path / "exported").glob("model-*.safetensors"))) > 1
    assert (tmp_path / "exported/tokenizer.json").exists()
    # Its logits differ where an activation falls on the other side of a half: see the next test.
    ours, expected = outputs(model), stock_outputs(stock, tmp_path / "exported", tmp_path)
    assert torch.equal(ours["tokens"], expected["tokens"])
    with safe_open(next((tmp_path / "exported").glob("model-*.safetensors")), "pt") as file:
        assert "bitlab_layers" not in (file.metadata() or {})


def test_layers_of_the_demo_model_equal_stock_ones_on_the_same_input() -> None:
    """Codes may differ by one, rarely: stock rounds the factor 127 / max twice. With equal codes
    only the rounding of float32 is left.
    """
    model = AutoModelForCausalLM.from_pretrained(
        DEMO, dtype=torch.float32, quantization_config=BitLabConfig(mode="infer")
    )
    calls: list[tuple[BitLinear, Tensor, Tensor]] = []
    for layer in model.modules():
        if isinstance(layer, BitLinear):
            layer.register_forward_hook(lambda layer, x, y: calls.append((layer, x[0], y)))
    codes = differing = 0
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model(torch.randint(0, 1000, (2, 60)))
        for layer, x, y in calls:
            stock = StockBitLinear(layer.in_features, layer.out_features, False, dtype=x.dtype)
            stock.weight, stock.weight_scale = layer.qweight.data, 1 / layer.qweight_scale
            stock_codes, _ = stock.activation_quant(x)
            own_codes, _ = torch.ops.bitlab.quantize_activation(x, False)
            difference = (stock_codes.int() - own_codes.int()).abs()
            assert difference.max() <= 1
            codes, differing = codes + difference.numel(), differing + int(difference.sum())
            equal = difference.amax(-1) == 0
            error = (stock(x) - y).abs().amax(-1)[equal]
            assert bool((error <= y.abs().amax(-1)[equal] * 2.0**-20).all())
    assert len(calls) == 42
    assert differing <= codes * 1e-5


def test_export_of_shared_weights(tmp_path: Path) -> None:
    """Two layers of one weight: each has its own in the file."""
    source = build("llama", tmp_path / "source", **ONLINE)
    model: Any = AutoModelForCausalLM.from_pretrained(source, config=_float_config(source))
    first, second = (layer.mlp for layer in model.model.layers)
    second.up_proj.weight = first.up_proj.weight
    second.gate_proj = first.gate_proj
    deploy(replace_linear(model))
    export_bitnet(model, tmp_path / "exported")
    tensors = load_file(tmp_path / "exported/model.safetensors")
    for leaf in ("up_proj", "gate_proj"):
        names = [f"model.layers.{layer}.mlp.{leaf}.weight" for layer in (0, 1)]
        assert torch.equal(tensors[names[0]], tensors[names[1]])
    assert torch.equal(
        outputs(load_bitnet(tmp_path / "exported"))["logits"], outputs(model)["logits"]
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear_class": "bitlinears"}, "linear_class must be one of"),
        ({"quantization_mode": "sometimes"}, "quantization_mode must be one of"),
        ({"quant_method": "gptq"}, "quant_method must be 'bitnet', got 'gptq'"),
        ({"quant_method": "bitlab"}, "Load it with from_pretrained"),
        ({"use_rms_norm": True, "rms_norm_eps": 1e-5}, "rms_norm_eps must be 1e-06"),
    ],
)
def test_unknown_fields(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    rewrite_config(folder, **fields)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_bitnet(folder)


def test_no_quantization(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quant_method 'bitnet', got none"):
        load_bitnet(DEMO)


@pytest.mark.parametrize(
    ("built", "said", "message"),
    [
        ({}, OFFLINE, "linear_class must be what the scales mean, got 'autobitlinear'"),
        (OFFLINE, {"linear_class": "bitlinear"}, "Set linear_class='autobitlinear'"),
        ({}, ONLINE, "must be float with quantization_mode='online'"),
        (ONLINE, OFFLINE, "must be packed uint8 in the checkpoint, got float F32"),
        ({}, {"modules_to_not_convert": ["lm_head", "up_proj"]}, "up_proj must not be in"),
        (OFFLINE, {"modules_to_not_convert": []}, "lm_head.weight must be packed uint8"),
    ],
)
def test_configurations_that_lie(
    built: dict[str, Any], said: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = build("llama", tmp_path, **built)
    rewrite_config(folder, **said)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load_bitnet(folder)


def test_a_lie_can_be_the_truth(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    rewrite(folder, lambda tensors: [
        tensors[key].mul_(1e-3) for key in tensors if key.endswith("weight_scale")
    ])  # fmt: skip
    with pytest.raises(CheckpointError, match="pass verify=False"):
        load_bitnet(folder)
    assert quantized_layers(load_bitnet(folder, verify=False))[0].module.qweight_scale > 1


def test_damaged_files(tmp_path: Path) -> None:
    folder = build("llama", tmp_path)
    good = load_file(folder / "model.safetensors")

    def damaged(change: Callable[[dict[str, Tensor]], Any], message: str) -> None:
        save_file(dict(good), folder / "model.safetensors", {"format": "pt"})
        rewrite(folder, change)
        with pytest.raises(CheckpointError, match=re.escape(message)):
            load_bitnet(folder)

    damaged(lambda t: t.pop(f"{LAYER}.weight_scale"), f"{LAYER}.weight_scale must be in the")
    damaged(lambda t: t.pop(f"{LAYER}.weight"), f"{LAYER}.weight must be packed uint8")
    damaged(
        lambda t: t.update({f"{LAYER}.weight": torch.zeros(47, 64, dtype=torch.uint8)}),
        f"{LAYER}.qweight must be uint8 [48, 64]",
    )
    damaged(
        lambda t: t.update({f"{LAYER}.weight": torch.zeros(192, 64)}),
        f"{LAYER}.weight must be packed uint8 with quantization_mode='offline', got F32",
    )
    damaged(lambda t: t[f"{LAYER}.weight"].fill_(255), f"{LAYER}.qweight must hold the codes")
    damaged(
        lambda t: t.update({f"{LAYER}.weight_scale": torch.ones(2)}),
        f"{LAYER}.qweight_scale must be float32 [1]",
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_granularity": "per_channel"}, "one scale for the matrix, got per_channel"),
        ({"weight_granularity": "per_group", "group_size": 64}, "got per_group scales"),
        ({"activation_dtype": "float32"}, "int8 per token, got float"),
        ({"activation_granularity": "per_tensor"}, "int8 per token, got int8_per_tensor"),
    ],
)
def test_schemes_that_bitnet_cannot_express(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    source = build("llama", tmp_path / "source", **ONLINE)
    model = AutoModelForCausalLM.from_pretrained(source, config=_float_config(source))
    replace_linear(model, BitLabConfig(**fields))
    with pytest.raises(ArgumentError, match=message) as error:
        export_bitnet(model, tmp_path / "out")
    assert "Use bitlab_hf.save, or model.dequantize()" in str(error.value)
    assert not (tmp_path / "out").exists()


def _float_config(folder: Path) -> Any:
    config = AutoConfig.from_pretrained(folder)
    del config.quantization_config
    return config


def test_other_models_that_bitnet_cannot_express(tmp_path: Path) -> None:
    with pytest.raises(ArgumentTypeError, match="must be a transformers PreTrainedModel"):
        export_bitnet(nn.Linear(4, 4), tmp_path / "out")  # type: ignore[arg-type]
    source = build("llama", tmp_path / "source", **ONLINE)
    plain = AutoModelForCausalLM.from_pretrained(source, config=_float_config(source))
    with pytest.raises(ArgumentError, match="must hold quantized layers, got none"):
        export_bitnet(plain, tmp_path / "out")
    model = load_bitnet(source)
    model.extra = nn.Linear(4, 4)
    model.extra.register_buffer("qweight", torch.zeros(1))
    with pytest.raises(ArgumentError, match="extra must be a BitLinear or a plain module"):
        export_bitnet(model, tmp_path / "out")
    del model.extra
    odd = nn.Linear(64, 97)
    model.lm_head = odd
    replace_linear(model, BitLabConfig(head="ternary"))
    with pytest.raises(ArgumentError, match="lm_head must have a multiple of 4 outputs, got 97"):
        export_bitnet(model, tmp_path / "out")
