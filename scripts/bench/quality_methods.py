"""The methods that the quality benchmark compares: a float model in, a trained one out."""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from bitlab_hf import BitLabConfig, deploy
from bitlab_hf.train import RECIPES, BitLabTrainer, Recipe, calibrate


@dataclass(frozen=True)
class Method:
    """One way to train a ternary model, or the float one.

    Attributes:
        title: What tables say.
        linear: "float", "auto" (transformers' online `AutoBitLinear`) or "bitlab".
        config: Arguments of `BitLabConfig`.
        recipe: Of `BitLabTrainer`; None for a plain Trainer.
    """

    title: str
    linear: str = "bitlab"
    config: dict[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None


_CHANNEL = {"weight_granularity": "per_channel"}
_LEARNED = {"weight_quantizer": "lsq"}
_KL, _DEFAULT = RECIPES["distill"], RECIPES["default"]
_SAMPLES = _DEFAULT.calibration_samples
METHODS = {
    "float": Method("full precision, fine-tuned", linear="float"),
    "auto": Method("AutoBitLinear online, Trainer", linear="auto"),
    "plain": Method("plain", recipe=Recipe()),
    "kl": Method("distillation", recipe=_KL),
    "default": Method("default: distillation, calibrated start", recipe=_DEFAULT),
    "plain-calibrated": Method("calibrated start", recipe=Recipe(calibration_samples=_SAMPLES)),
    "kl-lsq": Method("distillation, learned scale", config=_LEARNED, recipe=_KL),
    "kl-warmup": Method("distillation, strength warmed up", recipe=replace(_KL, quant_warmup=0.2)),
    "kl-subln": Method(
        "distillation, SubLN", config={"sub_norm": ["o_proj", "down_proj"]}, recipe=_KL
    ),
    "kl-hidden": Method("distillation + all hidden states", recipe=replace(_KL, hidden_weight=1.0)),
    "kl-relation": Method(
        "distillation + attention relations", recipe=replace(_KL, relation_weight=1.0)
    ),
    "kl-labels": Method("distillation + labels, half each", recipe=Recipe(0.5, logits_weight=0.5)),
    "kl2": Method("distillation, T = 2", recipe=replace(_KL, temperature=2.0)),
    "kl-channel": Method("distillation, per channel", config=_CHANNEL, recipe=_KL),
    "kl-lsq-channel": Method(
        "distillation, learned scales per channel", config={**_LEARNED, **_CHANNEL}, recipe=_KL
    ),
    "channel": Method("plain, per channel", config=_CHANNEL, recipe=Recipe()),
}
# Title: arguments of `BitLabConfig`, and whether the layers are calibrated.
POST_TRAINING: dict[str, tuple[dict[str, Any], bool]] = {
    "rounded": ({}, False),
    "rounded, per channel": (_CHANNEL, False),
    "calibrated": ({}, True),
    "calibrated, per channel": (_CHANNEL, True),
}


def load_float(folder: Path) -> Any:
    """Loads the pretrained model in full precision."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def load_bitlab(folder: Path, mode: str = "train", **config: Any) -> Any:
    """Loads it ternary: latent to train, or rounded (``mode="infer"``)."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=BitLabConfig(mode=mode, **config)
    )


def load_post_training(title: str, folder: Path, samples: Tensor) -> Any:
    """Makes a ternary model of `POST_TRAINING`; calibration sees the samples, int64 [n, length]."""
    config, calibrated = POST_TRAINING[title]
    if not calibrated:
        return load_bitlab(folder, "infer", **config)
    model = load_bitlab(folder, **config)
    calibrate(model, [{"input_ids": ids} for ids in samples])
    return deploy(model)


def load_method(method: Method, folder: Path) -> Any:
    """Builds the model that a method trains."""
    if method.linear == "bitlab":
        return load_bitlab(folder, **method.config)
    model = load_float(folder)
    return auto_bitlinear(model) if method.linear == "auto" else model


def auto_bitlinear(model: Any) -> Any:
    """Puts transformers' online `AutoBitLinear` in the place of each linear layer but the head."""
    from transformers.integrations.bitnet import AutoBitLinear

    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and name != "lm_head":
            new = AutoBitLinear(
                module.in_features,
                module.out_features,
                bias=module.bias is not None,
                dtype=module.weight.dtype,
                online_quant=True,
            )
            new.load_state_dict(module.state_dict())
            model.set_submodule(name, new)
    return model


def train(
    method: Method, folder: Path, blocks: Tensor, rate: float, seed: int, batch: int, scratch: str
) -> tuple[Any, float]:
    """Trains a method's model on each block once.

    Returns:
        The model, and CPU seconds a token, a calibrated start included.
    """
    torch.manual_seed(seed)
    model = load_method(method, folder)
    arguments = TrainingArguments(
        output_dir=scratch,
        per_device_train_batch_size=batch,
        num_train_epochs=1,
        learning_rate=rate,
        lr_scheduler_type="cosine",
        warmup_steps=0.05,
        adam_beta2=0.95,
        weight_decay=0.0,
        use_cpu=True,
        seed=seed,
        save_strategy="no",
        report_to="none",
        logging_strategy="no",
        disable_tqdm=True,
    )
    common: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": [{"input_ids": ids, "labels": ids} for ids in blocks],
    }
    if method.recipe is None:
        trainer = Trainer(**common)
    else:
        teacher = load_float(folder) if method.recipe.distills else None
        trainer = BitLabTrainer(**common, recipe=method.recipe, teacher=teacher)
    started = time.process_time()
    trainer.train()
    return model, (time.process_time() - started) / blocks.numel()
