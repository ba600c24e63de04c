"""Runs the trainings that `test_parallel` looks at: one process, then several on gloo.

    python -m tests.bitlab_hf.train.parallel FOLDER

The processes are forked from one that has imported everything, with the variables that torchrun
sets: so two and eight of them cost one start. Each training writes what it saw into FOLDER.
"""

from __future__ import annotations

import json
import math
import os
import resource
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import ParallelismConfig
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module
from transformers import (
    AutoModelForCausalLM,
    DistributedConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from bitcore import gradients
from bitcore.errors import BitLabError
from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.train import RECIPES, BitLabTrainer, Recipe, TernaryStatistics, calibrate
from tests.bitlab_hf.models import make_float_model, taught, training_data

STEPS, BATCH = 6, 8
# Shards are calibrated before they are made, so all of a model at once.
# At this rate, fifteen times that of the commands, norms of 1 would move by a seventh of themselves
# a step, and what sums in another order change would grow with it.
AT_ONCE = replace(RECIPES["default"], rate_magnitude=1.0)
FSDP2 = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]},
}


class FirstGradients(TrainerCallback):
    """Keeps the gradients of the first optimizer step, whole."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any
    ) -> None:
        if state.global_step:
            return
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                self.found[name.removeprefix("module.")] = whole(parameter.grad).clone()


def whole(tensor: Any) -> torch.Tensor:
    full: torch.Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach()


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


def make_arguments(folder: Path, sharded: bool = False, **changes: Any) -> TrainingArguments:
    """Arguments of a run; with ``sharded``, accelerate takes the processes for ones of GPUs.

    On CPUs it leaves its FSDP out, without a word, and takes DDP. All that follows is its own
    code, on gloo.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.pop("ACCELERATE_USE_FSDP", None)
    values: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": BATCH // world(),
        "per_device_eval_batch_size": BATCH // world(),
        "learning_rate": 3e-3,
        "max_grad_norm": 0.0,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 2,
        "disable_tqdm": True,
        "logging_steps": 1,
        **(FSDP2 if sharded else {}),
    }
    arguments = TrainingArguments(**{**values, **changes})
    assert arguments.device.type == "cpu"
    if sharded:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return arguments


def load(source: Path, **fields: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=BitLabConfig(**fields))


def train(
    source: Path,
    folder: Path,
    *,
    sharded: bool = False,
    resume: str | None = None,
    model: Any = None,
    recipe: str | Recipe | None = None,
    statistics: bool = False,
    **changes: Any,
) -> Trainer:
    """Trains; the main process writes losses, first gradients and the last weights to FOLDER."""
    model = load(source) if model is None else model
    arguments, data = make_arguments(folder, sharded, **changes), training_data(48)
    options = {"model": model, "args": arguments, "train_dataset": data, "eval_dataset": data[:16]}
    if recipe is None:
        trainer = Trainer(**options)
    else:
        trainer = BitLabTrainer(**options, recipe=recipe, teacher=str(source))
    gradients = FirstGradients()
    trainer.add_callback(gradients)
    if statistics:
        TernaryStatistics().attach(trainer)
    trainer.train(resume_from_checkpoint=resume)
    state = {name: whole(tensor) for name, tensor in trainer.model.state_dict().items()}
    kind = type(next(iter(trainer.model.parameters()))).__name__
    if is_main():
        folder.mkdir(exist_ok=True, parents=True)
        tensors = {f"grad.{name}": tensor for name, tensor in gradients.found.items()}
        tensors |= {f"last.{name}": tensor.contiguous() for name, tensor in state.items()}
        save_file(tensors, folder / "result.safetensors")
        history = trainer.state.log_history
        calibrated = getattr(trainer, "calibration", None) is not None
        rates = [group["initial_lr"] for group in trainer.optimizer.param_groups]
        result = {"kind": kind, "history": history, "calibrated": calibrated, "rates": rates}
        (folder / "result.json").write_text(json.dumps(result))
    return trainer


def partly_frozen(source: Path) -> Any:
    model = load(source)
    model.model.layers[0].requires_grad_(False)
    model.model.layers[1].self_attn.requires_grad_(False)
    return model


def with_adapter(source: Path) -> Any:
    """A deployed model with a LoRA."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(load(source, mode="infer"), config)


def learned(source: Path) -> Any:
    return load(source, weight_quantizer="lsq", weight_granularity="per_channel")


MODELS = {"frozen": partly_frozen, "adapter": with_adapter, "learned": learned}


def message(run: Callable[[], object]) -> str:
    """Runs what has to fail, and returns what it says."""
    try:
        run()
    except (BitLabError, NotImplementedError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError("nothing was raised")


def broken(source: Path, where: str) -> Any:
    """A model that is not finite in the last process alone, or in its shard of a weight."""
    model, last = load(source), not is_main()
    module, calls = model.model.layers[1].mlp.act_fn, iter(range(100))
    if where == "loss" and last:
        module.register_forward_hook(lambda _m, _i, y: y * math.nan if next(calls) > 1 else y)
    if where == "gradient" and last:
        module.register_full_backward_hook(lambda _m, dx, _dy: (dx[0] * math.nan,))
    if where == "weight":
        with torch.no_grad():
            model.model.layers[0].mlp.up_proj.weight[-1, 5] = math.inf
    return model


def split(source: Path) -> None:
    """Splits a layer as torch's own tensor parallel does, and runs the model."""
    model = load(source).train()
    mesh = init_device_mesh("cpu", (world(),))
    parallelize_module(model, mesh, {"model.layers.0.mlp.up_proj": ColwiseParallel()})
    model(input_ids=torch.arange(8)[None])


def with_parallelism(source: Path, folder: Path, trainer: Any) -> None:
    config = ParallelismConfig(tp_size=world())
    arguments = make_arguments(folder, parallelism_config=config, eval_strategy="no")
    # As with GPUs: on CPUs accelerate has no use for the configuration at all.
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer(model=load(source), args=arguments, train_dataset=training_data()).train()


def two(folder: Path, source: Path, known: Path) -> None:
    """What two processes do."""
    messages = {}
    train(source, folder / "ddp-taught", recipe="teach", save_strategy="no")
    # One process alone: both meet a calibration of other samples, and begin anew.
    if is_main():
        calibrate(load(known), training_data(4), folder=folder / "ddp-teacher" / "calibration")
    dist.barrier()
    for name, sharded in (("ddp", False), ("fsdp2", True)):
        run = partial(train, source, sharded=sharded)
        run(folder / name, statistics=True)
        again = str(folder / name / "checkpoint-2")
        run(folder / f"{name}-resumed", resume=again, statistics=True)
        train(known, folder / f"{name}-teacher", sharded=sharded, recipe=AT_ONCE)
        for kind, make in MODELS.items():
            run(folder / f"{name}-{kind}", model=make(source), max_steps=2)
        for where in ("loss", "gradient", "weight"):
            stops = partial(run, folder / f"{name}-{where}", recipe="plain", eval_strategy="no")
            messages[f"{name} {where}"] = message(
                lambda where=where, stops=stops: stops(model=broken(source, where))
            )
    config = {**FSDP2["fsdp_config"], "state_dict_type": "SHARDED_STATE_DICT"}
    run = partial(train, source, sharded=True, fsdp_config=config)
    run(folder / "shards")
    run(folder / "shards-resumed", resume=str(folder / "shards" / "checkpoint-2"))
    trainer = train(source, folder / "bf16", sharded=True, model=learned(source), bf16=True)
    messages["deploy"] = message(lambda: deploy(trainer.accelerator.unwrap_model(trainer.model)))
    AcceleratorState._reset_state(reset_partial_state=True)
    native = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(),
        distributed_config=DistributedConfig(fsdp_size=world()),
    )  # fmt: skip
    train(source, folder / "native", model=native, save_strategy="no")
    messages["tp torch"] = message(lambda: split(source))
    for trainer_class in (Trainer, BitLabTrainer):
        messages[f"tp {trainer_class.__name__}"] = message(
            lambda kind=trainer_class: with_parallelism(source, folder / "split", kind)
        )
    (folder / f"messages-{os.environ['RANK']}.json").write_text(json.dumps(messages))


def full_disk(folder: Path, source: Path) -> None:
    """A run that cannot write its second checkpoint: the main process ends, with a message."""
    from tests.bitlab_hf.train.test_trainer import FullDisk

    data, arguments = training_data(48), make_arguments(folder / "full", eval_strategy="no")
    trainer = BitLabTrainer(
        model=load(source), args=arguments, train_dataset=data, recipe="plain",
        callbacks=[FullDisk(3)],
    )  # fmt: skip
    try:
        trainer.train()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)


def eight(folder: Path, source: Path, known: Path) -> None:
    """What eight processes do."""
    train(source, folder / "eight", save_strategy="no")
    train(known, folder / "eight-teacher", save_strategy="no", recipe=AT_ONCE)


def _process(rank: int, count: int, store: Path, job: Callable[[], None]) -> None:
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count),
                        ("LOCAL_WORLD_SIZE", count)):  # fmt: skip
        os.environ[name] = str(value)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
    job()
    dist.barrier()
    dist.destroy_process_group()


def launch(count: int, store: Path, job: Callable[[], None]) -> None:
    """Runs a job in processes of their own."""
    mp.start_processes(_process, (count, store, job), nprocs=count, start_method="fork")


def main(folder: Path) -> None:
    # As with many tokens: the backward pass packs weights again, as shards are gathered again.
    gradients._REPACKED_TOKENS = 1
    torch.set_num_threads(1)
    source = make_float_model("llama", folder)
    train(source, folder / "one", statistics=True)
    # Random weights know nothing that a calibrated start could keep.
    known = taught(make_float_model("llama", folder / "known"))
    train(known, folder / "one-teacher", recipe=AT_ONCE)
    train(source, folder / "one-taught", recipe="teach", save_strategy="no")
    for kind, make in MODELS.items():
        train(source, folder / f"one-{kind}", model=make(source), max_steps=2)
    launch(2, folder / "store-2", partial(two, folder, source, known))
    try:
        launch(2, folder / "store-full", partial(full_disk, folder, source))
    except mp.ProcessRaisedException as error:
        (folder / "full.txt").write_text(str(error))
    launch(8, folder / "store-8", partial(eight, folder, source, known))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
