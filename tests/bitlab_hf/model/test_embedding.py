"""Models whose embedding is ternary, tied to the head or not: loaded, run, saved, undone."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from bitcore import ops
from bitcore.errors import CheckpointError, ConfigError, LifecycleError
from bitlab_hf import BitLabConfig, convert_ternary, deploy, save
from bitlab_hf.checkpoint.card import model_card
from bitlab_hf.model.count import bits_per_weight
from bitlab_hf.model.tree import ternary_modules
from bitlayers import BitLinear, TernaryEmbedding
from tests.bitlab_hf.models import counts_of, logits_of, rewrite, token_ids
from tests.bitlab_hf.ternary import EMBEDDING, KINDS, make_packed, make_source

TIED = {"qwen2": True, "gemma": True, "llama": False}


def load(path: Path, auto: Any = AutoModelForCausalLM, **options: Any) -> Any:
    return auto.from_pretrained(path, dtype=torch.float32, **options).eval()


def scheme_of(path: Path) -> dict[str, Any]:
    held: dict[str, Any] = json.loads((path / "config.json").read_text())["quantization_config"]
    return held


def change_scheme(path: Path, **fields: Any) -> None:
    file = path / "config.json"
    content = json.loads(file.read_text())
    content["quantization_config"].update(fields)
    file.write_text(json.dumps(content))


def assert_shared(model: Any) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is TernaryEmbedding
    assert type(head) is BitLinear
    assert head.qweight is embedding.qweight
    assert head.qweight_scale.data_ptr() == embedding.qweight_scale.data_ptr()
    assert ("qweight_multiplier" in head._buffers) == ("qweight_multiplier" in embedding._buffers)


@pytest.mark.parametrize("group_scale_dtype", ["float32", "uint8"])
@pytest.mark.parametrize("kind", list(KINDS))
@pytest.mark.parametrize("name", list(TIED))
def test_the_whole_road(name: str, kind: str, group_scale_dtype: str, tmp_path: Path) -> None:
    source = make_source(name, tmp_path, kind)
    packed = tmp_path / "packed"
    report = convert_ternary(source, packed, group_scale_dtype=group_scale_dtype)
    assert report.packed[EMBEDDING] == KINDS[kind]
    assert not report.kept
    assert report.bytes_after < report.bytes_before / 4
    scheme = scheme_of(packed)
    assert (scheme["embedding"], scheme["head"]) == ("ternary", "ternary")
    assert scheme["format_version"] == 4
    keys = load_file(packed / "model.safetensors").keys()
    assert f"{EMBEDDING}.qweight" in keys
    assert f"{EMBEDDING}.weight" not in keys
    assert ("lm_head.qweight" in keys) != TIED[name]
    floats, model = load(source), load(packed)
    embedding = model.get_input_embeddings()
    if TIED[name]:
        assert_shared(model)
    else:
        assert type(embedding) is TernaryEmbedding
        assert model.lm_head.qweight is not embedding.qweight
    # The file is what is mapped.
    assert embedding.qweight.dtype == torch.uint8
    weight = floats.get_input_embeddings().weight
    ids = torch.arange(97)
    rounded = group_scale_dtype == "uint8" and kind == "64"
    if rounded:
        change = (embedding.dequantized_weight() / weight.detach())[weight != 0] - 1
        assert 0 < float(change.abs().max()) <= report.scale_change + 1e-6
        floats.get_input_embeddings().weight.data = embedding.dequantized_weight()
    assert torch.equal(embedding(ids), floats.get_input_embeddings()(ids))
    if not rounded:
        torch.testing.assert_close(logits_of(model), logits_of(floats), atol=1e-4, rtol=1e-4)
    # Deployed bits across a reload, by either way of saving.
    save(model, tmp_path / "saved")
    model.save_pretrained(tmp_path / "plain", max_shard_size="20KB")
    for folder in ("saved", "plain"):
        again = load(tmp_path / folder)
        if TIED[name]:
            assert_shared(again)
        assert torch.equal(logits_of(again), logits_of(model))
        assert scheme_of(tmp_path / folder)["embedding"] == "ternary"
    assert load_file(tmp_path / "saved/model.safetensors").keys() == keys


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_offloaded_and_saved_again(name: str, tmp_path: Path) -> None:
    """What is tied is brought in as a Parameter of its own for each of the modules."""
    packed = make_packed(name, tmp_path)
    expected = logits_of(load(packed))
    places = {EMBEDDING: "disk", "model.layers": "cpu", "model.norm": "cpu",
              "model.rotary_emb": "cpu", "lm_head": "disk"}  # fmt: skip
    model = load(packed, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(logits_of(model), expected)
    save(model, tmp_path / "again")
    again = load(tmp_path / "again")
    if TIED[name]:
        assert_shared(again)
    assert torch.equal(logits_of(again), expected)
    assert counts_of(tmp_path / "again") == counts_of(packed)


@pytest.mark.parametrize("name", list(TIED))
def test_activations_in_int8(name: str, tmp_path: Path) -> None:
    packed = make_packed(name, tmp_path)
    change_scheme(packed, activation_dtype="int8")
    model = load(packed)
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    logits = logits_of(model)
    expected = ops.linear(seen[0], *head.packed()[:2], None, 97, "int8_per_token")
    assert torch.equal(logits, expected)
    save(model, tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), logits)


def test_generated_tokens_are_those_of_the_floats(tmp_path: Path) -> None:
    packed = make_packed("qwen2", tmp_path)
    floats, model = load(tmp_path / "ternary-qwen2"), load(packed)
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    ids = token_ids()[:1]
    assert torch.equal(model.generate(ids, **options), floats.generate(ids, **options))


def test_several_embeddings_share_one(tmp_path: Path) -> None:
    """BART's encoder, decoder and head have modules of their own, of one matrix."""
    packed = make_packed("bart", tmp_path, "per_channel")
    model = load(packed, AutoModelForSeq2SeqLM)
    floats = load(tmp_path / "ternary-bart", AutoModelForSeq2SeqLM)
    rows = [module for module in model.modules() if isinstance(module, TernaryEmbedding)]
    assert len(rows) == 3
    assert {id(module.qweight) for module in [*rows, model.lm_head]} == {id(rows[0].qweight)}
    ids = token_ids()
    with torch.no_grad():
        ours, theirs = (one(input_ids=ids, decoder_input_ids=ids).logits for one in (model, floats))
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    save(model, tmp_path / "again")
    again = load(tmp_path / "again", AutoModelForSeq2SeqLM)
    assert torch.equal(again(input_ids=ids, decoder_input_ids=ids).logits, ours)


def test_what_stays_float(tmp_path: Path) -> None:
    """A tied head with a bias has no ternary form, and neither has what is tied to it."""
    source = make_source("bert", tmp_path)
    report = convert_ternary(source, tmp_path / "packed", keep_inexact=True)
    key = "bert.embeddings.word_embeddings.weight"
    assert "no linear layer or input embedding that can be packed" in report.kept[key]
    scheme = scheme_of(tmp_path / "packed")
    assert "embedding" not in scheme
    assert scheme["format_version"] == 1


def test_the_base_model_alone(tmp_path: Path) -> None:
    packed = make_packed("qwen2", tmp_path)
    model, base = load(packed), load(packed, AutoModel)
    assert type(base.embed_tokens) is TernaryEmbedding
    ids = token_ids()
    hidden = model.model(input_ids=ids).last_hidden_state
    assert torch.equal(base(input_ids=ids).last_hidden_state, hidden)
    base.save_pretrained(tmp_path / "base")
    again = load(tmp_path / "base", AutoModel)
    assert torch.equal(again(input_ids=ids).last_hidden_state, hidden)


@pytest.mark.parametrize("name", list(TIED))
def test_dequantize(name: str, tmp_path: Path) -> None:
    packed = make_packed(name, tmp_path)
    floats, model = load(tmp_path / f"ternary-{name}"), load(packed)
    before = logits_of(model)
    model.dequantize()
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert type(embedding) is type(floats.get_input_embeddings())
    assert type(head) is nn.Linear
    assert (head.weight is embedding.weight) == TIED[name]
    for key, value in floats.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key
    torch.testing.assert_close(logits_of(model), before, atol=1e-4, rtol=1e-4)
    model.resize_token_embeddings(101)
    model.save_pretrained(tmp_path / "floats")
    again = load(tmp_path / "floats")
    assert again.get_input_embeddings().num_embeddings == 101
    assert torch.equal(logits_of(again), logits_of(model))


@pytest.mark.parametrize("name", list(TIED))
def test_the_vocabulary_is_fixed(name: str, tmp_path: Path) -> None:
    model = load(make_packed(name, tmp_path))
    for part in (model, model.model):
        assert part.resize_token_embeddings(97) is model.get_input_embeddings()
        expected = "must be 97 once the head or the embedding is packed, got 98"
        with pytest.raises(LifecycleError, match=expected):
            part.resize_token_embeddings(98)
    with pytest.raises(LifecycleError, match="already"):
        deploy(model)


@pytest.mark.parametrize("name", list(TIED))
def test_counts(name: str, tmp_path: Path) -> None:
    packed = make_packed(name, tmp_path)
    floats, model = load(tmp_path / f"ternary-{name}"), load(packed)
    for without in (False, True):
        assert model.num_parameters(exclude_embeddings=without) == floats.num_parameters(
            exclude_embeddings=without
        )
    # Each matrix once: what is tied counts as one.
    stored = load_file(packed / "model.safetensors")
    leaves = ("qweight", "qweight_scale", "qweight_multiplier")
    held = sum(tensor.nbytes for key, tensor in stored.items() if key.endswith(leaves))
    weights = sum(p.numel() for p in floats.parameters() if p.dim() == 2)
    assert bits_per_weight(model) == pytest.approx(8 * held / weights)
    card = (packed / "README.md").read_text()
    assert f"| ternary weights | {weights:,} in" in card
    assert "linear layers and of the embedding are -1, 0 or +1" in card
    assert "| the embedding | scales per group of 64 in float32 |" in card
    # Of the skeleton, which the card was made from, as of the model.
    sizes = [re.findall(r"\| size \|.*", text) for text in (card, model_card(model, "x"))]
    assert sizes[0] == sizes[1] != []


def test_copies_and_casts(tmp_path: Path) -> None:
    model = load(make_packed("gemma", tmp_path))
    expected = logits_of(model)
    twin = copy.deepcopy(model)
    assert_shared(twin)
    assert torch.equal(logits_of(twin), expected)
    scale = model.get_input_embeddings().qweight_scale.clone()
    model.to(torch.bfloat16)
    assert_shared(model)
    assert torch.equal(model.get_input_embeddings().qweight_scale, scale)
    assert model.get_input_embeddings()(token_ids()).dtype == torch.bfloat16
    assert logits_of(model).dtype == torch.bfloat16
    model.tie_weights()
    assert_shared(model)


@pytest.mark.parametrize("name", ["qwen2", "llama"])
def test_another_embedding_in_its_place(name: str, tmp_path: Path) -> None:
    """Of what was tied to the one that is gone, the file holds its own tensors."""
    model = load(make_packed(name, tmp_path))
    model.set_input_embeddings(nn.Embedding(97, 128))
    before = logits_of(model)
    save(model, tmp_path / "again")
    assert "embedding" not in scheme_of(tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), before)


QWEIGHT = torch.zeros(25, 128, dtype=torch.uint8)
PACKED = "for per_group weights"
DAMAGES: list[tuple[dict[str, Tensor | None], str]] = [
    ({"qweight": QWEIGHT + 3}, "qweight must hold the codes 0, 1 and 2, got the invalid code 3"),
    ({"qweight_scale": torch.zeros(97)}, "qweight_scale must be finite and positive"),
    ({"qweight_scale": torch.full((97,), torch.nan)}, "qweight_scale must be finite and positive"),
    (
        {"qweight_multiplier": torch.full((97, 2), 128, dtype=torch.uint8)},
        "qweight_multiplier must hold multipliers of 0 to 127, got 128",
    ),
    (
        {"qweight_multiplier": torch.zeros(97, 2, dtype=torch.uint8)},
        "qweight_multiplier must hold a multiplier above 0 in every row, got none in row 0",
    ),
    ({"qweight": None}, "qweight must be in the checkpoint, got none"),
    ({"qweight_scale": None}, "qweight_scale must be in the checkpoint, got none"),
    ({"qweight_multiplier": None}, "qweight_multiplier must be in the checkpoint, got none"),
    ({"qweight": QWEIGHT[:24]}, f"qweight must be uint8 [25, 128] {PACKED}, got U8 [24, 128]"),
    (
        {"qweight": QWEIGHT.view(torch.int8)},
        f"qweight must be uint8 [25, 128] {PACKED}, got I8 [25, 128]",
    ),
    ({"qweight_scale": torch.ones(1)}, f"qweight_scale must be float32 [97] {PACKED}, got F32 [1]"),
    ({"qweight": None, "weight": torch.zeros(97, 128)}, "qweight must be in the checkpoint"),
]


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    source = make_source(request.param, folder)
    convert_ternary(source, folder / "packed", group_scale_dtype="uint8")
    return folder / "packed"


@pytest.mark.parametrize(("tensors", "message"), DAMAGES)
def test_damaged_files(
    tensors: dict[str, Tensor | None], message: str, whole: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole, tmp_path / "damaged"))

    def damage(state: dict[str, Tensor]) -> None:
        for leaf, tensor in tensors.items():
            state.pop(f"{EMBEDDING}.{leaf}", None)
            if tensor is not None:
                state[f"{EMBEDDING}.{leaf}"] = tensor

    rewrite(folder, damage)
    with pytest.raises(CheckpointError, match=re.escape(f"{EMBEDDING}.{message}")):
        load(folder)


def test_what_belongs_to_another_file(whole: Path, tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        (
            {"embedding": "keep", "format_version": 3},
            f"{EMBEDDING} must not be in modules_to|lm_head.qweight must be in the checkpoint for",
        ),
        (
            {"weight_granularity": "per_channel", "group_size": None},
            "qweight_multiplier must not be in the checkpoint for per_channel weights",
        ),
    ]
    for at, (fields, message) in enumerate(cases):
        folder = Path(shutil.copytree(whole, tmp_path / str(at)))
        change_scheme(folder, **fields)
        with pytest.raises(CheckpointError, match=message):
            load(folder)
    folder = Path(shutil.copytree(whole, tmp_path / "head"))
    change_scheme(folder, head="int8")
    with pytest.raises(ConfigError, match="beside a ternary embedding, got 'int8'"):
        load(folder)
    folder = Path(shutil.copytree(whole, tmp_path / "newer"))
    change_scheme(folder, format_version=5)
    with pytest.raises(
        ConfigError, match="at most 4, got 5: the checkpoint was written by a newer"
    ):
        load(folder)


def test_it_is_no_choice_of_training(tmp_path: Path) -> None:
    for mode in ("auto", "train", "infer"):
        with pytest.raises(ConfigError, match="embedding must be 'keep' for latent weights"):
            BitLabConfig(embedding="ternary", mode=mode)


def test_modules_by_their_kind(tmp_path: Path) -> None:
    model = load(make_packed("llama", tmp_path))
    names = [found.names[0] for found in ternary_modules(model)]
    assert names[0] == EMBEDDING
    assert names[-1] == "lm_head"
