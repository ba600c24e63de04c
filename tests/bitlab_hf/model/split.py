"""Runs the models that `test_tensor_parallel` looks at: in one process, then in two on gloo.

python -m tests.bitlab_hf.model.split FOLDER
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
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DistributedConfig

from bitcore import gradients
from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.interop.gguf import export_gguf
from bitlab_hf.model.parts import parts
from tests.bitlab_hf.experts import make_moe
from tests.bitlab_hf.models import make_float_model, token_ids
from tests.bitlab_hf.train.parallel import is_main, launch, message, world

# Two processes have 64 of the 128 inputs of the attention's output, and so whole groups.
SIZES = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 256, "num_key_value_heads": 2}
SCHEMES: dict[str, tuple[str, dict[str, Any]]] = {
    "channel": ("llama", {"weight_granularity": "per_channel"}),
    "tensor": ("qwen2", {"weight_granularity": "per_tensor", "head": "int8"}),
    "groups": ("qwen2", {"weight_granularity": "per_group", "group_size": 64}),
    "floats": (
        "llama",
        {"weight_granularity": "per_group", "group_size": 64, "group_scale_dtype": "float32"},
    ),
    "activations": (
        "llama",
        {"weight_granularity": "per_channel", "activation_granularity": "per_tensor"},
    ),
    "experts": ("qwen3_moe", {"weight_granularity": "per_channel"}),
    "dispatched": ("qwen3_moe", {"weight_granularity": "per_channel"}),
    "tensorwise": (
        "granitemoe", {"weight_granularity": "per_tensor", "activation_granularity": "per_tensor"}
    ),
    "grouped": ("mixtral", {"weight_granularity": "per_group", "group_size": 64}),
}  # fmt: skip
# Whose experts are spread over the processes, beside the layers.
DISPATCHED: dict[str, dict[str, Any]] = {
    "dispatched": {"ep_size": 2},
    "tensorwise": {"ep_size": 2},
    "grouped": {"ep_size": 2, "ep_implementation": "all_reduce"},
}
# How many layers and experts of each are in parts; of all others, 14.
PARTS = {"experts": 8, "dispatched": 10, "tensorwise": 2, "grouped": 10}
# Three of the experts of a token have more than one order to be added up in; heads of 64 inputs
# leave whole groups.
MOE = {"num_experts_per_tok": 3, "num_experts": 4, "head_dim": 32}

STEPS = 3


def load(folder: Path, parallel: dict[str, Any] | None = None, **options: Any) -> Any:
    if world() > 1:
        options["distributed_config"] = DistributedConfig(tp_size=world(), **(parallel or {}))
    return AutoModelForCausalLM.from_pretrained(folder, **options)


def infer(model: Any) -> dict[str, Tensor]:
    ids = token_ids()
    with torch.no_grad():
        hidden = model.model(input_ids=ids).last_hidden_state
        logits = model(input_ids=ids).logits
    tokens = model.generate(
        ids[:, :7], attention_mask=torch.ones_like(ids[:, :7]), max_new_tokens=8,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return {"hidden": hidden, "logits": logits, "tokens": tokens}


def whole(tensor: Any) -> Tensor:
    found: Tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return found.detach().clone().contiguous()


def train(model: Any) -> dict[str, Tensor]:
    """Three steps, with the gradients of the first."""
    ids, found, losses = token_ids(), {}, []
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0.1)
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.detach())
        if step == 0:
            found = {
                f"grad.{name}": whole(one.grad)
                for name, one in model.named_parameters()
                if one.grad is not None
            }
        optimizer.step()
    with torch.no_grad():
        logits = model.eval()(input_ids=ids).logits
    return {**found, "losses": torch.stack(losses), "logits": logits}


def keep(found: dict[str, Tensor], folder: Path, name: str) -> None:
    if world() == 1 or is_main():
        save_file(found, folder / f"{name}-{world()}.safetensors")


def run(folder: Path, name: str, source: Path) -> None:
    """A scheme: trained, and its deployed folder run and saved again."""
    parallel = DISPATCHED.get(name)
    model = load(source, parallel, quantization_config=BitLabConfig(**SCHEMES[name][1]))
    keep(train(model), folder, f"{name}-trained")
    save(model, folder / f"{name}-latent-{world()}")
    if world() == 1:
        deploy(model)
        save(model, folder / name)
    model = load(folder / name, parallel)
    if world() > 1:
        assert len(parts(model)) == PARTS.get(name, 14)
    keep(infer(model), folder, name)
    save(model, folder / f"{name}-again-{world()}")
    model.save_pretrained(folder / f"{name}-plain-{world()}")


def pack_at_load(folder: Path, sources: dict[str, Path]) -> Any:
    """Loads float models to be run; returns the first of them."""
    config = {"weight_granularity": "per_channel"}
    found = {
        name: load(
            sources[name], DISPATCHED.get(name),
            quantization_config=BitLabConfig(mode="infer", **config),
        )
        for name in ("channel", "dispatched")
    }  # fmt: skip
    for name, model in found.items():
        keep(infer(model), folder, f"{name}-at-load")
    return found["channel"]


def two(folder: Path, sources: dict[str, Path]) -> None:
    """What two processes do."""
    for name in SCHEMES:
        run(folder, name, sources[name])
    config = {"weight_granularity": "per_channel"}
    packed = pack_at_load(folder, sources)
    latent = load(sources["channel"], quantization_config=BitLabConfig(**config))
    experts = load(
        sources["tensorwise"], DISPATCHED["tensorwise"], quantization_config=BitLabConfig(**config)
    )
    deployed = load(folder / "tensorwise", DISPATCHED["tensorwise"])
    messages = {
        "export": message(lambda: export_gguf(packed, folder / "exported.gguf")),
        "dequantize": message(packed.dequantize),
        "deploy": message(lambda: deploy(latent)),
        "experts deploy": message(lambda: deploy(experts)),
        "experts dequantize": message(deployed.dequantize),
    }
    for name, changes in REFUSED.items():
        distributed = DistributedConfig(**{"tp_size": world(), **changes.pop("parallel", {})})
        place = sources[changes.pop("source", "channel")]
        messages[name] = message(
            partial(
                AutoModelForCausalLM.from_pretrained, place,
                quantization_config=BitLabConfig(**changes), distributed_config=distributed,
            )
        )  # fmt: skip
    (folder / f"messages-{os.environ['RANK']}.json").write_text(json.dumps(messages))
    dist.barrier()


REFUSED: dict[str, dict[str, Any]] = {
    "plan": {"parallel": {"tp_plan": {"model.layers.*.mlp.up_proj": "colwise"}}},
    "learned": {"weight_quantizer": "absmax"},
    "groups": {"weight_granularity": "per_group", "group_size": 128},
    "norm": {"sub_norm": ["down_proj"]},
    "no plan": {"parallel": {"tp_plan": {}}},
    "expert plan": {
        "source": "tensorwise",
        "parallel": {
            "ep_size": 2,
            "ep_plan": {"model.layers.*.block_sparse_moe.experts": "rowwise"},
        },
    },
    "heads": {"source": "heads"},
    "odd": {"source": "odd", "parallel": DISPATCHED["tensorwise"]},
}


def main(folder: Path) -> None:
    # As with many tokens: the backward pass packs the weights again.
    gradients._REPACKED_TOKENS = 1
    torch.set_num_threads(1)
    sources = {kind: make_float_model(kind, folder, **SIZES) for kind in ("llama", "qwen2")}
    for kind in ("qwen3_moe", "granitemoe", "mixtral"):
        sources[kind] = make_moe(kind, folder, **MOE)
    given = {name: sources[kind] for name, (kind, _) in SCHEMES.items()}
    for name, source in given.items():
        run(folder, name, source)
    pack_at_load(folder, given)
    given["heads"] = make_float_model("gemma", folder)
    given["odd"] = make_moe("qwen3_moe", folder / "odd")
    launch(2, folder / "store", partial(two, folder, given))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
