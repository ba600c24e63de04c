"""Stock ``bitnet`` checkpoints, built with transformers' own classes, and stock transformers alone.

Run as a script, ``python stock.py FOLDER OUTPUT``, in an environment without BitLab, it writes the
logits and greedy tokens of a folder.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    BitNetConfig,
    BitNetForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.integrations.bitnet import pack_weights

if TYPE_CHECKING:
    from tests.processes import Elsewhere

ROOT = Path(__file__).parents[3]
SIZES: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
ARCHITECTURES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "bitnet": lambda: BitNetForCausalLM(BitNetConfig(**SIZES)),
    "tied": lambda: BitNetForCausalLM(BitNetConfig(**SIZES, tie_word_embeddings=True)),
}


def build(name: str, folder: Path, dtype: torch.dtype = torch.float32, **fields: Any) -> Path:
    """Writes a stock checkpoint with these fields of its quantization_config."""
    torch.manual_seed(0)
    model = ARCHITECTURES[name]().to(dtype)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "norm" in key:
                parameter.add_(0.1 * torch.randn_like(parameter))
    config = {"quant_method": "bitnet", "linear_class": "bitlinear", **fields}
    state = dict(model.state_dict())
    packed = config["linear_class"] == "bitlinear" or config.get("quantization_mode") != "online"
    for key, module in model.named_modules():
        if not isinstance(module, nn.Linear) or key == "lm_head":
            continue
        if config.get("use_rms_norm"):
            state[f"{key}.rms_norm.weight"] = 1 + 0.1 * torch.randn(module.in_features, dtype=dtype)
        if packed:
            weight = module.weight.float()
            scale = weight.abs().mean().clamp(min=1e-5)
            codes = (weight / scale).round().clamp(-1, 1)
            state[f"{key}.weight"] = pack_weights(codes.clone().to(torch.int8))
            stored = 1 / scale if config["linear_class"] == "bitlinear" else scale
            state[f"{key}.weight_scale"] = stored.reshape(1).to(dtype)
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    folder.mkdir(parents=True, exist_ok=True)
    model.config.dtype = dtype
    model.config.architectures = [type(model).__name__]
    model.config.quantization_config = config
    model.config.save_pretrained(folder)
    save_file(
        {k: v.contiguous() for k, v in state.items()},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    return folder


def token_ids() -> Tensor:
    return torch.randint(3, 97, (2, 24), generator=torch.Generator().manual_seed(7))


@torch.no_grad()
def outputs(model: Any) -> dict[str, Tensor]:
    """Float32 logits and greedy tokens."""
    ids = token_ids()
    tokens = model.generate(
        ids[:1], attention_mask=torch.ones_like(ids[:1]), max_new_tokens=16, do_sample=False
    )
    return {"logits": model(input_ids=ids).logits.float(), "tokens": tokens}


def stock_outputs(stock: Elsewhere, folder: Path, scratch: Path) -> dict[str, Tensor]:
    """`outputs` of stock transformers, in an environment without BitLab."""
    file = scratch / "stock.safetensors"
    done = stock.run(__file__, folder, file)
    assert done.returncode == 0, done.stderr
    assert "newly initialized" not in done.stderr
    return dict(load_file(file))


def rewrite_config(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"].update(fields)
    (folder / "config.json").write_text(json.dumps(config))


def _main() -> None:
    folder, file = sys.argv[1:]
    for name in ("bitcore", "bitlayers", "bitlab_hf", "bitlab_autoload"):
        assert importlib.util.find_spec(name) is None
    # Its functions are compiled; what is compared here is their arithmetic.
    torch.compiler.set_stance("force_eager")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    save_file({k: v.contiguous() for k, v in outputs(model).items()}, file)


if __name__ == "__main__":
    _main()
