"""What of a latent model is no ternary layer, and whether someone said why."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitlayers.base import BitLayerBase

HEAD = "output head"
LAST = "last layer of the model, which transformers leaves alone"
EXPERTS = "3D parameter"
TIED = "tied to an embedding"


def left_float(model: PreTrainedModel, said: list[str]) -> tuple[dict[str, str], list[str]]:
    """Tells what stays float.

    Args:
        model: A latent model.
        said: BitLab's messages while it was loaded.

    Returns:
        ``{kind of layer: why}`` for what is explained and no head, and the names of what is not.
    """
    reasons: dict[str, str] = {}
    unexplained: list[str] = []
    for name, what in _candidates(model):
        why = _usual(model, name)
        if why == HEAD:
            continue
        # Of a block of experts a message names one tensor.
        named = name.rpartition(".")[0] if what == EXPERTS else name
        if why is None:
            why = next((text for text in said if _names(text, named)), None)
        kind = _kind(name)
        if why is None:
            unexplained.append(f"{kind} ({what})")
        else:
            reasons[kind] = why
    return reasons, sorted(set(unexplained))


def _candidates(model: PreTrainedModel) -> list[tuple[str, str]]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BitLayerBase):
            continue
        if isinstance(module, (nn.Linear, Conv1D)):
            found.append((name, type(module).__name__))
    linear = {name for name, _ in found}
    for name, parameter in model.named_parameters():
        parent, _, leaf = name.rpartition(".")
        if parameter.dim() == 3 and "conv" not in name and parent not in linear:
            owner = model.get_submodule(parent)
            if not isinstance(owner, (nn.Conv1d, nn.ConvTranspose1d, nn.Embedding)) and (
                "expert" in name or "moe" in name
            ):
                found.append((name, EXPERTS))
    return found


def _usual(model: PreTrainedModel, name: str) -> str | None:
    """Returns why a layer stays float wherever transformers quantizes."""
    module = model
    try:
        module = model.get_submodule(name)
    except AttributeError:
        return None
    if module is model.get_output_embeddings():
        return HEAD
    weight = getattr(module, "weight", None)
    tied = [
        other
        for other in model.modules()
        if isinstance(other, nn.Embedding) and other.weight is weight
    ]
    if tied:
        return TIED
    last = list(model.named_parameters())[-1][0].rpartition(".")[0]
    return LAST if name == last else None


def _names(text: str, name: str) -> bool:
    """Tells whether a message names a layer, a part of it, or the same one of another block."""
    kind = _kind(name)
    for word in re.findall(r"[\w*]+(?:\.[\w*]+)+", text):
        said = _kind(word)
        if kind == said or kind.endswith("." + said) or said.startswith(kind + "."):
            return True
    return False


def _kind(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)
