from __future__ import annotations

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
        ({"format_version": 2}, "at most 1, got 2: the checkpoint was written by a newer BitLab"),
        ({"format_version": 2, "new_field": 1}, "newer BitLab"),
        ({"format_version": 0}, "must be 1"),
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
