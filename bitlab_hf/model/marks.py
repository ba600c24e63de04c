"""What transformers reads off a model: whether it is quantized, by whom, and what is tied."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from bitlab_hf.config import QUANT_METHOD
from bitlab_hf.model.count import WeightCount
from bitlab_hf.model.tree import Found
from bitlayers.base import BitLayerBase
from bitlayers.state import SCALES


def mark_quantized(model: PreTrainedModel, quantizer: HfQuantizer) -> None:
    """Makes a model with packed layers a quantized one in transformers' eyes."""
    for module in model.modules():
        if not isinstance(module, PreTrainedModel):
            continue
        part: Any = module
        part.num_parameters = WeightCount(module)
        if part.config is model.config:
            # A base model is saved by itself, too.
            part.hf_quantizer = quantizer
            part.is_quantized = True
            part.quantization_method = QUANT_METHOD
            # What is saved from here on has the model's own names.
            part._weight_conversions = []


def unmark(model: PreTrainedModel) -> None:
    """Takes back what `mark_quantized` did to the parts of a model that is float again."""
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            fields = vars(module)
            names = ["num_parameters", "_weight_conversions"]
            if module is not model:
                names += ["hf_quantizer", "is_quantized", "quantization_method"]
            for name in names:
                fields.pop(name, None)


def mark_latent(model: PreTrainedModel) -> None:
    """Makes a latent model a float model in transformers' eyes; its configuration stays."""
    attributes: Any = model
    del attributes.hf_quantizer
    attributes.is_quantized = False
    del attributes.quantization_method
    for module in model.modules():
        if isinstance(module, PreTrainedModel):
            module.config._is_quantized = False


def retie_packed(model: PreTrainedModel, apart: set[str]) -> None:
    """Names the weights of packed layers that are tied to each other after what took their place.

    What transformers ties by name is then tied by it again, after a load and before a save. A pair
    of which one side is no packed layer, such as an embedding, is dropped.

    Args:
        model: The model.
        apart: Layers that hold tensors of their own all the same.
    """

    def renamed(tied: dict[str, str], prefix: str, buffers: bool) -> dict[str, str]:
        pairs: dict[str, str] = {}
        for target, source in tied.items():
            names = [f"{prefix}{name}" for name in (target, source)]
            packed = [name for name in names if _is_packed(model, name)]
            if not packed:
                pairs[target] = source
            elif len(packed) == 2 and not apart.intersection(
                name.removesuffix(".weight") for name in names
            ):
                held = model.get_submodule(packed[0].removesuffix(".weight"))._buffers
                for leaf in ("qweight", *(SCALES if buffers else ())):
                    if leaf != "qweight_multiplier" or held.get(leaf) is not None:
                        ends = [name.removesuffix("weight") + leaf for name in (target, source)]
                        pairs[ends[0]] = ends[1]
        return pairs

    # transformers looks up what it ties while loading among the Parameters.
    model.all_tied_weights_keys = renamed(model.all_tied_weights_keys or {}, "", False)
    for name, part in model.named_modules():
        tied = getattr(part, "_tied_weights_keys", None)
        if isinstance(part, PreTrainedModel) and isinstance(tied, dict):
            again = renamed(tied, f"{name}." if name else "", True)
            if again != tied:
                part._tied_weights_keys = again


def tied_groups(
    model: PreTrainedModel, layers: list[Found[BitLayerBase]]
) -> list[list[Found[BitLayerBase]]]:
    """Groups layers by the weight that transformers will make one; most stand alone."""
    groups = {name: [found] for found in layers for name in found.names}
    for pair in (model.all_tied_weights_keys or {}).items():
        sides = [groups.get(name.removesuffix(".weight")) for name in pair]
        first, second = sides
        if first is not None and second is not None and first is not second:
            first += second
            groups.update(dict.fromkeys((name for found in second for name in found.names), first))
    return list({id(group): group for group in groups.values()}.values())


def _is_packed(model: PreTrainedModel, name: str) -> bool:
    module_name, _, leaf = name.rpartition(".")
    try:
        module = model.get_submodule(module_name)
    except AttributeError:
        # A pattern, which finds the packed names by itself.
        return False
    return leaf == "weight" and getattr(module, "is_deployed", False)
