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
from transformers import AutoModelForCausalLM, DistributedConfig, Qwen3MoeConfig

from bitcore import gradients
from bitlab_hf import BitLabConfig, deploy, save
from bitlab_hf.interop.gguf import export_gguf
from bitlab_hf.model.parts import parts
from tests.bitlab_hf.models import VOCABULARY, make_float_model, token_ids
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
}
EXPERTS = Qwen3MoeConfig(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, moe_intermediate_size=64,
    num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=4,
    num_experts_per_tok=2,
)  # fmt: skip

STEPS = 3


def load(folder: Path, **options: Any) -> Any:
    if world() > 1:
        options["distributed_config"] = DistributedConfig(tp_size=world())
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
    model = load(source, quantization_config=BitLabConfig(**SCHEMES[name][1]))
    keep(train(model), folder, f"{name}-trained")
    save(model, folder / f"{name}-latent-{world()}")
    if world() == 1:
        deploy(model)
        save(model, folder / name)
    model = load(folder / name)
    if world() > 1:
        assert len(parts(model)) == (8 if name == "experts" else 14)
    keep(infer(model), folder, name)
    save(model, folder / f"{name}-again-{world()}")
    model.save_pretrained(folder / f"{name}-plain-{world()}")


def two(folder: Path, sources: dict[str, Path]) -> None:
    """What two processes do."""
    for name, source in sources.items():
        run(folder, name, source)
    config = {"weight_granularity": "per_channel"}
    source = sources["channel"]
    packed = load(source, quantization_config=BitLabConfig(mode="infer", **config))
    keep(infer(packed), folder, "at-load")
    latent = load(source, quantization_config=BitLabConfig(**config))
    messages = {
        "export": message(lambda: export_gguf(packed, folder / "exported.gguf")),
        "dequantize": message(packed.dequantize),
        "deploy": message(lambda: deploy(latent)),
    }
    for name, changes in REFUSED.items():
        distributed = DistributedConfig(**{"tp_size": world(), **changes.pop("parallel", {})})
        place = Path(changes.pop("source", source))
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
    "experts": {"parallel": {"ep_size": 2}},
}


def main(folder: Path) -> None:
    # As with many tokens: the backward pass packs the weights again.
    gradients._REPACKED_TOKENS = 1
    torch.set_num_threads(1)
    sources = {kind: make_float_model(kind, folder, **SIZES) for kind in ("llama", "qwen2")}
    sources["qwen3_moe"] = folder / "experts-float"
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(EXPERTS).save_pretrained(sources["qwen3_moe"])
    REFUSED["heads"] = {"source": make_float_model("gemma", folder)}
    given = {name: sources[kind] for name, (kind, _) in SCHEMES.items()}
    for name, source in given.items():
        run(folder, name, source)
    launch(2, folder / "store", partial(two, folder, given))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
