"""Models without weights, built from what a file says of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from bitcore.errors import BitLabError, CheckpointError
from bitlab_hf.checkpoint.files import read_config
from bitlab_hf.checkpoint.rotated import check_not_rotated

# What transformers and torch say of values that make no model.
_NO_MODEL = (
    ValueError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError,
    StrictDataclassError,
)  # fmt: skip


@contextmanager
def building(source: str, op: str) -> Iterator[None]:
    """Builds models on the meta device; names the source where it describes none.

    Raises:
        CheckpointError: Instead of what transformers or torch say of values that make no model.
    """
    try:
        with torch.device("meta"):
            yield
    except _NO_MODEL as error:
        if isinstance(error, BitLabError):
            raise
        said = " ".join(str(error).split()) or type(error).__name__
        raise CheckpointError(
            f"{op}: {source} must describe a model, got: {said:.300}\n"
            "It is damaged; fetch or write it again."
        ) from error


def model_of(source: Path, tensors: int, op: str) -> PreTrainedModel:
    """Returns the model of a folder without weights, as if it were not quantized.

    Args:
        source: The folder.
        tensors: How many its files hold.
        op: Who asks, for error messages.

    Raises:
        ConfigError: config.json says that weights are rotated.
        CheckpointError: It makes no model, or one of more layers than there are tensors.
    """
    check_not_rotated(op, read_config(source))
    with building("config.json", op):
        config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        config.__dict__.pop("quantization_config", None)
        layers = getattr(config.get_text_config(), "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > tensors:
            raise CheckpointError(
                f"{op}: num_hidden_layers must fit the {tensors} tensors, got {layers}"
            )
        architectures: list[str] = getattr(config, "architectures", None) or []
        model_class: Any = getattr(transformers, architectures[0], None) if architectures else None
        if model_class is None:
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        else:
            model = model_class._from_config(config)
    return model
