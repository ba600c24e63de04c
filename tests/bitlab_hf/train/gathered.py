"""Runs the trainings that `test_gather` looks at: two and four processes with FSDP2 on gloo, which
gather weights as floats and packed.

    python -m tests.bitlab_hf.train.gathered FOLDER
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, DistributedConfig

from bitcore import ops
from bitcore.config import BitQuantConfig
from bitlab_hf import BitLabConfig
from bitlab_hf.model.exposed import exposed_weight
from bitlab_hf.train import BitLabTrainer, PackedAllGather, pack_all_gather
from bitlab_hf.train.guard import first_non_finite
from bitlayers import BitLinear, set_quant_strength
from bitlayers.gathered import GatheredWeight
from tests.bitlab_hf.models import make_float_model, training_data
from tests.bitlab_hf.train.parallel import is_main, launch, make_arguments, message, whole

CONFIGS: dict[str, dict[str, Any]] = {
    "tensor": {},
    "channel": {"weight_granularity": "per_channel", "activation_dtype": "float32"},
    "group": {"weight_granularity": "per_group", "group_size": 64},
    "group_float32": {
        "weight_granularity": "per_group", "group_size": 64, "group_scale_dtype": "float32",
    },
}  # fmt: skip
BFLOAT16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
# By name: a configuration and how the model is sharded and run.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in CONFIGS},
    "held": ("channel", {"reshard_after_forward": False}),
    "checkpointed": ("tensor", {"checkpointed": True}),
    "offloaded": ("group", {"offload_policy": CPUOffloadPolicy(pin_memory=False)}),
    "accumulated": ("channel", {"accumulates": True}),
    # Of numbers that bfloat16 holds: where it rounds, codes of floats are others.
    "rounded": ("group", {"rounds": True, "mp_policy": BFLOAT16}),
    "annealed": ("tensor", {"strengths": (0.5, 1.0, 1.0)}),
    "mixed": ("tensor", {"mixed": True}),
}
TOKENS = 5


class Block(nn.Module):
    """Layers whose rows two processes share evenly, one of them to no multiple of four rows."""

    def __init__(self, config: dict[str, Any], checkpointed: bool) -> None:
        super().__init__()
        quant = BitQuantConfig(**config)
        self.up = BitLinear(64, 128, quant_config=quant)
        self.narrow = BitLinear(128, 52, bias=False, quant_config=quant)
        self.down = nn.Linear(52, 64)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        if self.checkpointed and self.training:
            y: Tensor = checkpoint(self._run, x, use_reentrant=False)
            return y
        return self._run(x)

    def _run(self, x: Tensor) -> Tensor:
        return x + self.down(self.narrow(torch.relu(self.up(x))))


def make(config: str, checkpointed: bool = False, mixed: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(*(Block(CONFIGS[config], checkpointed) for _ in range(2)))
    if mixed:
        model[0].up = BitLinear(64, 128, quant_config=BitQuantConfig(weight_quantizer="lsq"))
        model[0].narrow = BitLinear(128, 51, quant_config=BitQuantConfig())
        model[0].down = nn.Linear(51, 64)
        model[1].up = BitLinear(64, 128, quant_config=BitQuantConfig(weight_quantizer="twn"))
        model[1].tied = BitLinear(128, 52, bias=False, quant_config=BitQuantConfig())
        model[1].tied.weight = model[1].narrow.weight
        model.append(Block(CONFIGS[config], checkpointed))
    return model


def shard(model: nn.Sequential, packs: bool, **options: Any) -> list[str]:
    for block in model:
        fully_shard(block, **options)
    fully_shard(model, **options)
    return pack_all_gather(model) if packs else []


def train(
    config: str, packs: bool, strengths: tuple[float, ...] = (1.0, 1.0, 1.0),
    checkpointed: bool = False, mixed: bool = False, accumulates: bool = False,
    rounds: bool = False, **options: Any,
) -> tuple[list[str], dict[str, Tensor]]:  # fmt: skip
    """Three steps on data of each process's own, and an evaluation; the layers that were gathered
    packed.
    """
    model = make(config, checkpointed, mixed)
    shard(model, packs, **options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + dist.get_rank())
    found = {}
    for step, strength in enumerate(strengths):
        set_quant_strength(model, strength)
        optimizer.zero_grad()
        if rounds:
            round_all(model)
        if accumulates:
            model.set_requires_gradient_sync(False)
            model(torch.randn(1, TOKENS, 64)).square().mean().backward()
            model.set_requires_gradient_sync(True)
        loss = model(torch.randn(3, TOKENS, 64)).square().mean()
        loss.backward()
        found[f"{step}.loss"] = loss.detach().clone()
        for name, parameter in model.named_parameters():
            found[f"{step}.grad.{name}"] = whole(parameter.grad).clone()
        optimizer.step()
        for name, tensor in model.state_dict().items():
            assert type(tensor._local_tensor) is Tensor
            found[f"{step}.last.{name}"] = whole(tensor).clone()
    if rounds:
        round_all(model)
    with torch.no_grad():
        found["evaluated"] = model.eval()(torch.randn(3, TOKENS, 64))
    return packed(model), found


@torch.no_grad()
def round_all(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter._local_tensor.copy_(parameter._local_tensor.bfloat16())


def packed(model: nn.Module) -> list[str]:
    return [name for name, one in model.named_modules() if getattr(one, "gathers_packed", False)]


def trainings(folder: Path) -> None:
    names = {}
    for case, (config, options) in CASES.items():
        for kind in ("float", "packed"):
            names[case], found = train(config, kind == "packed", **options)
            if is_main():
                save_file(found, folder / f"{case}-{kind}.safetensors")
    if is_main():
        (folder / "names.json").write_text(json.dumps(names))


class Counting:
    """Counts the bytes that this process sends to be gathered."""

    def __init__(self) -> None:
        self.sent = 0

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False
    ) -> None:
        self.sent += input_tensor.numel() * input_tensor.itemsize
        parts = [*output_tensor.chunk(dist.get_world_size(group))]
        dist.all_gather(parts, input_tensor.clone(), group=group)


def gathered(folder: Path) -> None:
    """What arrives where parameters are rounded to bfloat16, and how much was sent for it."""
    sent, tensors = {}, {}
    for config, fields in CONFIGS.items():
        for kind in ("float", "packed"):
            torch.manual_seed(0)
            layer = BitLinear(256, 1024, bias=False, quant_config=BitQuantConfig(**fields))
            expected = ops.pack_weight(
                layer.weight.detach(), layer.quant_config.granularity, layer.quant_config.group_size
            )
            fully_shard(layer, mp_policy=BFLOAT16)
            if kind == "packed":
                pack_all_gather(layer)
            layer.set_custom_all_gather(counting := Counting())
            layer.unshard()
            sent[f"{config} {kind}"] = counting.sent
            assert layer.weight.dtype == torch.bfloat16
            if kind == "packed":
                assert isinstance(layer.weight, GatheredWeight)
                for index, (one, other) in enumerate(
                    zip(layer.weight.packed, expected, strict=True)
                ):
                    tensors |= {
                        f"{config} {index} arrived": one.clone(),
                        f"{config} {index}": other,
                    }
                shown = exposed_weight(layer)
                shown.sum().backward()
                assert torch.equal(layer.weight.grad, torch.ones(1024, 256, dtype=torch.bfloat16))
                values = ops.unpack_weight(*expected[:2], 1024, torch.bfloat16, *expected[2:])
                tensors |= {f"{config} shown arrived": shown.detach(), f"{config} shown": values}
            layer.reshard()
    if is_main():
        save_file(tensors, folder / "gathered.safetensors")
        (folder / "sent.json").write_text(json.dumps(sent))


def messages(folder: Path) -> None:
    said = {"unsharded": message(lambda: pack_all_gather(make("tensor")))}
    model = make("tensor")
    shard(model, False)
    model(torch.randn(1, 1, 64))
    said["late"] = message(lambda: pack_all_gather(model))
    model = make("channel")
    names = shard(model, True)
    with torch.no_grad():
        model[1].up.weight._local_tensor[3, 5] = torch.inf
    said["finite"] = str(first_non_finite(model, lambda: model(torch.randn(1, 1, 64))))
    assert pack_all_gather(model) == names
    set_quant_strength(model, 0.5)
    said["annealed"] = message(lambda: model(torch.randn(1, 1, 64)))
    model.unshard()
    said["read"] = message(lambda: model[0].up.weight + 1)
    (folder / f"messages-{dist.get_rank()}.json").write_text(json.dumps(said))


def use_trainer(
    folder: Path, source: Path, packs: bool, resume: str | None = None, native: bool = False
) -> None:
    """BitLabTrainer with its guards and statistics; native: loaded in shards by transformers."""
    arguments = make_arguments(
        folder, not native, max_steps=4, per_device_train_batch_size=2,
        save_strategy="no" if native else "steps",
    )  # fmt: skip
    data = training_data(16)
    trainer = BitLabTrainer(
        model=load(source, native), args=arguments, train_dataset=data, eval_dataset=data[:8],
        recipe="plain", callbacks=[PackedAllGather()] if packs else [],
    )  # fmt: skip
    trainer.train(resume_from_checkpoint=resume)
    states = trainer.optimizer.state_dict()["state"].values()
    assert all(type(one["exp_avg"]._local_tensor) is Tensor for one in states)
    state = {name: whole(one).contiguous() for name, one in trainer.model.state_dict().items()}
    if is_main():
        save_file(state, folder / "last.safetensors")
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
        (folder / "packed.json").write_text(json.dumps(packed(trainer.model)))


def load(source: Path, native: bool) -> Any:
    options = {"distributed_config": DistributedConfig(fsdp_size=2)} if native else {}
    return AutoModelForCausalLM.from_pretrained(
        source, quantization_config=BitLabConfig(weight_granularity="per_channel"), **options
    )


def two(folder: Path, source: Path) -> None:
    trainings(folder)
    gathered(folder)
    messages(folder)
    use_trainer(folder / "trainer-float", source, False)
    use_trainer(folder / "trainer-packed", source, True)
    checkpoint = str(folder / "trainer-packed" / "checkpoint-2")
    use_trainer(folder / "trainer-resumed", source, True, checkpoint)
    use_trainer(folder / "trainer-native", source, True, native=True)


def four(folder: Path) -> None:
    """Two copies of the model, each in two shards; and four shards."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "shards"))
    for name, options in (("copies", {"mesh": mesh}), ("four", {})):
        for kind in ("float", "packed"):
            names, found = train("tensor", kind == "packed", **options)
            assert len(names) == (4 if kind == "packed" else 0)
            if is_main():
                save_file(found, folder / f"{name}-{kind}.safetensors")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    source = make_float_model("llama", folder)
    jobs: dict[int, Callable[[], None]] = {
        2: partial(two, folder, source),
        4: partial(four, folder),
    }
    for count, job in jobs.items():
        launch(count, folder / f"store-{count}", job)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
