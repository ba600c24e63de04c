"""What is worth knowing about a run later: its model, its scheme, its arguments, its versions."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from torch import nn

from bitlab_hf.model.experts import expert_modules
from bitlab_hf.model.tree import quantized_layers

_ARGUMENTS = (
    "learning_rate",
    "lr_scheduler_type",
    "optim",
    "weight_decay",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "world_size",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "seed",
)
_PACKAGES = ("bitlab-hf", "torch", "transformers")


def run_facts(model: nn.Module, args: Any, max_steps: int) -> dict[str, Any]:
    """Returns plain values that JSON holds.

    Args:
        model: The model in training.
        args: Its TrainingArguments.
        max_steps: Steps that the run is going to take.
    """
    config = getattr(model, "config", None)
    source = str(getattr(config, "name_or_path", "") or "")
    # A path says where things lie on this machine; its last part is the name.
    name = Path(source).name if Path(source).exists() else source
    scheme = getattr(config, "quantization_config", None)
    layers = [found.module for found in quantized_layers(model)]
    run_name = args.run_name if args.run_name != args.output_dir else None
    return {
        "name": run_name or name,
        "model": name,
        "architecture": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ternary_weights": sum(layer.out_features * layer.in_features for layer in layers)
        + sum(
            stack.weights for one in expert_modules(model) for stack in one.module.stacks.values()
        ),
        "scheme": {
            key: value
            for key, value in (
                dict(scheme) if isinstance(scheme, dict) else _as_dict(scheme)
            ).items()
            if isinstance(value, str | int | float)
        },
        "arguments": {key: _plain(getattr(args, key, None)) for key in _ARGUMENTS},
        "max_steps": max_steps,
        "versions": {package: importlib.metadata.version(package) for package in _PACKAGES},
    }


def _as_dict(scheme: Any) -> dict[str, Any]:
    return dict(scheme.to_dict()) if hasattr(scheme, "to_dict") else {}


def _plain(value: Any) -> Any:
    """Returns an enumeration's value, and anything else as it is."""
    return getattr(value, "value", value)
