"""Calibration that was killed goes on where it was, to the same bits."""

from __future__ import annotations

import errno
import os
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from bitcore.errors import CheckpointError, NonFiniteError
from bitlab_hf import BitLabConfig
from bitlab_hf.checkpoint.atomic import DiskFullError
from bitlab_hf.fit import kept
from bitlab_hf.fit.kept import OtherFitError
from bitlab_hf.fit.solve import Moments
from bitlab_hf.fit.streams import Unit
from bitlab_hf.train import calibrate
from bitlayers import set_quant_strength
from tests.bitlab_hf.models import VOCABULARY, make_float_model

GROUPS = {"weight_granularity": "per_group", "group_size": 64}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("float"))


def load(source: Path, **fields: Any) -> Any:
    config = BitLabConfig(**{**GROUPS, "weight_quantizer": "lsq", **fields})
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config)


def samples(seed: int = 5) -> Tensor:
    return torch.randint(0, VOCABULARY, (12, 16), generator=torch.Generator().manual_seed(seed))


class Killed(Exception):  # noqa: N818  (what a kill does)
    pass


def kill_after(layers: int) -> Any:
    def progress(done: int, _all: int, _name: str) -> None:
        if done == layers:
            raise Killed

    return progress


def states_are_equal(one: Any, other: Any) -> bool:
    states = [model.state_dict() for model in (one, other)]
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items())


# The first layer, the middle of a group that reads one input, a whole block, all of them.
@pytest.mark.parametrize("layers", [1, 2, 7, 14])
def test_resumed_is_straight(
    source: Path, tmp_path: Path, layers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight, resumed = load(source), load(source)
    report = calibrate(straight, samples())
    before = {key: value.clone() for key, value in resumed.state_dict().items()}
    with pytest.raises(Killed):
        calibrate(resumed, samples(), folder=tmp_path / "fit", progress=kill_after(layers))
    assert all(torch.equal(value, before[key]) for key, value in resumed.state_dict().items())
    moments: list[str] = []
    original = Unit.moments

    def counted(self: Unit, group: Any, *rest: Any) -> Moments:
        moments.extend(tap.name for tap in group)
        return original(self, group, *rest)

    monkeypatch.setattr(Unit, "moments", counted)
    again = calibrate(resumed, samples(), folder=tmp_path / "fit")
    assert states_are_equal(straight, resumed)
    assert again.layers == report.layers
    # Query, key and value are one group: it is done again where one of them was missing.
    assert len(moments) == 14 - {1: 0, 2: 0, 7: 7, 14: 14}[layers]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"damping": 0.2}, r"with damping 0\.1 instead of 0\.2"),
        ({"rounds": 2}, "with rounds 4 instead of 2"),
        ({"batch_size": 4}, "with batch_size 8 instead of 4"),
        ({"samples": samples(6)}, "with samples"),
    ],
)
def test_other_settings(source: Path, tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(Killed):
        calibrate(load(source), samples(), folder=tmp_path, progress=kill_after(1))
    kept_files = sorted(os.listdir(tmp_path))
    with pytest.raises(OtherFitError, match=message):
        calibrate(load(source), **{"samples": samples(), "folder": tmp_path, **change})
    assert sorted(os.listdir(tmp_path)) == kept_files


def test_other_model(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        calibrate(load(source), samples(), folder=tmp_path, progress=kill_after(3))
    other = load(source)
    other.model.layers[0].self_attn.q_proj.weight.data[0, 0] += 1e-3
    for model in (other, load(source, activation_dtype="float32")):
        with pytest.raises(OtherFitError, match=r"layers\.0\.self_attn\.q_proj had another"):
            calibrate(model, samples(), folder=tmp_path)


def embedding(model: Any) -> None:
    model.model.embed_tokens.weight.data[0, 0] += 1e-3


def norm(model: Any) -> None:
    model.model.norm.weight.data[0] += 1e-3


def head(model: Any) -> None:
    model.lm_head.weight.data[0, 0] += 1e-3


def strength(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.quant_strength = 0.0


def layer_before(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] += 1e-3


def learned_scale(model: Any) -> None:
    model.model.layers[1].mlp.up_proj.learned_scale.data[:] *= 2


# In a whole model a layer before is calibrated too: its own weight says that it is another one.
@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        *product((embedding, norm, head, learned_scale), (None, range(1, 2))),
        (strength, range(1, 2)),
        (layer_before, range(1, 2)),
    ],
)
def test_other_weights_beside_the_layers(
    source: Path, tmp_path: Path, change: Any, blocks: range | None
) -> None:
    fit: dict[str, Any] = {"folder": tmp_path, "blocks": blocks}
    with pytest.raises(Killed):
        calibrate(load(source), samples(), **fit, progress=kill_after(1))
    kept_files = sorted(os.listdir(tmp_path))
    other = load(source)
    change(other)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    seen: list[int] = []
    with pytest.raises(OtherFitError, match="q_proj was found beside other norms, embeddings"):
        calibrate(other, samples(), **fit, progress=lambda done, *_: seen.append(done))
    assert not seen
    assert sorted(os.listdir(tmp_path)) == kept_files
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())
    calibrate(load(source), samples(), **fit)


def test_other_blocks(source: Path, tmp_path: Path) -> None:
    """Layers that were fitted behind float ones are none of a whole model; before any work."""
    model = load(source)
    set_quant_strength(model, 0.0)
    calibrate(model, samples(), folder=tmp_path, blocks=range(1, 2))
    kept_files = sorted(os.listdir(tmp_path))
    seen: list[int] = []
    with pytest.raises(OtherFitError, match=r"with blocks \[1, 2\] instead of None"):
        calibrate(
            load(source), samples(), folder=tmp_path, progress=lambda done, *_: seen.append(done)
        )
    assert not seen
    assert sorted(os.listdir(tmp_path)) == kept_files


def test_stages_share_a_folder(source: Path, tmp_path: Path) -> None:
    """Each of them is of other blocks and of another model, and all go on from there."""
    models = [load(source) for _ in range(2)]
    reports = []
    for model in models:
        set_quant_strength(model, 0.0)
        for blocks in (range(1), range(1, 2)):
            report = calibrate(model, samples(), folder=tmp_path, blocks=blocks)
            reports.append(report.layers)
    assert reports[:2] == reports[2:]
    assert states_are_equal(*models)
    assert len(list(tmp_path.glob("*.safetensors"))) == 14


def test_the_checksum_is_of_values(source: Path) -> None:
    """Not of where they lie, nor of latent weights that calibration itself keeps."""
    model, other = load(source), load(source)
    everything = set(other.modules())
    other.lm_head.weight.data = other.lm_head.weight.data.t().contiguous().t()
    other.model.layers[0].mlp.up_proj.weight.data += 1
    assert kept.fit_of(model, set(model.modules()), None) == kept.fit_of(other, everything, None)
    meta = other.to("meta")
    assert kept.fit_of(meta, everything, None) != kept.fit_of(model, set(model.modules()), None)


def test_damaged_folder(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        calibrate(load(source), samples(), folder=tmp_path, progress=kill_after(3))
    file = tmp_path / "model.layers.0.self_attn.q_proj.safetensors"
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match="q_proj.*must hold a layer"):
        calibrate(load(source), samples(), folder=tmp_path)
    for text in ("{", "[1]", "7"):
        (tmp_path / "calibration.json").write_text(text)
        with pytest.raises(CheckpointError, match="must be a JSON object"):
            calibrate(load(source), samples(), folder=tmp_path)


def test_full_disk(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    straight, resumed = load(source), load(source)
    calibrate(straight, samples())
    save, calls = kept.save_file, [0]

    def full(*args: Any) -> None:
        calls[0] += 1
        if calls[0] == 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(*args)

    monkeypatch.setattr(kept, "save_file", full)
    with pytest.raises(DiskFullError, match=r"gate_proj\.safetensors.*full disk"):
        calibrate(resumed, samples(), folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 4
    calibrate(resumed, samples(), folder=tmp_path)
    assert states_are_equal(straight, resumed)


def test_values_that_overflow_behind_ternary_layers(source: Path, tmp_path: Path) -> None:
    model = load(source)

    def spoil(done: int, _all: int, _name: str) -> None:
        if done == 7:
            # The ternary stream alone meets it: the original one has passed.
            model.model.layers[0].self_attn.o_proj.bias = torch.nn.Parameter(
                torch.full((model.config.hidden_size,), torch.inf)
            )

    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.self_attn\.q_proj reads"):
        calibrate(model, samples(), folder=tmp_path, progress=spoil)
    assert len(list(tmp_path.glob("*.safetensors"))) == 7
