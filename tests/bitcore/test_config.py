from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitcore import BitQuantConfig
from bitcore.config import ALLOWED
from bitcore.errors import BitLabError, ConfigError


def test_defaults_are_the_documented_ones() -> None:
    assert BitQuantConfig().to_dict() == {
        "activation_dtype": "int8",
        "activation_granularity": "per_token",
        "weight_granularity": "per_tensor",
        "group_size": None,
        "group_scale_dtype": None,
        "weight_quantizer": "absmean",
    }


def test_per_channel_activations_are_per_token() -> None:
    assert BitQuantConfig(activation_granularity="per_channel") == BitQuantConfig()


@pytest.mark.parametrize("name", sorted(ALLOWED))
@pytest.mark.parametrize("value", ["nonsense", 3, 64.0, True, ("int8",)])
def test_every_field_refuses_and_lists_what_is_allowed(name: str, value: object) -> None:
    with pytest.raises(ConfigError) as error:
        BitQuantConfig(**{name: value})  # type: ignore[arg-type]
    assert isinstance(error.value, ValueError)
    assert isinstance(error.value, BitLabError)
    for allowed in ALLOWED[name]:
        assert repr(allowed) in str(error.value)
    assert name in str(error.value)
    assert repr(value) in str(error.value)


def test_group_size_belongs_to_per_group() -> None:
    with pytest.raises(ConfigError, match="group_size must be one of"):
        BitQuantConfig(weight_granularity="per_group")
    with pytest.raises(ConfigError, match="group_size must be None"):
        BitQuantConfig(group_size=64)


def test_scales_of_groups_are_in_two_levels_unless_asked_for_as_floats() -> None:
    for group_size in (64, 128):
        config = BitQuantConfig(weight_granularity="per_group", group_size=group_size)
        assert (config.group_scale_dtype, config.granularity) == ("uint8", "per_group")
        assert config == dataclasses.replace(config, group_scale_dtype="uint8")
        older = dataclasses.replace(config, group_scale_dtype="float32")
        assert older.granularity == "per_group_float32"
        assert older != config
    for granularity in ("per_tensor", "per_channel"):
        config = BitQuantConfig(weight_granularity=granularity)
        assert (config.group_scale_dtype, config.granularity) == (None, granularity)
        with pytest.raises(ConfigError, match="group_scale_dtype must be None with"):
            BitQuantConfig(weight_granularity=granularity, group_scale_dtype="uint8")


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        BitQuantConfig().activation_dtype = "float32"  # type: ignore[misc]


@given(
    st.sampled_from(ALLOWED["activation_dtype"]),
    st.sampled_from(ALLOWED["activation_granularity"]),
    st.sampled_from(
        [
            ("per_tensor", None, None),
            ("per_channel", None, None),
            ("per_group", 64, None),
            ("per_group", 64, "float32"),
            ("per_group", 128, "uint8"),
        ]
    ),
)
def test_round_trip(
    dtype: str, granularity: str, weights: tuple[str, int | None, str | None]
) -> None:
    config = BitQuantConfig(
        activation_dtype=dtype,
        activation_granularity=granularity,
        weight_granularity=weights[0],
        group_size=weights[1],
        group_scale_dtype=weights[2],
    )
    assert BitQuantConfig.from_dict(config.to_dict()) == config


def test_from_dict_refuses_unknown_keys() -> None:
    with pytest.raises(ConfigError, match="'group'.*"):
        BitQuantConfig.from_dict({"group": 64})
