"""Runs the trainings that `test_sharded` looks at: one process, then two and four on gloo.

python -m tests.bitlab_hf.model.sharded FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from torch import Tensor
from transformers import AutoModelForCausalLM, DistributedConfig, Trainer, TrainingArguments

from bitlab_hf import BitLabConfig, save
from bitlab_hf.train import BitLabTrainer
from tests.bitlab_hf.experts import make_moe
from tests.bitlab_hf.model.split import MOE, SIZES, keep, whole
from tests.bitlab_hf.models import VOCABULARY, make_float_model, training_data
from tests.bitlab_hf.train.parallel import is_main, launch, make_arguments, message, world

# Which model, how it is quantized, and how it is spread. Two processes of a kind of parallel that
# shares no batch have half of it each.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, int]]] = {
    "tensor": ("llama", {"weight_granularity": "per_tensor"}, {"tp_size": 2, "fsdp_size": 2}),
    "experts": ("gpt_oss", {"weight_granularity": "per_channel"}, {"fsdp_size": 2, "ep_size": 2}),
    "both": (
        "qwen3_moe",
        {"weight_granularity": "per_group", "group_size": 64},
        {"tp_size": 2, "fsdp_size": 2, "ep_size": 4},
    ),
}
# By recipe, None of a plain Trainer.
TRAINERS = {"trainer": None, "plain": "plain", "default": "default", "mixture": "plain"}


def rows(sizes: dict[str, int]) -> Tensor:
    """The part of a batch of four that this process trains on."""
    ids = torch.randint(0, VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(3))
    if world() == 1:
        return ids
    part = int(os.environ["RANK"]) // sizes.get("tp_size", 1)
    each = 4 // sizes["fsdp_size"]
    return ids[part * each : (part + 1) * each]


def train(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Two steps, with the gradients of the first; losses are those of the whole batch."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    found, losses = {}, []
    for step in range(2):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach().clone())
        if world() > 1:
            dist.all_reduce(losses[-1])
            losses[-1] /= world()
        if step == 0:
            found = {
                f"grad.{name}": whole(one.grad)
                for name, one in model.named_parameters()
                if one.grad is not None
            }
        optimizer.step()
    return {**found, "losses": torch.stack(losses)}


def run(folder: Path, name: str, source: Path) -> None:
    _, config, sizes = CASES[name]
    options = {"distributed_config": DistributedConfig(**sizes)} if world() > 1 else {}
    model = AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(**config), **options
    )
    keep(train(model, rows(sizes)), folder, name)
    save(model, folder / f"{name}-latent-{world()}")
    if world() > 1:
        packs = partial(
            AutoModelForCausalLM.from_pretrained, source,
            quantization_config=BitLabConfig(mode="infer", **config), **options,
        )  # fmt: skip
        said = message(packs)
        if is_main():
            (folder / f"{name}.txt").write_text(said)


def arguments(folder: Path, **changes: Any) -> TrainingArguments:
    """As with GPUs: accelerate refuses parts of tensor parallel on CPUs."""
    given = make_arguments(folder, per_device_train_batch_size=8, max_steps=3, **changes)
    if world() > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return given


def load_parts(source: Path, **sizes: int) -> Any:
    """Loads a model, in parts where there are several processes."""
    options = {"distributed_config": DistributedConfig(tp_size=2, **sizes)} if world() > 1 else {}
    config = BitLabConfig(weight_granularity="per_channel")
    return AutoModelForCausalLM.from_pretrained(source, quantization_config=config, **options)


def use_trainers(folder: Path, source: Path, mixture: Path) -> None:
    """Trains models in two parts with what a user would train them with."""
    load = partial(load_parts, source)
    data = training_data()
    for name, recipe in TRAINERS.items():
        given = arguments(folder / f"{name}-{world()}", save_only_model=world() > 1)
        kind: Any = Trainer if recipe is None else BitLabTrainer
        more = {} if recipe is None else {"recipe": recipe, "teacher": str(source)}
        trainer = kind(model=load(), args=given, train_dataset=data, eval_dataset=data[:16], **more)
        trainer.train()
        if is_main():
            history = json.dumps(trainer.state.log_history)
            (folder / f"{name}-{world()}.json").write_text(history)
    if world() == 1:
        return
    said = {}
    for name, changes in (("resume", {}), ("teach", {"save_only_model": True})):
        said[name] = message(
            lambda name=name, changes=changes: BitLabTrainer(
                model=load(), train_dataset=data,
                args=arguments(folder / name, eval_strategy="no", **changes),
                recipe="teach" if name == "teach" else "plain", teacher=str(source),
            )
        )  # fmt: skip
    if is_main():
        (folder / "messages.json").write_text(json.dumps(said))


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sources = {"llama": make_float_model("llama", folder, **SIZES)}
    for kind in ("gpt_oss", "qwen3_moe"):
        sources[kind] = make_moe(kind, folder, **MOE)

    def everything() -> None:
        for name, (kind, _, sizes) in CASES.items():
            if world() in (1, sizes.get("tp_size", 1) * sizes["fsdp_size"]):
                run(folder, name, sources[kind])

    everything()
    trainers = partial(use_trainers, folder, sources["llama"], sources["qwen3_moe"])
    trainers()
    launch(4, folder / "store-4", everything)
    launch(2, folder / "store-2", everything)
    launch(2, folder / "store", trainers)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
