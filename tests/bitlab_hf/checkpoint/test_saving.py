"""Atomic saves and whole-model deployment."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from bitcore.errors import ArgumentError, ArgumentTypeError, LifecycleError
from bitlab_hf import BitLabConfig, deploy, replace_linear, save
from bitlab_hf.checkpoint import saving
from bitlab_hf.model.tree import quantized_layers
from tests import processes
from tests.bitlab_hf.models import logits_of, make_float_model


@pytest.fixture
def model(tmp_path: Path) -> Any:
    source = make_float_model("llama", tmp_path)
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig())


def contents(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


class Failing:
    """Fails at the n-th call of a function, after it has done its work or before."""

    def __init__(self, function: Any, after: int) -> None:
        self.function, self.left = function, after

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.left == 0:
            raise OSError(28, "No space left on device")
        self.left -= 1
        return self.function(*args, **kwargs)


@pytest.mark.parametrize("after", range(8))
@pytest.mark.parametrize("point", ["flush", "_exchange", "save_pretrained", "tokenizer"])
def test_a_save_that_fails_leaves_the_previous_one_whole(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: str, after: int
) -> None:
    target = tmp_path / "target"
    save(model, target, max_shard_size="60KB")
    (target / "notes.txt").write_text("mine")
    previous = contents(target)
    with torch.no_grad():
        model.model.norm.weight.add_(1)

    class Tokenizer:
        def save_pretrained(self, folder: Path) -> None:
            (folder / "tokenizer.json").write_text("{}")

    tokenizer = Tokenizer()
    if point == "save_pretrained":
        monkeypatch.setattr(PreTrainedModel, point, Failing(PreTrainedModel.save_pretrained, 0))
    elif point == "tokenizer":
        monkeypatch.setattr(tokenizer, "save_pretrained", Failing(None, 0))
    elif point == "_exchange":
        monkeypatch.setattr(saving, point, Failing(None, 0))
    else:
        monkeypatch.setattr(saving, point, Failing(saving.flush, after))
    failed = False
    try:
        save(model, target, tokenizer=tokenizer)
    except OSError:
        failed = True
    if point != "flush" or after == 0:
        assert failed
    monkeypatch.undo()
    now = contents(target)
    if failed:
        assert now == previous
    assert now["notes.txt"] == b"mine"
    AutoModelForCausalLM.from_pretrained(target)
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".target")] == []


def test_a_save_that_is_killed_leaves_a_whole_checkpoint(model: Any, tmp_path: Path) -> None:
    save(model, tmp_path / "target")
    previous = contents(tmp_path / "target")
    code = f"""
import os, signal, sys
from transformers import AutoModelForCausalLM
import bitlab_hf, bitlab_hf.checkpoint.saving
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "target")!r})
bitlab_hf.checkpoint.saving._exchange = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
bitlab_hf.save(model, {str(tmp_path / "target")!r})
"""
    assert processes.run("-c", code).returncode == -signal.SIGKILL
    assert contents(tmp_path / "target") == previous


def test_where_directories_cannot_be_exchanged(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoExchange:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    save(model, tmp_path / "target")
    (tmp_path / "target" / "notes.txt").write_text("mine")
    monkeypatch.setattr(saving.ctypes, "CDLL", NoExchange)
    expected = logits_of(deploy(model))
    save(model, tmp_path / "target")
    assert (tmp_path / "target" / "notes.txt").read_text() == "mine"
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    assert torch.equal(logits_of(again), expected)


def test_old_shards_go_and_other_files_stay(model: Any, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "target"
    save(model, target, max_shard_size="60KB")
    (target / "checkpoint-1").mkdir()
    (target / "checkpoint-1" / "state").write_text("x")
    save(model, target)
    names = {p.name for p in target.iterdir()}
    assert {"model.safetensors", "config.json", "checkpoint-1"} <= names
    assert not any("-of-" in name or name.endswith("index.json") for name in names)
    (tmp_path / "made").mkdir()
    assert target.stat().st_mode == (tmp_path / "made").stat().st_mode
    (tmp_path / "file").write_text("")
    assert (target / "model.safetensors").stat().st_mode == (tmp_path / "file").stat().st_mode


def test_save_through_a_link(model: Any, tmp_path: Path) -> None:
    save(model, tmp_path / "real")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    expected = logits_of(deploy(model))
    save(model, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "real")
    assert torch.equal(logits_of(again), expected)
    assert {p.name for p in tmp_path.iterdir() if p.name.startswith(".")} == set()


def test_other_processes_than_the_main_one_write_nothing(model: Any, tmp_path: Path) -> None:
    save(model, tmp_path / "target")
    previous = contents(tmp_path / "target")
    save(deploy(model), tmp_path / "target", is_main_process=False)
    assert contents(tmp_path / "target") == previous


def test_save_refuses_the_working_directory_and_pushing(
    model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here" / "below").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here" / "below")
    for directory in (".", "..", str(tmp_path / "here")):
        with pytest.raises(ArgumentError, match="must not hold the working directory"):
            save(model, directory)
    with pytest.raises(ArgumentError, match="push_to_hub must be left out"):
        save(model, "new", push_to_hub=True)
    save(model, "new")
    AutoModelForCausalLM.from_pretrained(tmp_path / "here" / "below" / "new")


def test_save_refuses_other_things(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be a transformers PreTrainedModel, got Linear"):
        save(nn.Linear(4, 4), tmp_path)  # type: ignore[arg-type]


def test_deploy_twice(model: Any) -> None:
    deploy(model)
    with pytest.raises(LifecycleError, match="deployed already"):
        deploy(model)


def test_deploy_refuses_what_it_cannot_pack(model: Any) -> None:
    with pytest.raises(LifecycleError, match="must hold quantized layers, got none"):
        deploy(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(LifecycleError, match=r"Pass model\.module"):
        deploy(nn.DataParallel(model))
    layer = model.model.layers[0].mlp
    wrapper = nn.Module()
    wrapper.base_layer = layer.up_proj
    layer.up_proj = wrapper
    with pytest.raises(LifecycleError, match=r"adapters .*model\.layers\.0\.mlp\.up_proj"):
        deploy(model)
    assert not any(f.module.is_deployed for f in quantized_layers(model))


def test_deploy_refuses_sharded_weights() -> None:
    code = """
import os, torch, torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
from bitlab_hf import deploy, replace_linear
model = replace_linear(torch.nn.Sequential(torch.nn.Linear(64, 64)))
fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
try:
    deploy(model)
except Exception as error:
    print(type(error).__name__, error)
dist.destroy_process_group()
"""
    done = processes.run("-c", code)
    assert "LifecycleError deploy: 0.weight must be a whole, plain tensor" in done.stdout, (
        done.stderr
    )


def test_deploy_is_all_or_nothing(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    last = quantized_layers(model)[-1].module
    monkeypatch.setattr(last, "_perform_deployment", Failing(None, 0))
    expected = logits_of(model)
    with pytest.raises(OSError, match="No space"):
        deploy(model)
    assert not any(f.module.is_deployed for f in quantized_layers(model))
    assert torch.equal(logits_of(model), expected)


def test_a_layer_that_builds_anything_else_stops_deploy_before_any_commit(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = quantized_layers(model)[-1].module
    monkeypatch.setattr(last, "_perform_deployment", lambda: last.weight)
    with pytest.raises(LifecycleError, match="_perform_deployment must return"):
        deploy(model)
    assert not any(f.module.is_deployed for f in quantized_layers(model))


def test_one_weight_with_two_configurations() -> None:
    model = nn.Sequential(nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False))
    model[1].weight = model[0].weight
    replace_linear(model, BitLabConfig(overrides={"1": {"weight_granularity": "per_channel"}}))
    with pytest.raises(ArgumentError, match="0, 1 share one weight"):
        deploy(model)


def test_a_dtype_that_cannot_be_packed_is_named(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig()
    ).double()
    with pytest.raises(ArgumentTypeError, match=r"layers\.0.*weight must be float32.*float64"):
        deploy(model)


def test_deploy_keeps_other_dtypes(tmp_path: Path) -> None:
    source = make_float_model("llama", tmp_path, torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig())
    others = {n: p.dtype for n, p in model.named_parameters() if "_proj" not in n}
    deploy(model)
    assert {n: p.dtype for n, p in model.named_parameters() if "_proj" not in n} == others
