"""The modules that share one matrix of a vocabulary: an output head, an embedding, or both.

Their rows can be quantized together, or be given back as floats together; which modules these are
is found here, and whether there is a quantized form that does the same.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitcore.errors import ConfigError
from bitlab_hf.model.tree import Found
from bitlayers.lookup import QuantizedEmbedding
from bitlayers.quantized import QuantizedModule
from bitlayers.state import SCALES


@dataclass
class Rows:
    """The modules that share one matrix [V, K].

    Attributes:
        members: The modules; the first is the one whose names a file holds.
        tied: What transformers ties in the model and each model inside it, by its name there.
    """

    members: list[Found[nn.Module]]
    tied: dict[str, dict[str, str]]

    @property
    def names(self) -> list[str]:
        """Every name of every member."""
        return [name for member in self.members for name in member.names]

    @property
    def owner(self) -> str:
        """The name under which a file holds the tensors."""
        return self.members[0].names[0]

    @property
    def tensor(self) -> Tensor:
        """The shared matrix: ``weight`` before the swap, ``qweight`` after it."""
        module = self.members[0].module
        return cast(
            Tensor, module.qweight if isinstance(module, QuantizedModule) else module.weight
        )


def find_rows(model: PreTrainedModel, module: nn.Module, asked: str, fix: str) -> Rows:
    """Returns a module with all modules that hold the same weight.

    A skeleton's weights are tied by name only, as the configuration says.

    Args:
        model: The model, or its skeleton.
        module: The module.
        asked: The field of the configuration that asks, for messages.
        fix: What to do instead, for messages.

    Raises:
        ConfigError: The weight is also a parameter of another name than ``weight``.
    """
    weight = module.weight
    shared = {id(weight)}
    if weight.is_meta:
        parameters = dict(model.named_parameters(remove_duplicate=False))
        pairs = model.all_tied_weights_keys.items()
        # Targets of one source are tied to each other, whichever of them the module is.
        for _ in range(2):
            for pair in pairs:
                held = {id(parameters[name]) for name in pair if name in parameters}
                shared |= held if held & shared else set()
    members: dict[int, Found[nn.Module]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) not in shared:
            continue
        parent, _, leaf = name.rpartition(".")
        if leaf != "weight":
            raise ConfigError(f"bitlab: {asked} must find weights only, got {name}\n{fix}")
        holder = model.get_submodule(parent)
        members.setdefault(id(holder), Found(holder)).names.append(parent)
    targets = model.all_tied_weights_keys
    ordered = sorted(
        members.values(), key=lambda found: f"{found.names[0]}.weight" in targets
    )  # stable: the source of the others comes first
    tied = {
        name: part.get_expanded_tied_weights_keys(all_submodels=False)
        for name, part in model.named_modules()
        if isinstance(part, PreTrainedModel)
    }
    return Rows(ordered, tied)


def embedding_factor(embedding: nn.Module) -> tuple[float, bool] | None:
    """Returns what an embedding multiplies its rows with; None where it does anything else.

    Many of transformers' embeddings multiply with a factor: Gemma's with one that is rounded to the
    dtype of the weight first, BART's with a Python number. Which it is, and that it is all, is
    found out by trying the class on four rows.

    Returns:
        The factor, and whether it is rounded first.
    """
    if type(embedding) is nn.Embedding:
        return 1.0, True
    tensors = {name for name, _ in embedding.named_parameters()}
    tensors |= {name for name, _ in embedding.named_buffers()}
    factor = getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))
    if not isinstance(embedding, nn.Embedding) or not isinstance(factor, (int, float)):
        return None
    if not tensors <= {"weight", "embed_scale"}:
        return None
    with torch.device("cpu"):
        return _tried_factor(embedding, float(factor))


def _tried_factor(embedding: nn.Embedding, factor: float) -> tuple[float, bool] | None:
    rows = torch.linspace(-1, 1, 32).view(4, 8).bfloat16()
    tried = copy.copy(embedding)
    fields = vars(tried)
    fields["_parameters"] = {"weight": nn.Parameter(rows, requires_grad=False)}
    fields["_buffers"] = dict.fromkeys(embedding._buffers, torch.tensor(factor))
    tried.padding_idx = None
    try:
        got = type(embedding).forward(tried, torch.arange(4))
    except (RuntimeError, AttributeError, TypeError):
        # It does more than look rows up.
        return None
    for rounded in (True, False):
        if torch.equal(got, rows * (torch.tensor(factor).bfloat16() if rounded else factor)):
            return factor, rounded
    return None


def stored_elsewhere(model: PreTrainedModel) -> set[str]:
    """Returns the names of the tensors that a file holds under another one's name, as transformers
    ties them, packed weights with their scales; those whose other half is no longer in the model
    are not among them.
    """
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    tied = model.all_tied_weights_keys or {}
    return with_scales(target for target, source in tied.items() if source in names)


def with_scales(names: Iterable[str]) -> set[str]:
    """Returns names of tensors with those of the scales that go with the packed ones among them."""
    found = set(names)
    packed = [name for name in found if name.endswith((".qweight", "_qweight"))]
    return found | {name.removesuffix("qweight") + leaf for name in packed for leaf in SCALES}


def unsupported(model: PreTrainedModel, rows: Rows) -> str | None:
    """Says what every member would have to be, and one is not, to have a quantized form that does
    the same; None where all have.
    """
    tied_names = {name for pair in model.all_tied_weights_keys.items() for name in pair}
    for found in rows.members:
        module, name = found.module, found.names[0]
        if isinstance(module, nn.Embedding):
            if embedding_factor(module) is None or module.max_norm is not None:
                return (
                    f"a plain embedding at {name}, or one that only scales its rows, got {module!r}"
                )
        elif type(module) is not nn.Linear:
            return f"an nn.Linear or an nn.Embedding at {name}, got {type(module).__name__}"
        elif module.bias is not None and (
            len(rows.members) > 1 or any(f"{name}.bias" in tied_names for name in found.names)
        ):
            # transformers pads a tied head's bias to the length of its weight, which is gone.
            return f"a tied head without bias, got {name}.bias"
    return None


def check_supported(model: PreTrainedModel, rows: Rows, asked: str, fix: str) -> None:
    """Checks that every member has a quantized form that does the same.

    Args:
        model: The model, or its skeleton.
        rows: The members.
        asked: The field of the configuration that asks, for messages.
        fix: What to do instead, for messages.

    Raises:
        ConfigError: One has not; the message names it.
    """
    problem = unsupported(model, rows)
    if problem is not None:
        raise ConfigError(f"bitlab: {asked} must find {problem}\n{fix}")


def float_embedding(module: QuantizedEmbedding, weight: nn.Parameter) -> nn.Module:
    """Returns the float embedding that a quantized one stands for.

    Args:
        module: The quantized one.
        weight: Its weight [V, K].
    """
    rows, columns = weight.shape
    # Made with one row: no weight is allocated and filled only to be dropped.
    make: Any = module.float_class
    if make is nn.Embedding:
        embedding = make(1, columns)
    else:
        embedding = make(1, columns, None, embed_scale=module.embed_scale)
        embedding = embedding.to(device=weight.device, dtype=weight.dtype)
    embedding.weight = weight
    embedding.num_embeddings, embedding.padding_idx = rows, module.padding_idx
    restored: nn.Module = embedding
    return restored
