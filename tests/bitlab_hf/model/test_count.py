"""A packed model says how many weights it has, whoever asks, and how many bytes it holds."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, PeftMixedModel, get_peft_model
from torch import nn
from transformers import AutoModel, AutoModelForCausalLM

from bitcore.errors import ArgumentError
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlab_hf.model.count import bits_per_weight
from bitlab_hf.quantizer import BitLabHfQuantizer
from bitlayers.bitlinear import BitLinear
from tests.bitlab_hf.models import make_float_model

GROUPS: dict[str, Any] = {"weight_granularity": "per_group", "group_size": 64}
COUNTS = [{}, {"exclude_embeddings": True}, {"only_trainable": True}]


@pytest.fixture(scope="module", params=["llama", "qwen2", "gemma"])
def source(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Rows that are no multiple of four: the last packed row has codes of nothing.
    return make_float_model(request.param, tmp_path_factory.mktemp("float"), intermediate_size=190)


def packed(path: Path, **fields: Any) -> Any:
    config = BitLabConfig(mode="infer", **fields)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@pytest.mark.parametrize("head", ["keep", "int8"])
def test_counts_are_the_float_models(source: Path, tmp_path: Path, head: str) -> None:
    stock = AutoModelForCausalLM.from_pretrained(source)
    model = packed(source, head=head)
    save(model, tmp_path)
    latent = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(head=head)
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    copied, pickled = copy.deepcopy(loaded), pickle.loads(pickle.dumps(loaded))
    for one in (model, loaded, copied, pickled, deploy(latent), deploy(replace_linear(stock))):
        whole = AutoModelForCausalLM.from_pretrained(source)
        for part, same in ((one, whole), (one.base_model, whole.base_model)):
            for kind in COUNTS[:2]:
                assert part.num_parameters(**kind) == same.num_parameters(**kind), kind
            trained = [p.numel() for p in part.parameters() if p.requires_grad]
            assert part.num_parameters(only_trainable=True) == sum(trained)
        tensors = [*one.parameters(), *one.buffers()]
        assert one.get_memory_footprint() == sum(t.numel() * t.element_size() for t in tensors)
    assert copied.num_parameters._model() is copied
    assert pickled.num_parameters._model() is pickled


def test_a_base_model_and_a_dequantized_one(source: Path, tmp_path: Path) -> None:
    whole = AutoModelForCausalLM.from_pretrained(source)
    save(packed(source), tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    assert base.num_parameters() == whole.base_model.num_parameters()
    assert packed(source).dequantize().num_parameters() == whole.num_parameters()


def test_the_count_keeps_no_model_alive(source: Path) -> None:
    model = packed(source)
    alive = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert alive() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("head", ["keep", "int8"])
def test_pefts_count(source: Path, head: str, mixed: bool) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "down_proj"])
    counts = []
    for base in (AutoModelForCausalLM.from_pretrained(source), packed(source, head=head)):
        model = PeftMixedModel(base, config) if mixed else get_peft_model(base, config)
        counts.append(model.get_nb_trainable_parameters())
        assert counts[0][1] - counts[0][0] == counts[-1][1] - counts[-1][0]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("fields", "bits"),
    [
        # Without down_proj every matrix has 64 inputs.
        (
            {"weight_granularity": "per_channel", "modules_to_not_convert": ["down_proj"]},
            2 + 32 / 64,
        ),
        (
            {**GROUPS, "modules_to_not_convert": ["down_proj"]},
            2 + 8 / 64 + 32 / 64,
        ),
    ],
)
def test_bits_of_a_weight(tmp_path: Path, fields: dict[str, Any], bits: float) -> None:
    float_path = make_float_model("llama", tmp_path)
    latent = AutoModelForCausalLM.from_pretrained(
        float_path, quantization_config=BitLabConfig(**fields)
    )
    assert bits_per_weight(latent) == bits
    assert bits_per_weight(deploy(latent)) == bits
    save(latent, tmp_path / "packed")
    assert bits_per_weight(AutoModelForCausalLM.from_pretrained(tmp_path / "packed")) == bits


def test_bits_of_a_weight_count_padding_and_shared_layers_once(source: Path) -> None:
    model = packed(source)
    packed_bytes = weights = 0
    for layer in model.modules():
        if isinstance(layer, BitLinear):
            packed_bytes += layer.qweight.nbytes + layer.qweight_scale.nbytes
            weights += layer.in_features * layer.out_features
    assert bits_per_weight(model) == 8 * packed_bytes / weights
    model.again = model.model.layers[0].mlp
    assert bits_per_weight(model) == 8 * packed_bytes / weights
    twin = BitLinear.packed_skeleton(64, 190, bias=False)
    twin.commit_packed(*model.model.layers[0].mlp.up_proj.packed())
    twin.qweight = model.model.layers[0].mlp.up_proj.qweight
    model.twin = twin
    assert bits_per_weight(model) == 8 * packed_bytes / weights


def test_bits_of_a_layer_that_packed_itself() -> None:
    class Own(BitLinear):
        def _perform_deployment(self) -> None:
            self.register_buffer("codes", self.qweight.clone())

    layer = Own(8, 4, bias=True)
    layer.weight.requires_grad_(False)
    layer.eval().deploy()
    stored = sum(t.nbytes for name, t in layer.state_dict().items() if name != "bias")
    assert bits_per_weight(layer) == 8 * stored / 32


def test_bits_of_a_model_without_ternary_layers() -> None:
    with pytest.raises(ArgumentError, match="must hold ternary layers, got Linear"):
        bits_per_weight(nn.Linear(2, 2))


@pytest.mark.parametrize("fields", [{}, GROUPS, {**GROUPS, "group_scale_dtype": "float32"}])
def test_what_a_weight_takes_once_it_is_packed_at_load(
    tmp_path: Path, fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers places modules by it before anything is packed."""
    sizes: dict[str, float] = {}
    original = BitLabHfQuantizer._process_model_before_weight_loading

    def noting(self: Any, model: Any, **options: Any) -> None:
        original(self, model, **options)
        for name, parameter in model.named_parameters():
            sizes[name] = self.param_element_size(model, name, parameter) * parameter.numel()

    monkeypatch.setattr(BitLabHfQuantizer, "_process_model_before_weight_loading", noting)
    model = packed(make_float_model("llama", tmp_path), head="int8", **fields)
    for name, module in model.named_modules():
        if isinstance(module, BitLinear):
            assert sizes[f"{name}.weight"] == sum(tensor.nbytes for tensor in module.packed())
    assert sizes["lm_head.weight"] == model.lm_head.qweight.nbytes
    embedding = model.model.embed_tokens.weight
    assert sizes["model.embed_tokens.weight"] == embedding.nbytes
