"""What of a ``quantization_config`` is served, and what is refused, with the field and the way
out.
"""

from __future__ import annotations

from typing import Any

import pytest

from bitcore.errors import ConfigError
from bitlab_hf import BitLabConfig
from bitlab_vllm.scheme import Scheme

GROUPS = {"weight_granularity": "per_group", "group_size": 64}


def written(**fields: Any) -> dict[str, Any]:
    """What BitLab writes into a deployed folder's config.json."""
    return BitLabConfig(weight_format="packed", **fields).to_dict()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"weight_granularity": "per_channel", "head": "int8"},
        GROUPS,
        {**GROUPS, "group_scale_dtype": "float32"},
        {"activation_dtype": "float32", "sub_norm": ["o_proj", "model.*.down_proj"]},
        {"overrides": {"*.v_proj": GROUPS, "*.0.*": {"activation_dtype": "float32"}}},
        {
            **GROUPS,
            "group_scale_dtype": "float32",
            "overrides": {"*.v_proj": {"weight_granularity": "per_channel", "group_size": None}},
        },
        {"weight_quantizer": "lsq", "activation_granularity": "per_channel"},
        {"int8_layers": ["model.layers.1.mlp.down_proj"], "embedding": "ternary"},
    ],
)
def test_layers_are_read_as_bitlab_hf_reads_them(fields: dict[str, Any]) -> None:
    config = written(**fields)
    scheme, ours = Scheme.from_dict(config), BitLabConfig.from_dict(config)
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj", "o_proj"):
        expected = {**ours.layer_config(name).to_dict(), "weight_quantizer": "absmean"}
        assert scheme.layer_config(name).to_dict() == expected
        assert scheme.norms(name) == ours.norms(name)
    assert (scheme.head, scheme.embedding) == (ours.head, ours.embedding)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"format_version": 9},
            "at most 4 to be served, got 9: .*newer BitLab\n.* `pip install ./packages/vllm`",
        ),
        (
            {"format_version": 3, "experts": "int4"},
            "experts must be one of .*'keep', 'ternary'.* got 'int4'",
        ),
        (
            {"format_version": 4, "embedding": "int8"},
            "embedding must be one of .*'keep', 'ternary'.* got 'int8'",
        ),
        ({"format_version": None}, "format_version must be an int"),
        ({"format_version": True}, "format_version must be an int"),
        ({"weight_format": "latent"}, "'packed' to be served, got 'latent'\nPack it first"),
        ({"quant_method": "fp8"}, "quant_method must be 'bitlab'"),
        ({"layer": "MyLayer"}, "layer must be one of .*got 'MyLayer'\nvLLM runs no layers"),
        ({"head": "int4"}, "head must be one of"),
        ({"activation_granularity": "per_tensor"}, "must be 'per_token' to be served.*\nOne scale"),
        (
            {"overrides": {"*.v_proj": {"activation_granularity": "per_tensor"}}},
            "must be 'per_token' to be served",
        ),
        ({"overrides": {"*.v_proj": {"group_size": 65}}}, "group_size must be one of"),
        ({"overrides": ["v_proj"]}, "overrides must be {pattern"),
        ({"sub_norm": "o_proj"}, "sub_norm must be a list of names"),
        ({"colour": "blue"}, "fields must be among .*got 'colour'"),
    ],
)
def test_what_cannot_be_served_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        Scheme.from_dict({**written(), **change})


def test_experts_are_named_by_their_module_or_their_tensor() -> None:
    overrides = {"*.experts": GROUPS, "*.experts.down_proj": {**GROUPS, "group_size": 128}}
    config = written(experts="ternary", overrides=overrides)
    scheme, ours = Scheme.from_dict(config), BitLabConfig.from_dict(config)
    found = []
    for name in ("gate_up_proj", "down_proj"):
        names = "model.layers.0.mlp.experts", f"model.layers.0.mlp.experts.{name}"
        assert scheme.layer_config(*names) == ours.layer_config(*names)
        found.append(scheme.layer_config(*names).group_size)
    assert found == [64, 128]


def test_an_estimator_that_is_not_registered_is_no_obstacle() -> None:
    assert Scheme.from_dict({**written(), "weight_quantizer": "mine"}).layer_config("q_proj")
