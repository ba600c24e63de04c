"""What transformers reads off a model: whether it is quantized, by whom, and what is tied."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from bitlab_hf.config import QUANT_METHOD
from bitlab_hf.model.count import WeightCount


def mark_quantized(model: PreTrainedModel, quantizer: HfQuantizer) -> None:
    """Makes a model with packed layers a quantized one in transformers' eyes."""
    attributes: Any = model
    attributes.hf_quantizer = quantizer
    attributes.is_quantized = True
    attributes.quantization_method = QUANT_METHOD
    for part in model.modules():
        if isinstance(part, PreTrainedModel):
            part.num_parameters = WeightCount(part)  # type: ignore[method-assign]


def mark_latent(model: PreTrainedModel) -> None:
    """Makes a latent model a float model in transformers' eyes; its configuration stays."""
    attributes: Any = model
    del attributes.hf_quantizer
    attributes.is_quantized = False
    del attributes.quantization_method
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False


def untie_packed(model: PreTrainedModel) -> None:
    """Drops the tied names that packed layers have part in: they share their qweight themselves."""

    def is_packed(name: str) -> bool:
        module_name, _, leaf = name.rpartition(".")
        return leaf == "weight" and getattr(model.get_submodule(module_name), "is_deployed", False)

    tied = getattr(model, "all_tied_weights_keys", None) or {}
    model.all_tied_weights_keys = {
        target: source
        for target, source in tied.items()
        if not is_packed(target) and not is_packed(source)
    }
