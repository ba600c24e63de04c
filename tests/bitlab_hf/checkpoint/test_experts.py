"""Ternary experts from the float file to the deployed one, and back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from bitcore.errors import CheckpointError, ConfigError, NonFiniteError
from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.model.experts import expert_modules
from bitlayers import learned_experts
from tests.bitlab_hf.experts import MOE, load, make_moe
from tests.bitlab_hf.models import logits_of, rewrite, token_ids

SCHEMES: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"weight_granularity": "per_channel"},
    "group": {"weight_granularity": "per_group", "group_size": 64},
    "float32 groups": {
        "weight_granularity": "per_group", "group_size": 64, "group_scale_dtype": "float32",
    },
}  # fmt: skip
EXPERTS = "model.layers.1.mlp.experts"


def keys_of(folder: Path) -> set[str]:
    with safe_open(folder / "model.safetensors", framework="pt") as handle:
        return set(handle.keys())


def deployed(source: Path, folder: Path, **fields: Any) -> Path:
    save(deploy(load(source, quantization_config=BitLabConfig(**fields))), folder)
    return folder


@pytest.mark.parametrize("name", MOE)
@pytest.mark.parametrize("scheme", ["tensor", "group"])
def test_the_whole_road(name: str, scheme: str, tmp_path: Path) -> None:
    source = make_moe(name, tmp_path)
    # MLA's low ranks are no multiples of 64.
    skip = ["q_b_proj", "kv_b_proj", "o_proj"] if name == "deepseek_v3" else []
    config = BitLabConfig(modules_to_not_convert=skip, **SCHEMES[scheme])
    model = load(source, quantization_config=config)
    found = expert_modules(model)
    assert len(found) == (1 if name == "deepseek_v3" else 2)
    ids = token_ids()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.train()(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[2] < losses[1] < losses[0]
    trained, evaluated = logits_of(model.train()), logits_of(model.eval())
    assert torch.equal(trained, evaluated)
    save(model, tmp_path / "latent")
    # A latent file has the float file's keys.
    assert keys_of(tmp_path / "latent") == keys_of(source)
    assert torch.equal(logits_of(load(tmp_path / "latent")), evaluated)
    packed_at_load = load(tmp_path / "latent", quantization_config=BitLabConfig(mode="infer"))
    assert torch.equal(logits_of(packed_at_load), evaluated)
    assert torch.equal(logits_of(deploy(model)), evaluated)
    save(model, tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert all(one.module.is_deployed for one in expert_modules(again))
    assert torch.equal(logits_of(again), evaluated)
    tokens = again.generate(ids[:1, :5], max_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(ids[:1, :5], max_new_tokens=6, do_sample=False), tokens)
    save(again, tmp_path / "twice")
    held, twice = (load_file(tmp_path / f / "model.safetensors") for f in ("packed", "twice"))
    assert held.keys() == twice.keys()
    assert all(torch.equal(tensor, twice[key]) for key, tensor in held.items())
    # No float tensor of experts, and no other packed one, is in the file.
    for one in found:
        own = {key.removeprefix(f"{one.names[0]}.") for key in held if one.names[0] in key}
        biases = {f"{leaf}_bias" for leaf in one.module.stacks} if name == "gpt_oss" else set()
        assert own == one.module.packed_tensors().keys() | biases


def test_a_float_file_is_packed_at_load(tmp_path: Path) -> None:
    half = torch.bfloat16
    for stored, dtype in ((torch.float32, torch.float32), (half, half), (torch.float32, half)):
        source = make_moe("gpt_oss", tmp_path, stored)
        wanted = deploy(load(source, quantization_config=BitLabConfig(), dtype=dtype))
        model = load(source, quantization_config=BitLabConfig(mode="infer"), dtype=dtype)
        assert model.dtype == dtype
        assert torch.equal(logits_of(model), logits_of(wanted))
        for one in expert_modules(model):
            assert not any(p.requires_grad for p in one.module.parameters())
            assert {p.dtype for p in one.module.parameters()} == {dtype, torch.uint8}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_schemes_and_overrides(scheme: str, tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    overrides = {
        "*.layers.0.mlp.experts.down_proj": {
            "weight_granularity": "per_channel", "group_size": None,
        },
        "model.layers.1.mlp.experts": {"activation_granularity": "per_tensor"},
    }  # fmt: skip
    model = load(source, quantization_config=BitLabConfig(overrides=overrides, **SCHEMES[scheme]))
    first, second = (one.module.stacks for one in expert_modules(model))
    assert first["down_proj"].config.weight_granularity == "per_channel"
    assert first["gate_up_proj"].config.activation == "int8_per_token"
    assert {stack.config.activation for stack in second.values()} == {"int8_per_tensor"}
    before = logits_of(model)
    save(deploy(model), tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert torch.equal(logits_of(again), before)
    stacks = [one.module.stacks for one in expert_modules(again)]
    assert stacks == [first, second]
    scheme_in = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (scheme_in["experts"], scheme_in["format_version"]) == ("ternary", 3)


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_base_model_and_shards(name: str, tmp_path: Path) -> None:
    model = load(make_moe(name, tmp_path), quantization_config=BitLabConfig())
    save(model, tmp_path / "latent")
    save(deploy(model), tmp_path / "packed", max_shard_size="100KB")
    assert len(list((tmp_path / "packed").glob("*.safetensors"))) > 1
    assert torch.equal(logits_of(load(tmp_path / "packed", device_map="cpu")), logits_of(model))
    with torch.no_grad():
        wanted = model.model(token_ids()).last_hidden_state
        for folder in ("packed", "latent", "base"):
            base = AutoModel.from_pretrained(tmp_path / folder).eval()
            assert torch.equal(base(token_ids()).last_hidden_state, wanted), folder
            if folder == "packed":
                save(base, tmp_path / "base")


def test_dequantize(tmp_path: Path) -> None:
    folder = deployed(make_moe("gpt_oss", tmp_path), tmp_path / "packed",
                      activation_dtype="float32")  # fmt: skip
    model = load(folder)
    wanted, count = logits_of(model), model.num_parameters()
    floats = model.dequantize()
    assert not expert_modules(floats)
    assert type(floats.model.layers[0].mlp.experts).__name__ == "GptOssExperts"
    assert floats.num_parameters() == count
    torch.testing.assert_close(logits_of(floats), wanted, atol=1e-4, rtol=1e-4)
    floats.save_pretrained(tmp_path / "floats")
    again = load(tmp_path / "floats")
    torch.testing.assert_close(logits_of(again), wanted, atol=1e-4, rtol=1e-4)


def test_bfloat16_latents_are_float32(tmp_path: Path) -> None:
    source = make_moe("mixtral", tmp_path, torch.bfloat16)
    model = load(source, quantization_config=BitLabConfig())
    assert model.dtype == torch.bfloat16
    for one in expert_modules(model):
        assert {p.dtype for p in one.module.parameters()} == {torch.float32}
    kept = load(source, quantization_config=BitLabConfig(latent_dtype="keep"))
    assert {p.dtype for one in expert_modules(kept) for p in one.module.parameters()} == {
        torch.bfloat16
    }
    before = logits_of(model)
    assert torch.equal(logits_of(model.train()), before)
    save(deploy(model), tmp_path / "packed")
    assert torch.equal(logits_of(load(tmp_path / "packed")), before)


# What is asked of the configuration.


def test_experts_can_stay_float(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    for fields in ({"experts": "keep"}, {"modules_to_not_convert": ["experts"]}):
        caplog.clear()
        model = load(source, quantization_config=BitLabConfig(**fields))  # type: ignore[arg-type]
        assert not expert_modules(model)
        assert "4 expert tensors such as" in caplog.text
        before = logits_of(model)
        save(deploy(model), tmp_path / "packed")
        assert torch.equal(logits_of(load(tmp_path / "packed")), before)
        scheme = json.loads((tmp_path / "packed" / "config.json").read_text())
        assert scheme["quantization_config"]["format_version"] == 1
        assert "experts" not in scheme["quantization_config"]
    # Some of them.
    config = BitLabConfig(modules_to_not_convert=["layers.0.mlp.experts"])
    model = load(source, quantization_config=config)
    assert [one.names for one in expert_modules(model)] == [[EXPERTS]]
    before = logits_of(model)
    save(deploy(model), tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert [one.names for one in expert_modules(again)] == [[EXPERTS]]
    assert torch.equal(logits_of(again), before)


def test_a_file_from_before_keeps_its_experts_float(tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    latent = load(source, quantization_config=BitLabConfig(experts="keep"))
    save(latent, tmp_path / "latent")
    assert not expert_modules(load(tmp_path / "latent"))


def test_what_experts_cannot_have(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = make_moe("qwen3_moe", tmp_path, moe_intermediate_size=96)
    with pytest.raises(ConfigError, match="num_experts_per_tok must be at most .* 5, got 6"):
        load(source, quantization_config=BitLabConfig(), num_experts_per_tok=6)
    with pytest.raises(ConfigError, match=r"experts.down_proj: in_features must be a multiple"):
        load(
            source, quantization_config=BitLabConfig(weight_granularity="per_group", group_size=64)
        )
    with pytest.raises(ConfigError, match="overrides must match converted layers"):
        load(source, quantization_config=BitLabConfig(overrides={"*.expert": {}}))


@pytest.mark.parametrize("fields", [{}, {"weight_granularity": "per_group", "group_size": 64}])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_learned_scales(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    source, scheme = make_moe(name, tmp_path), {**fields, "weight_quantizer": "lsq"}
    model = load(source, quantization_config=BitLabConfig(**scheme))
    at_load = load(source, quantization_config=BitLabConfig(**scheme, mode="infer"))
    assert torch.equal(logits_of(at_load), logits_of(model))
    modules = [one.module for one in expert_modules(model)]
    assert modules
    with torch.no_grad():
        for module in modules:
            for leaf in learned_experts.names(module):
                module.get_parameter(leaf).mul_(1.3)
    before = logits_of(model)
    assert not torch.equal(before, logits_of(at_load))
    save(model, tmp_path / "latent")
    assert torch.equal(logits_of(load(tmp_path / "latent")), before)
    packed = load(tmp_path / "latent", quantization_config=BitLabConfig(mode="infer"))
    assert all(one.module.is_deployed for one in expert_modules(packed))
    assert torch.equal(logits_of(packed), before)
    save(deploy(model), tmp_path / "packed")
    assert torch.equal(logits_of(load(tmp_path / "packed")), before)


def test_a_latent_file_from_before_keeps_the_scales_of_absmean(tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    config = BitLabConfig(
        weight_quantizer="lsq", overrides={"*.experts": {"weight_quantizer": "absmean"}}
    )
    model = load(source, quantization_config=config)
    before = logits_of(model)
    # As earlier releases wrote it: what they did was not said.
    model.config.quantization_config.overrides = {}
    save(model, tmp_path / "latent")
    again = load(tmp_path / "latent")
    assert torch.equal(logits_of(again), before)
    save(again, tmp_path / "again")
    assert torch.equal(logits_of(load(tmp_path / "again")), before)


# Bad files.


def stripped(key: str) -> Any:
    return lambda tensors: tensors.pop(key)


def put(key: str, change: Any) -> Any:
    return lambda tensors: tensors.update({key: change(tensors[key].clone())})


def set_at(place: tuple[int, ...], value: float) -> Any:
    def change(tensor: Tensor) -> Tensor:
        tensor[place] = value
        return tensor

    return change


@pytest.mark.parametrize("mode", ["train", "infer"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stripped(f"{EXPERTS}.3.up_proj.weight"),
         f"{EXPERTS}.3.up_proj.weight must be in the checkpoint, got none of expert 3"),
        (put(f"{EXPERTS}.2.down_proj.weight", lambda one: one[:-1]),
         rf"{EXPERTS}.2.down_proj.weight must be .* \[64, 64\] as of the other experts, "
         r"got F32 \[63, 64\]"),
        (put(f"{EXPERTS}.0.gate_proj.weight", lambda one: one.to(torch.int32)),
         f"{EXPERTS}"),
    ],
)  # fmt: skip
def test_bad_float_files(mode: str, change: Any, message: str, tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    rewrite(source, change)
    with pytest.raises(CheckpointError, match=message):
        load(source, quantization_config=BitLabConfig(mode=mode))


@pytest.mark.parametrize("mode", ["train", "infer"])
def test_a_configuration_of_other_sizes(mode: str, tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps({**config, "moe_intermediate_size": 32}))
    with pytest.raises(CheckpointError, match=r"experts\.\*\.\w+_proj.weight must be parts of \["):
        load(source, quantization_config=BitLabConfig(mode=mode))


def test_bad_float_files_of_whole_tensors(tmp_path: Path) -> None:
    source = make_moe("gpt_oss", tmp_path)
    rewrite(source, put(f"{EXPERTS}.down_proj", lambda one: one[:3].clone()))
    with pytest.raises(
        CheckpointError, match=rf"{EXPERTS}.down_proj must be .*\[4, 128, 64\], got"
    ):
        load(source, quantization_config=BitLabConfig())
    rewrite(source, stripped(f"{EXPERTS}.down_proj"))
    with pytest.raises(CheckpointError, match=f"{EXPERTS}.down_proj must be in the checkpoint"):
        load(source, quantization_config=BitLabConfig())


def test_experts_with_nan(tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    rewrite(source, put(f"{EXPERTS}.4.up_proj.weight", set_at((5, 6), float("nan"))))
    with pytest.raises(NonFiniteError, match=f"{EXPERTS}.gate_up_proj of expert 4 must be finite"):
        load(source, quantization_config=BitLabConfig(mode="infer"))
    model = load(source, quantization_config=BitLabConfig())
    with pytest.raises(NonFiniteError, match=f"{EXPERTS}.gate_up_proj must be .*in expert 4"):
        deploy(model)
    assert not any(one.module.is_packed("down_proj") for one in expert_modules(model))
    assert not model.model.layers[0].self_attn.q_proj.is_deployed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (stripped(f"{EXPERTS}.down_proj_qweight"), "down_proj_qweight must be in the checkpoint"),
        (stripped(f"{EXPERTS}.down_proj_qweight_scale"), "down_proj_qweight_scale must be in the"),
        (stripped(f"{EXPERTS}.down_proj_qweight_multiplier"),
         "down_proj_qweight_multiplier must be in the checkpoint"),
        (put(f"{EXPERTS}.gate_up_proj_qweight", lambda one: one[1:].clone()),
         r"gate_up_proj_qweight must be uint8 \[5, 32, 64\] for per_group experts, got U8 \[4,"),
        (put(f"{EXPERTS}.gate_up_proj_qweight", set_at((3, 7, 9), 255)),
         "gate_up_proj_qweight of expert 3 must hold the codes 0, 1 and 2, got the invalid code"),
        (put(f"{EXPERTS}.down_proj_qweight_scale", set_at((1, 2), float("inf"))),
         "down_proj_qweight_scale of expert 1 must be finite and positive"),
        (put(f"{EXPERTS}.down_proj_qweight_multiplier", set_at((4, 2, 0), 0)),
         "down_proj_qweight_multiplier of expert 4 must hold a multiplier above 0 in every row"),
    ],
)  # fmt: skip
def test_bad_deployed_files(change: Any, message: str, tmp_path: Path) -> None:
    folder = deployed(make_moe("qwen3_moe", tmp_path), tmp_path / "packed", **SCHEMES["group"])
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=rf"{EXPERTS}\.{message}"):
        load(folder)


def test_a_configuration_of_another_file(tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    folder = deployed(source, tmp_path / "packed")
    config = json.loads((folder / "config.json").read_text())
    held = config["quantization_config"]
    for drop in (True, False):
        scheme = {**held, "modules_to_not_convert": [EXPERTS]}
        if drop:
            scheme = {name: value for name, value in held.items() if name != "experts"}
        (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
        with pytest.raises(CheckpointError, match="config.json and the tensors do not belong"):
            load(folder)
        rewrite(folder, lambda tensors: None, keep_metadata=False)
        with pytest.raises(CheckpointError, match="experts|do not belong"):
            load(folder)


def test_one_file_in_the_other_state(tmp_path: Path) -> None:
    source = make_moe("qwen3_moe", tmp_path)
    model = load(source, quantization_config=BitLabConfig())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    packed = deploy(load(source, quantization_config=BitLabConfig()))
    for target, given in ((model, packed.state_dict()), (packed, state)):
        with pytest.raises(RuntimeError, match=r"experts\.gate_up_proj\w* is (packed|latent), but"):
            target.load_state_dict(given, strict=False)
