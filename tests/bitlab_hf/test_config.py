from __future__ import annotations

import json
from typing import Any

import pytest
from transformers.quantizers.auto import AutoQuantizationConfig

from bitcore import BitQuantConfig
from bitcore.errors import ConfigError
from bitlab_hf import BitLabConfig

ON_DISK = {
    "quant_method", "format_version", "weight_format", "layer", "modules_to_not_convert",
    "overrides", "head", "weight_quantizer", "weight_granularity", "group_size", "activation_dtype",
    "activation_granularity", "sub_norm",
}  # fmt: skip


def test_a_ternary_embedding_is_of_version_4() -> None:
    config = BitLabConfig(weight_format="packed", embedding="ternary", head="ternary")
    written = config.to_dict()
    assert (written["format_version"], written["embedding"]) == (4, "ternary")
    assert BitLabConfig.from_dict(written).to_dict() == written
    assert "embedding" not in BitLabConfig(weight_format="packed").to_dict()
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "embedding must be 'keep' for latent weights, got 'ternary'\n.*convert_ternary"),
        ({"weight_format": "packed", "head": "int8"}, "head must be 'keep' or 'ternary' beside"),
        ({"weight_format": "packed", "embedding": "int8"}, "embedding must be one of"),
    ]
    for fields, message in cases:
        with pytest.raises(ConfigError, match=message):
            BitLabConfig(**{"embedding": "ternary", **fields})


def test_int8_layers_are_of_version_4() -> None:
    config = BitLabConfig(int8_layers=["model.layers.1.mlp"])
    written = config.to_dict()
    assert (written["format_version"], written["int8_layers"]) == (4, ["model.layers.1.mlp"])
    assert BitLabConfig.from_dict(written).to_dict() == written
    for none in (None, []):
        assert BitLabConfig(int8_layers=none).int8_layers == []
        assert "int8_layers" not in BitLabConfig(int8_layers=none).to_dict()


def test_what_is_written() -> None:
    config = BitLabConfig(mode="infer", latent_dtype="keep", verify=False)
    written = config.to_dict()
    assert set(written) == ON_DISK
    assert written["quant_method"] == "bitlab"
    assert written["format_version"] == 1
    again = AutoQuantizationConfig.from_dict(written)
    assert isinstance(again, BitLabConfig)
    assert again.to_dict() == written
    assert again.mode == "auto"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("head", "int4"),
        ("mode", "inference"),
        ("latent_dtype", "bfloat16"),
        ("verify", "yes"),
        ("verify", 1),
        ("weight_format", "dense"),
        ("activation_dtype", "int4"),
        ("weight_granularity", "per_row"),
        ("activation_granularity", ""),
        ("weight_quantizer", "absmedian"),
        ("group_size", 32),
        ("group_scale_dtype", "float16"),
        ("group_scale_dtype", 8),
    ],
)
def test_a_value_that_is_not_allowed_lists_those_that_are(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be one of") as error:
        BitLabConfig(**{name: value})  # type: ignore[arg-type]
    assert repr(value) in str(error.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"weight_granularty": "per_tensor"}, "fields must be among .*got 'weight_granularty'"),
        ({"format_version": 5}, "at most 4, got 5: the checkpoint was written by a newer BitLab"),
        ({"format_version": 5, "new_field": 1}, "newer BitLab"),
        ({"experts": "float"}, r"experts must be one of \(None, 'keep', 'ternary'\), got 'float'"),
        ({"experts": True}, "experts must be one of"),
        ({"format_version": 0}, "must be at least 1, got 0"),
        ({"format_version": "1"}, "must be an int"),
        ({"quant_method": "bitnet"}, "quant_method must be 'bitlab'"),
        ({"layer": 3}, "layer must be a registered name"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names"),
        ({"modules_to_not_convert": [3]}, "must be a list of names"),
        ({"modules_to_not_convert": ["a", "(b"]}, r"regular expressions, got '\(b': missing \)"),
        ({"modules_to_not_convert": ["(" * 2000 + ")" * 2000]}, "names or regular expressions"),
        ({"modules_to_not_convert": ["a{99999999999}"]}, "names or regular expressions"),
        ({"overrides": ["x"]}, "overrides must be"),
        ({"overrides": {"x": 3}}, "overrides must be"),
        ({"overrides": {"x": {"group": 64}}}, "'group'"),
        ({"overrides": {"x": {"group_size": 64}}}, "group_size must be None"),
        ({"weight_granularity": "per_group"}, "group_size must be one of"),
        ({"overrides": {"x": {"group_scale_dtype": "int8"}}}, "group_scale_dtype must be one of"),
        ({"overrides": {"x": {"group_scale_dtype": ["uint8"]}}}, "group_scale_dtype must be"),
    ],
)
def test_bad_fields(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        BitLabConfig(**fields)


def test_overrides_apply_by_pattern_and_later_ones_win() -> None:
    config = BitLabConfig(
        overrides={
            "*.mlp.*": {"weight_granularity": "per_channel"},
            "*.mlp.down_proj": {"weight_granularity": "per_group", "group_size": 64},
        }
    )
    assert config.layer_config("model.layers.0.self_attn.q_proj") == BitQuantConfig()
    up, down = (
        config.layer_config(f"model.layers.0.mlp.{name}") for name in ("up_proj", "down_proj")
    )
    assert up == BitQuantConfig(weight_granularity="per_channel")
    assert down == BitQuantConfig(weight_granularity="per_group", group_size=64)


@pytest.mark.parametrize("field", [{"format_version": 1}, {"weight_format": "packed"}])
def test_a_file_does_not_decide_how_it_is_loaded(field: dict[str, Any]) -> None:
    held = {"quant_method": "bitlab", "verify": False, "mode": "infer", "latent_dtype": "keep"}
    config = BitLabConfig.from_dict({**held, **field})
    assert (config.verify, config.mode, config.latent_dtype) == (True, "auto", "float32")
    # A user's dict has none of these fields.
    config = BitLabConfig.from_dict(held)
    assert (config.verify, config.mode, config.latent_dtype) == (False, "infer", "keep")


GROUPS = {"weight_granularity": "per_group", "group_size": 64}
NO_GROUPS = {"weight_granularity": "per_tensor", "group_size": None}


@pytest.mark.parametrize(
    ("fields", "version"),
    [
        ({}, 1),
        ({"group_scale_dtype": "float32"}, 1),
        ({"weight_granularity": "per_channel", "group_scale_dtype": "uint8"}, 1),
        (GROUPS, 2),
        ({**GROUPS, "group_scale_dtype": "uint8"}, 2),
        ({**GROUPS, "group_scale_dtype": "float32"}, 1),
        ({"overrides": {"x": GROUPS}}, 2),
        ({"overrides": {"x": GROUPS}, "group_scale_dtype": "float32"}, 1),
        ({"overrides": {"x": {**GROUPS, "group_scale_dtype": "float32"}}}, 1),
        ({**GROUPS, "overrides": {"x": NO_GROUPS}}, 2),
        ({**GROUPS, "overrides": {"x": {"group_scale_dtype": "float32"}}}, 2),
        ({**GROUPS, "overrides": {"*": {"group_scale_dtype": "float32"}, "x": NO_GROUPS}}, 2),
        (
            {**GROUPS, "group_scale_dtype": "float32"}
            | {"overrides": {"x": {"group_scale_dtype": "uint8"}}},
            2,
        ),
        # One override brings the groups, the other their scales, to a module that both name.
        (
            {
                "group_scale_dtype": "float32",
                "overrides": {"x*": GROUPS, "xy": {"group_scale_dtype": "uint8"}},
            },
            2,
        ),
        (
            {
                "group_scale_dtype": "float32",
                "overrides": {"x*": {"group_scale_dtype": "uint8"}, "xy": GROUPS},
            },
            2,
        ),
    ],
)
def test_the_version_is_2_where_groups_have_two_levels(
    fields: dict[str, Any], version: int
) -> None:
    config = BitLabConfig(**fields)
    written = config.to_dict()
    assert written["format_version"] == config.format_version == version
    held = json.dumps(written)
    assert ("group_scale_dtype" in held) == (version == 2)
    assert set(written) - {"group_scale_dtype"} == ON_DISK
    again = BitLabConfig.from_dict(json.loads(held))
    assert again.to_dict() == written
    for name in ("x", "xy", "z"):
        assert again.layer_config(name) == config.layer_config(name)
    # What was given stays: the dict is another's.
    assert config.overrides == fields.get("overrides", {})


def test_groups_of_a_version_1_file_have_float_scales() -> None:
    base = BitLabConfig.from_dict({"quant_method": "bitlab", "format_version": 1, **GROUPS})
    assert base.layer_config("x") == BitQuantConfig(**GROUPS, group_scale_dtype="float32")
    assert base.layer_config("x").granularity == "per_group_float32"
    override = BitLabConfig.from_dict({"format_version": 1, "overrides": {"x": GROUPS}})
    assert override.layer_config("x").granularity == "per_group_float32"
    assert override.layer_config("y") == BitQuantConfig()
    assert {base.to_dict()["format_version"], override.to_dict()["format_version"]} == {1}
    assert BitLabConfig(**GROUPS).layer_config("x").granularity == "per_group"


@pytest.mark.parametrize(
    ("fields", "where"),
    [
        ({"group_scale_dtype": "uint8"}, "group_scale_dtype must"),
        ({**GROUPS, "group_scale_dtype": "uint8"}, "group_scale_dtype must"),
        (
            {**GROUPS, "overrides": {"*.x": {"group_scale_dtype": "uint8"}}},
            r"group_scale_dtype of '\*\.x' must",
        ),
    ],
)
def test_a_file_of_two_versions_is_refused(fields: dict[str, Any], where: str) -> None:
    with pytest.raises(ConfigError, match=f"{where} be 'float32' with format_version 1"):
        BitLabConfig.from_dict({"format_version": 1, **fields})


def test_overrides_out_of_groups_need_not_name_their_scales() -> None:
    for dtype in ("uint8", "float32"):
        config = BitLabConfig(
            **GROUPS,
            group_scale_dtype=dtype,
            overrides={"x": NO_GROUPS, "*.y": {"group_size": 128}},
        )
        assert config.layer_config("x") == BitQuantConfig()
        assert config.layer_config("a.y").group_size == 128
        assert config.layer_config("a.y").group_scale_dtype == dtype


def test_overrides_may_be_whole_configurations() -> None:
    kinds = [
        BitQuantConfig(weight_granularity="per_channel"),
        BitQuantConfig(**GROUPS),
        BitQuantConfig(**GROUPS, group_scale_dtype="float32"),
    ]
    config = BitLabConfig(overrides={str(i): kind.to_dict() for i, kind in enumerate(kinds)})
    assert [config.layer_config(str(i)) for i in range(3)] == kinds
    again = BitLabConfig.from_dict(config.to_dict())
    assert [again.layer_config(str(i)) for i in range(3)] == kinds
