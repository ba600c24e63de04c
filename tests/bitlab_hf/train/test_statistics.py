"""What is counted during training, against a slow count, and where it goes."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from bitcore.config import BitQuantConfig
from bitcore.errors import ArgumentError, CheckpointError
from bitcore.packing import pack_ternary, unpack_ternary
from bitcore.quantize import group_scale, quantize_activation, ternarize, weight_scale
from bitlab_hf import BitLabConfig
from bitlab_hf.model.tree import quantized_layers
from bitlab_hf.train import TernaryStatistics
from bitlab_hf.train import statistics_measure as measure
from bitlab_hf.train.statistics_files import (
    HISTOGRAMS_FILE,
    STATISTICS_FILE,
    RunFiles,
    read_histograms,
    read_statistics,
    write_atomically,
)
from bitlayers import BitLinear
from tests.bitlab_hf.models import make_float_model, training_data


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_float_model("llama", tmp_path_factory.mktemp("source"))


def load(source: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig(**fields))


def make_trainer(model: Any, folder: Path, **changes: Any) -> Trainer:
    callbacks = changes.pop("callbacks", None)
    values = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-2,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 2,
    }
    data = training_data()
    return Trainer(
        model=model,
        args=TrainingArguments(**{**values, **changes}),
        train_dataset=data,
        eval_dataset=data[:2],
        callbacks=callbacks,
    )


class Slow(TrainerCallback):
    """Counts the codes in the plainest way, keeps the inputs; at every second step."""

    def __init__(self, model: Any) -> None:
        self.layers = {one.names[0]: one.module for one in quantized_layers(model)}
        self.codes = {name: self._codes(layer) for name, layer in self.layers.items()}
        self.found: list[dict[str, dict[str, float]]] = []
        self.inputs: dict[str, list[Tensor]] = {}
        for name, layer in self.layers.items():
            layer.register_forward_pre_hook(self._keep(name))

    @staticmethod
    def _codes(layer: Any) -> Tensor:
        weight = layer.weight.detach()
        return ternarize(weight, weight_scale(weight, "per_tensor"))

    def _keep(self, name: str) -> Any:
        def hook(layer: Any, inputs: Any) -> None:
            self.inputs.setdefault(name, []).append(inputs[0].detach().clone())

        return hook

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.inputs = {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 2:
            return
        found = {}
        for name, layer in self.layers.items():
            codes, before = self._codes(layer), self.codes[name]
            self.codes[name] = codes
            quantized = torch.cat([quantize_activation(x, False)[0] for x in self.inputs[name]])
            found[name] = {
                "negative": (codes == -1).double().mean().item(),
                "zero": (codes == 0).double().mean().item(),
                "positive": (codes == 1).double().mean().item(),
                "flipped": (codes != before).double().mean().item(),
                "scale": weight_scale(layer.weight.detach(), "per_tensor").item(),
                "saturated": (quantized.int().abs() >= 127).double().mean().item(),
                "input_max": max(x.abs().max().item() for x in self.inputs[name]),
            }
        self.found.append(found)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_values_are_those_of_a_slow_count(
    source: Path, tmp_path: Path, accumulate: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    model = load(source)
    slow = Slow(model)
    trainer = make_trainer(
        model,
        tmp_path,
        callbacks=[slow],
        gradient_accumulation_steps=accumulate,
        report_to="tensorboard",
    )
    TernaryStatistics().attach(trainer)
    trainer.train()
    header, entries = read_statistics(tmp_path)
    counted = [entry for entry in entries if "flipped" in entry]
    assert [entry["step"] for entry in counted] == [2, 4]
    assert header["layers"] == list(slow.layers)
    for entry, expected in zip(counted, slow.found, strict=True):
        for index, name in enumerate(header["layers"]):
            for quantity, value in expected[name].items():
                assert entry[quantity][index] == pytest.approx(value, rel=1e-5), (name, quantity)
        assert entry["logs"]["loss"] > 0
    assert max(slow.found[0][name]["flipped"] for name in slow.layers) > 0
    # TensorBoard has the layers; what is printed and saved in every checkpoint has the sums.
    board = EventAccumulator(str(tmp_path / "board"))
    board.Reload()
    first = header["layers"][0]
    shown = board.Scalars(f"train/ternary/{first}/flipped")
    assert [event.value for event in shown] == pytest.approx(
        [found[first]["flipped"] for found in slow.found]
    )
    history = [entry for entry in trainer.state.log_history if "ternary/flipped" in entry]
    assert len(history) == 2
    assert not any(key.count("/") > 1 for entry in history for key in entry)
    sizes = [layer.weight.numel() for layer in slow.layers.values()]
    total = sum(
        size * slow.found[1][name]["zero"] for name, size in zip(slow.layers, sizes, strict=True)
    )
    assert history[1]["ternary/zero"] == pytest.approx(total / sum(sizes))
    # No hook is left.
    assert all(len(layer._forward_pre_hooks) == 1 for layer in slow.layers.values())


def test_training_is_the_same_with_and_without(source: Path, tmp_path: Path) -> None:
    states = []
    for watched in (False, True):
        model = load(source)
        callbacks = [TernaryStatistics()] if watched else []
        make_trainer(model, tmp_path, callbacks=callbacks).train()
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_histograms_are_of_all_weights_and_know_the_codes(source: Path, tmp_path: Path) -> None:
    model = load(source, weight_granularity="per_group", group_size=64)
    trainer = make_trainer(model, tmp_path, max_steps=8, logging_steps=1)
    TernaryStatistics(histograms=3).attach(trainer)
    trainer.train()
    found = read_histograms(tmp_path)
    assert [one["step"] for one in found["snapshots"]] == [0, 4, 8]
    for one in quantized_layers(model):
        layer = one.module
        counts = torch.tensor(found["snapshots"][-1]["layers"][one.names[0]])
        assert counts.sum() == layer.weight.numel()
        qweight, row, multiplier = layer.build_deployment()
        scale = group_scale(row, multiplier)
        codes = unpack_ternary(qweight, layer.out_features)
        assert counts.sum(1).tolist() == [int((codes == code).sum()) for code in (-1, 0, 1)]
        ratio = layer.weight.detach() / scale.repeat_interleave(64, 1)
        # Between -0.5 and 0.5: bins 25 to 34, where the default scheme's codes are 0.
        middle = int(((ratio >= -0.5) & (ratio < 0.5)).sum())
        assert abs(int(counts[:, 25:35].sum()) - middle) <= 2
        assert counts[1, :25].sum() + counts[1, 35:].sum() <= 2
        # The layer's scale is the mean of its groups'.
        last = [entry for entry in read_statistics(tmp_path)[1] if "scale" in entry][-1]
        names = [held.names[0] for held in quantized_layers(model)]
        assert last["scale"][names.index(one.names[0])] == pytest.approx(
            float(scale.mean()), rel=1e-5
        )


def test_resume(source: Path, tmp_path: Path) -> None:
    """Flips across a resume are right where the checkpoint's step was logged, absent elsewhere."""
    options = {"max_steps": 6, "logging_steps": 2, "save_strategy": "steps"}
    straight = tmp_path / "straight"
    TernaryStatistics().attach(trainer := make_trainer(load(source), straight, **options))
    trainer.train()
    expected = {e["step"]: e for e in read_statistics(straight)[1] if "flipped" in e}
    for save_steps, right in ((2, True), (3, False)):
        run = tmp_path / f"saved-{save_steps}"
        for resume in (None, str(run / f"checkpoint-{save_steps}")):
            model = load(source)
            trainer = make_trainer(model, run, save_steps=save_steps, **options)
            TernaryStatistics().attach(trainer)
            trainer.train(resume_from_checkpoint=resume)
        entries = [entry for entry in read_statistics(run)[1] if "flipped" in entry]
        assert [entry["step"] for entry in entries] == [2, 4, 6]
        after = entries[1]
        assert after["zero"] == expected[4]["zero"]
        assert entries[2]["flipped"] == expected[6]["flipped"]
        if right:
            assert after["flipped"] == expected[4]["flipped"]
        else:
            assert set(after["flipped"]) == {None}
        assert read_histograms(run)["snapshots"][0]["step"] == 0


def test_evaluations_before_and_after_training_are_kept(source: Path, tmp_path: Path) -> None:
    trainer = make_trainer(load(source), tmp_path)
    TernaryStatistics(activations=False, histograms=0).attach(trainer)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    after = trainer.evaluate()["eval_loss"]
    _, entries = read_statistics(tmp_path)
    losses = [(e["step"], e["logs"]["eval_loss"]) for e in entries if "eval_loss" in e["logs"]]
    assert losses == [(0, pytest.approx(before, rel=1e-5)), (4, pytest.approx(after, rel=1e-5))]
    assert not (tmp_path / HISTOGRAMS_FILE).exists()
    assert {value for entry in entries for value in entry.get("saturated", [])} == {None}


def test_every_epoch(source: Path, tmp_path: Path) -> None:
    trainer = make_trainer(
        load(source), tmp_path, max_steps=-1, num_train_epochs=2, logging_strategy="epoch",
        per_device_train_batch_size=16,
    )  # fmt: skip
    TernaryStatistics().attach(trainer)
    trainer.train()
    counted = [entry for entry in read_statistics(tmp_path)[1] if "flipped" in entry]
    assert [entry["step"] for entry in counted] == [2, 4]
    assert {value for entry in counted for value in entry["saturated"]} == {None}


def test_models_without_latent_layers_are_refused(source: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source)
    trainer = make_trainer(model, tmp_path, callbacks=[TernaryStatistics()])
    with pytest.raises(ArgumentError, match="must have latent BitLab layers"):
        trainer.train()
    for count in (1, -1):
        with pytest.raises(ArgumentError, match="histograms"):
            TernaryStatistics(histograms=count)


def test_counts_of_packed_codes() -> None:
    """Every number of rows modulo 4: padding is not counted."""
    for rows in (1, 2, 3, 4, 5, 13):
        generator = torch.Generator().manual_seed(rows)
        first, second = torch.randint(-1, 2, (2, rows, 7), generator=generator, dtype=torch.int8)
        packed = pack_ternary(first)
        expected = [int((first == code).sum()) for code in (-1, 0, 1)]
        assert measure.code_counts(packed, rows).tolist() == expected
        changed = measure.changed_codes(packed, pack_ternary(second))
        assert changed == int((first != second).sum())
        assert measure.changed_codes(packed, packed) == 0


def test_inputs_that_are_not_quantized() -> None:
    layers = {"a": BitLinear(64, 8, quant_config=BitQuantConfig(activation_dtype="float32"))}
    watch = measure.InputWatch(layers)
    watch.start()
    layers["a"](torch.full((2, 64), -3.0))
    watch.stop()
    assert watch.read("a") == (None, 3.0)
    assert watch.read("b") == (None, None)


def test_sharded_weights_are_gathered(tmp_path: Path) -> None:
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        layer = BitLinear(64, 10)
        whole = layer.weight.detach().clone()
        expected = layer.build_deployment()
        mesh = init_device_mesh("cpu", (1,))
        layer.weight = nn.Parameter(distribute_tensor(whole, mesh, [Shard(0)]))
        sharded = layer.weight
        with measure.whole_weights(layer) as there:
            assert there
            assert torch.equal(layer.build_deployment()[0], expected[0])
        assert layer.weight is sharded
    finally:
        torch.distributed.destroy_process_group()
    layer = BitLinear(64, 10)
    layer.weight = nn.Parameter(torch.empty(0))
    with measure.whole_weights(layer) as there:
        assert not there


def test_files(tmp_path: Path) -> None:
    files = RunFiles(tmp_path, ["a"], 0)
    files.add(1, {"loss": math.nan, "text": "x"}, {"zero": [0.25]})
    files.add(2, {"loss": 1.5}, {"zero": [0.5]})
    path = tmp_path / STATISTICS_FILE
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    _, entries = read_statistics(tmp_path)
    assert [entry["step"] for entry in entries] == [1, 2]
    assert entries[0]["logs"] == {"loss": None}
    # A resume at step 1 drops what came after; other layers begin anew.
    RunFiles(tmp_path, ["a"], 1)
    assert [entry["step"] for entry in read_statistics(tmp_path)[1]] == [1]
    RunFiles(tmp_path, ["b"], 1)
    assert read_statistics(tmp_path)[1] == []
    path.write_text("nonsense\n")
    with pytest.raises(CheckpointError, match="must hold lines of JSON"):
        read_statistics(tmp_path)
    (tmp_path / HISTOGRAMS_FILE).write_text(json.dumps({"version": 2}))
    with pytest.raises(CheckpointError, match="must be JSON of version 1"):
        read_histograms(tmp_path)


def test_a_failed_write_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, "old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
