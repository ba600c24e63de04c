"""Files of version 1, mixtures of versions, and damage to the multipliers of groups."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bitcore import use_backend
from bitcore.errors import CheckpointError, ConfigError
from bitcore.packing import pack_ternary, unpack_ternary
from bitcore.quantize import quantize_activation, ternarize, weight_scale
from bitlab_hf import BitLabConfig, deploy, save
from tests.bitlab_hf.checkpoint.test_groups import (
    FLOATS,
    GROUPS,
    NAME,
    load,
    packed,
    rewrite_scheme,
    scheme_in,
    tensors_of,
)
from tests.bitlab_hf.models import logits_of, make_float_model, rewrite

MULTIPLIER = f"{NAME}.qweight_multiplier"


def as_first_version(folder: Path) -> None:
    """Makes a file's configuration that of a BitLab which knew one scale a group only."""
    rewrite_scheme(folder, drop=("group_scale_dtype",), format_version=1)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


@pytest.fixture(scope="module")
def written(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return packed(source, tmp_path_factory.mktemp("packed") / "groups", **GROUPS)


@pytest.fixture
def file(written: Path, tmp_path: Path) -> Path:
    """A copy, for a test to change."""
    return Path(shutil.copytree(written, tmp_path / "groups"))


# Files of version 1.


def first_version(source: Path, folder: Path, **fields: Any) -> Path:
    """Writes a deployed file as version 1 has it, each tensor made from the formulas."""
    packed(source, folder, weight_granularity="per_channel", **fields)
    weights = tensors_of(source)

    def regroup(tensors: dict[str, Tensor]) -> None:
        for name in [key.removesuffix(".qweight") for key in tensors if key.endswith(".qweight")]:
            weight = weights[f"{name}.weight"]
            scale = weight_scale(weight, "per_group_float32", 64)
            tensors[f"{name}.qweight"] = pack_ternary(ternarize(weight, scale))
            tensors[f"{name}.qweight_scale"] = scale

    rewrite(folder, regroup)
    rewrite_scheme(folder, **GROUPS)
    return folder


@pytest.mark.parametrize("activation", ["int8", "float32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_file_of_version_1_computes_what_it_computed(
    tmp_path: Path, activation: str, dtype: torch.dtype
) -> None:
    source = make_float_model("llama", tmp_path, dtype)
    folder = first_version(source, tmp_path / "first", activation_dtype=activation)
    assert scheme_in(folder)["format_version"] == 1
    assert "group_scale_dtype" not in scheme_in(folder)
    model = load(folder, dtype=dtype)
    layer = model.get_submodule(NAME)
    assert layer.quant_config.granularity == "per_group_float32"
    assert layer.qweight_scale.shape == (64, 3)
    expected, x = logits_of(model), torch.randn(5, 192)
    if activation == "int8":
        codes, x_scale = quantize_activation(x, per_tensor=False)
        w = unpack_ternary(layer.qweight, 64).int()
        total = torch.zeros(5, 64)
        for g in range(3):
            part = slice(64 * g, 64 * g + 64)
            total = (
                total + (codes.int()[:, part] @ w[:, part].T).float() * layer.qweight_scale[:, g]
            )
        assert torch.equal(layer(x), total * x_scale)
        with use_backend("reference"):
            assert torch.equal(logits_of(model), expected)
    # Loaded and saved again it stays what it is, and so does a latent one.
    save(model, tmp_path / "again")
    first, second = tensors_of(folder), tensors_of(tmp_path / "again")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert scheme_in(tmp_path / "again")["format_version"] == 1
    scheme = BitLabConfig(activation_dtype=activation, **GROUPS)
    save(load(source, quantization_config=scheme, dtype=dtype), tmp_path / "latent")
    as_first_version(tmp_path / "latent")
    latent = load(tmp_path / "latent", dtype=dtype).eval()
    assert torch.equal(logits_of(latent), expected)
    save(latent, tmp_path / "latent")
    assert scheme_in(tmp_path / "latent")["format_version"] == 1
    at_load = load(tmp_path / "latent", quantization_config=BitLabConfig(mode="infer"), dtype=dtype)
    for one in (at_load, deploy(latent)):
        assert torch.equal(logits_of(one), expected)
        save(one, tmp_path / "deployed")
        assert tensors_of(tmp_path / "deployed").keys() == first.keys()


def test_the_two_versions_differ(source: Path, file: Path, tmp_path: Path) -> None:
    """Else the tests above would not tell which is read."""
    floats = load(packed(source, tmp_path / "floats", **FLOATS))
    assert not torch.equal(logits_of(floats), logits_of(load(file)))


# Files that are not as they should be.


def test_version_1_over_multipliers(file: Path) -> None:
    as_first_version(file)
    message = (
        r"qweight_multiplier must not be in the checkpoint for per_group_float32 weights, got one"
    )
    with pytest.raises(CheckpointError, match=message) as error:
        load(file)
    assert "do not belong together" in str(error.value)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_no_groups_over_multipliers(file: Path, granularity: str) -> None:
    rewrite_scheme(file, weight_granularity=granularity, group_size=None)
    with pytest.raises(CheckpointError, match=f"qweight_multiplier must not .* for {granularity}"):
        load(file)


def test_version_1_with_a_field_of_version_2(file: Path) -> None:
    rewrite_scheme(file, format_version=1)
    with pytest.raises(ConfigError, match="group_scale_dtype must be 'float32' with format_versio"):
        load(file)


def test_version_2_over_a_float_a_group(source: Path, tmp_path: Path) -> None:
    folder = packed(source, tmp_path / "floats", **FLOATS)
    rewrite_scheme(folder, format_version=2, group_scale_dtype="uint8")
    with pytest.raises(
        CheckpointError, match=r"qweight_multiplier must be in the .* got none besi"
    ):
        load(folder)


@pytest.mark.parametrize("keep_metadata", [True, False])
def test_some_layers_with_and_some_without(
    source: Path, file: Path, tmp_path: Path, keep_metadata: bool
) -> None:
    floats = tensors_of(packed(source, tmp_path / "floats", **FLOATS))

    def mix(tensors: dict[str, Tensor]) -> None:
        del tensors[MULTIPLIER]
        for leaf in ("qweight", "qweight_scale"):
            tensors[f"{NAME}.{leaf}"] = floats[f"{NAME}.{leaf}"]

    rewrite(file, mix, keep_metadata)
    with pytest.raises(CheckpointError, match=re.escape(f"{MULTIPLIER} must be in")) as error:
        load(file)
    assert "format_version 1" in str(error.value)
    as_first_version(file)
    with pytest.raises(CheckpointError, match=r"qweight_multiplier must not be in the checkpoint"):
        load(file)


@pytest.mark.parametrize("keep_metadata", [True, False])
def test_a_missing_multiplier(file: Path, keep_metadata: bool) -> None:
    rewrite(file, lambda tensors: tensors.pop(MULTIPLIER), keep_metadata)
    message = f"{MULTIPLIER} must be in the checkpoint, got none\nThe checkpoint is incomplete"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(file)


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda m: m[:, :2].contiguous(), "U8 [64, 2]"),
        (lambda m: m.t().contiguous(), "U8 [3, 64]"),
        (lambda m: m.flatten(), "U8 [192]"),
        (lambda m: m[:0], "U8 [0, 3]"),
        (lambda m: m.flatten()[:0], "U8 [0]"),
        (lambda m: m.float(), "F32 [64, 3]"),
        (lambda m: m.to(torch.int8), "I8 [64, 3]"),
        (lambda m: m.bool(), "BOOL [64, 3]"),
    ],
)
def test_another_shape_or_dtype(file: Path, change: Callable[[Tensor], Tensor], got: str) -> None:
    rewrite(file, lambda tensors: tensors.update({MULTIPLIER: change(tensors[MULTIPLIER])}))
    message = f"{MULTIPLIER} must be uint8 [64, 3] for per_group weights, got {got}"
    with pytest.raises(CheckpointError, match=re.escape(message)):
        load(file)


def put(index: Any, value: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[MULTIPLIER][index] = value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put((5, 1), 128), "multipliers of 0 to 127, got 128"),
        (put((63, 2), 255), "multipliers of 0 to 127, got 255"),
        (put(9, 0), "a multiplier above 0 in every row, got none in row 9"),
        (put(slice(None), 0), "in every row, got none in row 0"),
    ],
)
def test_impossible_multipliers(file: Path, change: Any, message: str) -> None:
    rewrite(file, change)
    with pytest.raises(CheckpointError, match=re.escape(f"{MULTIPLIER} must hold")) as error:
        load(file)
    assert message in str(error.value)
    load(file, quantization_config=BitLabConfig(verify=False))


def test_a_group_of_zeros_is_allowed(file: Path) -> None:
    rewrite(file, put((9, slice(0, 2)), 0))
    layer = load(file).get_submodule(NAME)
    assert not layer.dequantized_weight()[9, :128].any()
    assert layer.dequantized_weight()[9, 128:].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_impossible_scales(file: Path, value: float) -> None:
    rewrite(file, lambda tensors: tensors[f"{NAME}.qweight_scale"][7:8].fill_(value))
    with pytest.raises(CheckpointError, match=re.escape(f"{NAME}.qweight_scale must be finite")):
        load(file)


@pytest.mark.parametrize(
    ("stray", "message"),
    [
        ("lm_head", "lm_head must not be in modules_to_not_convert"),
        ("model.norm", "model.norm must not be in modules_to_not_convert"),
        ("model.layers.0.mlp.other", r"model.layers.0.mlp.other.qweight_multiplier must belong"),
    ],
)
def test_no_multiplier_stays_unclaimed(file: Path, stray: str, message: str) -> None:
    one = torch.ones(4, 1, dtype=torch.uint8)
    rewrite(file, lambda tensors: tensors.update({f"{stray}.qweight_multiplier": one}))
    with pytest.raises(CheckpointError, match=message):
        load(file)


def test_a_skip_list_over_multipliers(file: Path) -> None:
    rewrite_scheme(file, modules_to_not_convert=["lm_head", "down_proj"])
    with pytest.raises(CheckpointError, match="down_proj must not be in modules_to_not_convert"):
        load(file)


def test_a_deployed_model_whose_multiplier_was_lost_is_not_saved(file: Path) -> None:
    """What could not be loaded again takes nothing's place."""
    model = load(file)
    before = tensors_of(file)
    layer: nn.Module = model.get_submodule(NAME)
    del layer.qweight_multiplier
    with pytest.raises(CheckpointError, match=f"{MULTIPLIER} must be in the files, got none"):
        save(model, file)
    assert tensors_of(file).keys() == before.keys()
