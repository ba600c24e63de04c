"""What of a latent model is no ternary layer, and whether someone said why."""

from __future__ import annotations

import re

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from bitlayers.base import BitLayerBase
from bitlayers.experts import BitExperts

HEAD = "output head"
LAST = "last layer of the model, which transformers leaves alone"
TIED = "tied to an embedding"
EXPERTS = "experts held in one tensor"
# Smaller tensors are tables and scales, not weights that tokens are multiplied with.
_SMALLEST = 4096
_OTHERS = re.compile(
    r"router|gate$|gate\.weight|bias|norm|pos_emb|position|query_emb|queries|_proj_weight|_head\."
)


def left_float(model: PreTrainedModel, said: list[str]) -> tuple[dict[str, str], list[str]]:
    """Tells what stays float.

    A layer may stay float as the output head, or where transformers leaves it alone; anything else
    must be named by a message, itself or the same layer of another block.

    Args:
        model: A latent model.
        said: BitLab's messages while it was loaded.

    Returns:
        ``{kind of layer: why}`` for what is explained and no head, and the names of what is not.
    """
    reasons: dict[str, str] = {}
    unexplained: list[str] = []
    candidates = _candidates(model)
    experts = sum(what == EXPERTS for _, what in candidates)
    for name, what in candidates:
        why = None if what == EXPERTS else _usual(model, name)
        if why == HEAD:
            continue
        kind = kind_of(name)
        # Of a block of experts a message names one tensor.
        named = name.rpartition(".")[0] if what == EXPERTS else name
        text = next((text for text in said if _names(text, named)), None)
        if text is None and what == EXPERTS:
            text = next((text for text in said if _counts(text, experts)), None)
        if why is None and text is not None:
            why = EXPERTS if what == EXPERTS else without_numbers(text)
        if why is None:
            unexplained.append(f"{kind} ({what})")
        else:
            reasons[kind] = why
    return reasons, sorted(set(unexplained))


def kind_of(name: str) -> str:
    """Returns a layer's name with stars for the numbers of blocks."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)|^\d+(?=\.)", "*", name)


def without_numbers(text: str) -> str:
    """Returns the first line of a message without what depends on the size of the model."""
    line = text.splitlines()[0].removeprefix("bitlab: ")
    return re.sub(r"\b\d+\b", "*", re.sub(r",? ?\d+ % of the weights,?", "", line))


def _candidates(model: PreTrainedModel) -> list[tuple[str, str]]:
    found = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)) and not isinstance(module, BitLayerBase):
            found.append((name, type(module).__name__))
    linear = {name for name, _ in found}
    for name, parameter in model.named_parameters():
        parent = name.rpartition(".")[0]
        owner = model.get_submodule(parent)
        if type(owner).__module__.startswith("torch.") or parent in linear:
            continue
        if isinstance(owner, (BitLayerBase, BitExperts, nn.Embedding, nn.modules.conv._ConvNd)):
            continue
        inside = re.search("expert|moe", f"{name} {type(owner).__name__}", re.IGNORECASE)
        outside = _OTHERS.search(name)
        large = parameter.numel() >= _SMALLEST and min(parameter.shape[-2:]) >= 16
        if large and ((parameter.dim() == 3 and parameter.shape[0] > 1) or inside) and not outside:
            found.append((name, EXPERTS))
    return found


def _usual(model: PreTrainedModel, name: str) -> str | None:
    """Returns why a layer stays float wherever transformers quantizes."""
    module = model.get_submodule(name)
    if module is model.get_output_embeddings():
        return HEAD
    weight = getattr(module, "weight", None)
    embeddings = [other for other in model.modules() if isinstance(other, nn.Embedding)]
    if any(other.weight is weight for other in embeddings):
        return TIED
    last = list(model.named_parameters())[-1][0].rpartition(".")[0]
    return LAST if name == last else None


def _counts(text: str, experts: int) -> bool:
    """Tells whether a message speaks of so many tensors of experts, one of them by name."""
    found = re.search(r"(\d+) expert", text)
    return found is not None and int(found[1]) >= experts


def _names(text: str, name: str) -> bool:
    """Tells whether a message names a layer, a part of it, or the same one of another block."""
    kind = kind_of(name)
    for word in re.findall(r"[\w*]+(?:\.[\w*]+)*", text):
        said = kind_of(word)
        if kind == said or said.startswith(kind + "."):
            return True
        if "." in said and kind.endswith("." + said):
            return True
    return False
