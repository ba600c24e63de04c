"""The model card of a deployed model: facts that the model itself shows, and how to load it."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitcore.config import BitQuantConfig
from bitlab_hf.replace import quantized_layers
from bitlayers.int8 import Int8Rows

INSTALL = "pip install bitlab-hf"
_REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


def model_card(model: PreTrainedModel, title: str) -> str:
    """Returns the README.md of a deployed model, with the metadata that the hub reads.

    Nothing is in it that the model does not show: its base model is named where it was loaded
    from the hub; data, recipe and quality are for the author to add.

    Args:
        model: A deployed model.
        title: Its name.
    """
    layers = [found.module for found in quantized_layers(model)]
    packed = {id(layer.qweight): layer.in_features * layer.out_features for layer in layers}
    ternary = sum(packed.values())
    int8 = {
        id(module.qweight): module.qweight.numel()
        for module in model.modules()
        if isinstance(module, Int8Rows)
    }
    floats = {id(p): p.numel() for p in model.parameters() if p.is_floating_point()}
    schemes = Counter(_scheme(layer.quant_config) for layer in layers)
    architectures = getattr(model.config, "architectures", None) or [type(model).__name__]
    causal = architectures[0] in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    metadata: dict[str, object] = {
        "library_name": "transformers",
        "tags": ["bitlab", "ternary", "1.58-bit", "quantized"],
    }
    if causal:
        metadata["pipeline_tag"] = "text-generation"
    base = str(getattr(model.config, "_name_or_path", "") or "")
    if _REPOSITORY.fullmatch(base) and not Path(base).exists():
        metadata.update(base_model=base, base_model_relation="quantized")
    auto = "AutoModelForCausalLM" if causal else architectures[0]
    lines = [
        # JSON values are YAML.
        "\n".join(["---", *(f"{k}: {json.dumps(v)}" for k, v in metadata.items()), "---"]),
        f"# {title}",
        f"A ternary (1.58-bit) {architectures[0]}, packed by BitLab: the weights of "
        f"{len(layers)} linear layers are -1, 0 or +1 times a scale, four to a byte.",
        "## Load it",
        f"```bash\n{INSTALL}\n```",
        f"```python\nfrom transformers import {auto}\n\n"
        f'model = {auto}.from_pretrained("{title}")\n```',
        "No import of BitLab is needed. Without it installed, loading fails with a size mismatch "
        f"of `{quantized_layers(model)[0].names[0]}.weight` instead of giving random weights.",
        "## What is in it",
        "| | |\n|---|---|\n"
        f"| ternary weights | {ternary:,} in {len(packed)} matrices |\n"
        + (f"| output head, int8 | {sum(int8.values()):,} |\n" * bool(int8))
        + f"| other parameters | {sum(floats.values()):,}, {_dtypes(model)} |\n"
        + "\n".join(f"| {count} layers | {scheme} |" for scheme, count in schemes.items()),
    ]
    return "\n\n".join(lines) + "\n"


def _scheme(config: BitQuantConfig) -> str:
    grouped = f" of {config.group_size}" if config.group_size else ""
    weights = config.weight_granularity.replace("_", " ") + grouped
    if config.activation_dtype == "float32":
        return f"scales {weights}, activations not quantized"
    return f"scales {weights}, activations int8 {config.activation_granularity.replace('_', ' ')}"


def _dtypes(model: nn.Module) -> str:
    names = Counter(
        str(p.dtype).removeprefix("torch.") for p in model.parameters() if p.is_floating_point()
    )
    return " and ".join(sorted(names))
