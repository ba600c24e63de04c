"""head="int8": the output head, and the embedding tied to it, from the latent model to the file."""

from __future__ import annotations

import copy
import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.models.gemma.modeling_gemma import GemmaTextScaledWordEmbedding

import bitcore
from bitcore.errors import CheckpointError, ConfigError, LifecycleError
from bitcore.quantize import quantize_rows_int8
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlayers import Int8Embedding
from tests.bitlab_hf.fresh import fresh_outputs, outputs_of
from tests.bitlab_hf.int8 import EMBEDDING, OWNERS, assert_int8, int8, load
from tests.bitlab_hf.models import (
    VOCABULARY,
    counts_of,
    logits_of,
    make_float_model,
    rewrite,
    token_ids,
)

DEMO_MODEL = Path(str(files("bitlab_hf.demo") / "model"))


@pytest.fixture(params=sorted(OWNERS))
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def source(name: str, tmp_path: Path) -> Path:
    return make_float_model(name, tmp_path)


@pytest.fixture
def deployed(source: Path, tmp_path: Path) -> Path:
    save(load(source, int8(mode="infer")), tmp_path / "deployed")
    return tmp_path / "deployed"


def test_whole_path(name: str, source: Path, tmp_path: Path) -> None:
    """Latent, deployed, saved, a fresh process: logits and tokens, native and reference."""
    is_tied = name != "llama"
    model = load(source, int8())
    weight = model.get_output_embeddings().weight
    assert type(model.lm_head) is nn.Linear
    latent = logits_of(model)
    expected = model.dtype
    deploy(model)
    assert_int8(model, is_tied)
    assert model.dtype == expected
    assert model.config.tie_word_embeddings is is_tied
    assert (model.lm_head.dequantized_weight() - weight).abs().max() < weight.abs().max() / 200
    outputs = outputs_of(model)
    first = outputs["logits 1 cpu"]
    assert not torch.equal(first, latent)
    torch.testing.assert_close(first, latent, rtol=0, atol=0.02)
    for key, value in outputs.items():
        assert torch.equal(value, outputs[f"{key.split()[0]} 1 cpu"]), key

    save(model, tmp_path / "deployed")
    for key, value in fresh_outputs(tmp_path / "deployed", name).items():
        assert torch.equal(value, outputs[key]), key
    check_file(tmp_path / "deployed", OWNERS[name], weight)


def check_file(folder: Path, owner: str, weight: Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    codes, scale = quantize_rows_int8(weight)
    assert tensors[f"{owner}.qweight"].dtype == torch.int8
    assert torch.equal(tensors[f"{owner}.qweight"], codes)
    assert torch.equal(tensors[f"{owner}.qweight_scale"], scale)
    others = {key for key in tensors if "layers" not in key and not key.startswith(owner)}
    assert others == {"model.norm.weight"} | ({f"{EMBEDDING}.weight"} - {f"{owner}.weight"}) - (
        {f"{EMBEDDING}.weight"} if owner == EMBEDDING else set()
    )
    written = json.loads((folder / "config.json").read_text())
    assert written["quantization_config"]["head"] == "int8"


def test_native_equals_reference_with_every_isa(isa: str, num_threads: int, deployed: Path) -> None:
    model = load(deployed)
    ours = logits_of(model)
    with bitcore.use_backend("reference"):
        assert torch.equal(logits_of(model), ours)


def test_the_demo_model(tmp_path: Path) -> None:
    latent = load(DEMO_MODEL, int8())
    ids = torch.arange(5, 29).view(2, 12)
    deploy(latent)
    assert_int8(latent, is_tied=True)
    with torch.no_grad():
        expected = latent(ids).logits
        assert expected.dtype == torch.bfloat16
        save(latent, tmp_path / "demo")
        assert torch.equal(load(tmp_path / "demo")(ids).logits, expected)
        assert torch.equal(load(DEMO_MODEL, int8(mode="infer"))(ids).logits, expected)
    keep = deploy(load(DEMO_MODEL, BitLabConfig()))
    save(keep, tmp_path / "keep")
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("demo", "keep")]
    # 2048 rows of 256: one byte for two, and a scale of four bytes for each row.
    saved = 2048 * 256 - 2048 * 4
    assert abs(sizes[1] - sizes[0] - saved) < 512


def test_packing_at_load_equals_deploy(source: Path, tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        packed = load(source, int8(mode="infer"), dtype=dtype)
        latent = deploy(load(source, int8(), dtype=dtype))
        assert torch.equal(logits_of(packed), logits_of(latent))
        states = [model.state_dict() for model in (packed, latent)]
        assert set(states[0]) == set(states[1])
        assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
        for model in (packed, latent):
            assert model.config.quantization_config.head == "int8"
            assert all(not p.requires_grad for p in model.get_output_embeddings().parameters())


def test_a_latent_model_keeps_the_float_head(source: Path, tmp_path: Path) -> None:
    model = load(source, int8())
    expected = logits_of(model)
    save(model, tmp_path / "latent")
    assert set(load_file(tmp_path / "latent" / "model.safetensors")) == set(
        load_file(source / "model.safetensors")
    )
    again = load(tmp_path / "latent")
    assert torch.equal(logits_of(again), expected)
    assert again.config.quantization_config.head == "int8"
    packed = load(tmp_path / "latent", BitLabConfig(mode="infer"))
    assert torch.equal(logits_of(packed), logits_of(deploy(again)))


def test_saved_again_and_in_shards(deployed: Path, name: str, tmp_path: Path) -> None:
    model, info = load(deployed, output_loading_info=True)
    assert not any(info.values())
    expected = logits_of(model)
    first = load_file(deployed / "model.safetensors")
    for folder in ("again", "again", "pretrained"):
        if folder == "pretrained":
            model.save_pretrained(tmp_path / folder)
        else:
            save(model, tmp_path / folder)
        stored = load_file(tmp_path / folder / "model.safetensors")
        assert set(stored) == set(first)
        assert all(torch.equal(stored[key], first[key]) for key in first)
    save(model, deployed)
    save(model, tmp_path / "shards", max_shard_size="10KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3
    for path in (deployed, tmp_path / "shards"):
        again = load(path)
        assert_int8(again, name != "llama")
        assert torch.equal(logits_of(again), expected)


def test_tying_casting_and_copying_change_nothing(deployed: Path, name: str) -> None:
    model = load(deployed)
    expected = logits_of(model)
    model.tie_weights()
    assert_int8(model, name != "llama")
    copied = copy.deepcopy(model)
    assert_int8(copied, name != "llama")
    assert copied.lm_head.qweight is not model.lm_head.qweight
    for other in (model, copied, copied.to("cpu")):
        assert torch.equal(logits_of(other), expected)
    half = copied.to(torch.bfloat16)
    assert half.lm_head.qweight_scale.dtype == torch.float32
    assert logits_of(half).dtype == torch.bfloat16
    # Loaded in bf16, the same two modules; the rest differs by the rotary frequencies' rounding.
    loaded = load(deployed, dtype=torch.bfloat16)
    embedded = half.get_input_embeddings()(token_ids())
    assert embedded.dtype == torch.bfloat16
    assert torch.equal(embedded, loaded.get_input_embeddings()(token_ids()))
    assert torch.equal(half.lm_head(embedded), loaded.lm_head(embedded))


def test_generate_static_and_compiled(deployed: Path) -> None:
    model = load(deployed)
    ids = torch.arange(8)[None]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 6, "min_new_tokens": 6,
               "do_sample": False}  # fmt: skip
    expected = model.generate(ids, **options)
    assert expected.shape == (1, 14)
    assert torch.equal(model.generate(ids, cache_implementation="static", **options), expected)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


@pytest.mark.parametrize("places", ["auto", "disk"])
def test_device_maps(deployed: Path, tmp_path: Path, places: Any, name: str) -> None:
    expected = logits_of(load(deployed))
    if places == "disk":
        places = {EMBEDDING: "disk", "model.layers": "cpu", "model.norm": "cpu",
                  "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    model = load(deployed, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits_of(model), expected)
    if places != "auto":
        before = [type(module) for module in model.modules()]
        with pytest.raises(LifecycleError, match="must hold data, got a weight on the meta device"):
            model.dequantize()
        assert [type(module) for module in model.modules()] == before
    # What is tied is one tensor in the file, though offloaded weights are Parameters of their own.
    save(model, tmp_path / "again")
    again = load(tmp_path / "again")
    assert_int8(again, name != "llama")
    assert torch.equal(logits_of(again), expected)
    assert counts_of(tmp_path / "again") == counts_of(deployed)


def test_gradients_reach_the_inputs(deployed: Path) -> None:
    model = load(deployed)
    hidden = torch.randn(1, 5, 64, requires_grad=True)
    model(inputs_embeds=hidden).logits.square().sum().backward()
    assert hidden.grad is not None
    assert bool(torch.isfinite(hidden.grad).all())
    assert bool((hidden.grad.abs().sum(-1) > 0).all())


def test_float_again(deployed: Path, name: str, tmp_path: Path) -> None:
    model = load(deployed)
    weight = model.lm_head.dequantized_weight()
    expected = logits_of(model)
    embedded = model.get_input_embeddings()(token_ids())
    model = model.dequantize()
    assert type(model.lm_head) is nn.Linear
    assert torch.equal(model.lm_head.weight, weight)
    embedding = model.get_input_embeddings()
    kind = GemmaTextScaledWordEmbedding if name == "gemma" else nn.Embedding
    assert type(embedding) is kind
    assert (embedding.num_embeddings, embedding.embedding_dim) == (VOCABULARY, 64)
    assert torch.equal(embedding(token_ids()), embedded)
    assert (embedding.weight is model.lm_head.weight) is (name != "llama")
    # Activations are not quantized any more.
    torch.testing.assert_close(logits_of(model), expected, rtol=0, atol=0.05)
    model.save_pretrained(tmp_path / "float")
    again = load(tmp_path / "float")
    assert torch.equal(logits_of(again), logits_of(model))
    again.resize_token_embeddings(VOCABULARY + 3)
    model.resize_token_embeddings(VOCABULARY + 3)
    assert model.lm_head.weight.shape[0] == VOCABULARY + 3


def test_the_vocabulary_is_fixed(deployed: Path) -> None:
    model = load(deployed)
    expected = logits_of(model)
    for one in (model, copy.deepcopy(model)):
        assert one.resize_token_embeddings(VOCABULARY) is one.get_input_embeddings()
        assert one.resize_token_embeddings() is one.get_input_embeddings()
        with pytest.raises(LifecycleError, match=f"must be {VOCABULARY} once .* got 128"):
            one.resize_token_embeddings(VOCABULARY, pad_to_multiple_of=64)
        assert torch.equal(logits_of(one), expected)


def test_other_heads_and_the_base_model(deployed: Path, name: str, tmp_path: Path) -> None:
    full = load(deployed)
    base = load(deployed, auto=AutoModel)
    labels = load(deployed, auto=AutoModelForSequenceClassification, num_labels=3)
    assert type(labels.score) is nn.Linear
    assert labels.score.weight.requires_grad
    for model in (base, labels.model):
        kind = nn.Embedding if name == "llama" else Int8Embedding
        assert type(model.get_input_embeddings()) is kind
        assert torch.equal(
            model(input_ids=token_ids()).last_hidden_state,
            full.model(input_ids=token_ids()).last_hidden_state,
        )
    # And back: the base model's file in a causal model, whose head it holds only where tied.
    save(base, tmp_path / "base")
    again, info = load(tmp_path / "base", output_loading_info=True)
    if name == "llama":
        assert type(again.lm_head) is nn.Linear
        assert info["missing_keys"] == {"lm_head.weight"}
    else:
        assert_int8(again, is_tied=True)
        assert torch.equal(logits_of(again), logits_of(full))
        assert not info["missing_keys"]
    save(labels, tmp_path / "labels")
    reloaded = load(tmp_path / "labels", auto=AutoModelForSequenceClassification)
    for model in (labels, reloaded):
        model.config.pad_token_id = 0
    assert torch.equal(logits_of(reloaded), logits_of(labels))


def test_replace_linear_and_deploy(source: Path, name: str, tmp_path: Path) -> None:
    model = replace_linear(load(source), int8())
    deploy(model)
    assert_int8(model, name != "llama")
    assert model.config.quantization_config.head == "int8"
    save(model, tmp_path / "replaced")
    assert torch.equal(logits_of(load(tmp_path / "replaced")), logits_of(model))
    assert torch.equal(logits_of(model), logits_of(deploy(load(source, int8()))))


def test_replace_linear_needs_a_head() -> None:
    with pytest.raises(ConfigError, match='head="int8" must be asked of a transformers model'):
        replace_linear(nn.Sequential(nn.Linear(64, 64)), int8())


def test_a_model_without_a_head(tmp_path: Path) -> None:
    source = make_float_model("qwen2", tmp_path)
    for mode in ("train", "infer"):
        with pytest.raises(ConfigError, match='head="int8" must find an output head'):
            load(source, int8(mode=mode), auto=AutoModel)
    # The base model of a latent file whose head is to be int8: it has none, and stays so.
    save(load(source, int8()), tmp_path / "latent")
    base = deploy(load(tmp_path / "latent", auto=AutoModel))
    assert type(base.get_input_embeddings()) is nn.Embedding
    assert base.config.quantization_config.head == "keep"


def test_an_untied_head_under_a_config_that_ties(tmp_path: Path) -> None:
    model = load(make_float_model("qwen2", tmp_path), int8())
    model.lm_head.weight = nn.Parameter(torch.randn(VOCABULARY, 64))
    deploy(model)
    assert type(model.get_input_embeddings()) is nn.Embedding
    assert model.config.tie_word_embeddings is False
    save(model, tmp_path / "untied")
    again = load(tmp_path / "untied")
    assert torch.equal(logits_of(again), logits_of(model))
    model.tie_weights()
    assert model.lm_head._parameters["weight"] is None


def test_a_head_with_a_bias(tmp_path: Path) -> None:
    class WithBias(LlamaForCausalLM):
        def __init__(self, config: LlamaConfig) -> None:
            super().__init__(config)
            self.lm_head = nn.Linear(64, VOCABULARY)
            self.post_init()

    config = LlamaConfig.from_pretrained(make_float_model("llama", tmp_path))
    model = WithBias(config).eval()
    nn.init.normal_(model.lm_head.bias)
    model.save_pretrained(tmp_path / "float")
    latent = WithBias.from_pretrained(tmp_path / "float", quantization_config=int8())
    packed = WithBias.from_pretrained(tmp_path / "float", quantization_config=int8(mode="infer"))
    expected = logits_of(deploy(latent))
    assert torch.equal(logits_of(packed), expected)
    assert torch.equal(packed.lm_head.bias, model.lm_head.bias)
    assert not packed.lm_head.bias.requires_grad
    save(packed, tmp_path / "deployed")
    again = WithBias.from_pretrained(tmp_path / "deployed")
    assert torch.equal(logits_of(again), expected)
    rewrite(tmp_path / "deployed", lambda tensors: tensors.pop("lm_head.bias"))
    with pytest.raises(CheckpointError, match=r"lm_head\.bias must be in the checkpoint"):
        WithBias.from_pretrained(tmp_path / "deployed")
