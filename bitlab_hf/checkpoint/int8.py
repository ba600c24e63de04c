"""What of a load is int8: the output head with what is tied to it, an embedding, linear layers."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn
from transformers import PreTrainedModel

from bitcore.errors import CheckpointError, ConfigError
from bitlab_hf.checkpoint.headers import FLOATS, Checkpoint, check_headers, check_no_multiplier
from bitlab_hf.config import BitLabConfig
from bitlab_hf.model.int8 import INT8_HEAD, INT8_LAYERS, find_head, layer_rows
from bitlab_hf.model.rows import Rows, check_supported, find_rows
from bitlab_hf.model.tree import Found
from bitlab_hf.model.vocabulary import input_embeddings


def head_rows(model: PreTrainedModel, config: BitLabConfig, was_converted: bool) -> Rows | None:
    """Returns the head that is to be int8, refused early where it cannot be.

    Args:
        model: The skeleton.
        config: Whose ``head`` counts.
        was_converted: Whether BitLab wrote it.

    Raises:
        ConfigError: There is none, or it has no int8 form.
    """
    if config.head != "int8":
        return None
    head = find_head(model)
    if head is None and not was_converted:
        raise ConfigError(
            'bitlab: head="int8" must find an output head that is an nn.Linear, got none'
        )
    return head


def stored_vocabulary(
    model: PreTrainedModel, known: Checkpoint, config: BitLabConfig
) -> list[Rows]:
    """Returns the output head, and the input embedding, where a deployed file holds them in int8.

    The header says which modules it holds so; a head that it does not list is a new one. A file
    whose header is lost is taken to hold what the configuration says.

    Args:
        model: The skeleton.
        known: What the file holds.
        config: Whose ``head`` counts.

    Raises:
        CheckpointError: A tensor is missing, or is another one than the module's.
        ConfigError: A module has no int8 form.
    """
    if config.head != "int8":
        return []
    head = model.get_output_embeddings()
    result: list[Rows] = []
    for module in (head, input_embeddings(model)):
        if not isinstance(module, (nn.Linear, nn.Embedding)) or any(
            module is found.module for rows in result for found in rows.members
        ):
            continue
        rows = find_rows(model, module, *INT8_HEAD)
        held = {
            leaf: [name for name in rows.names if f"{name}.{leaf}" in known.tensors]
            for leaf in ("weight", "qweight", "qweight_scale")
        }
        if known.layers is not None:
            expected = bool(known.layers.intersection(rows.names))
        else:
            tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
            expected = not held["weight"] and (module is head or tied)
        if not expected and not held["qweight"]:
            continue
        check_supported(model, rows, *INT8_HEAD)
        _check_headers(rows, known, INT8_HEAD[0])
        result.append(rows)
    return result


def stored_layers(
    model: PreTrainedModel, known: Checkpoint, linears: Sequence[Found[nn.Linear]]
) -> list[Rows]:
    """Returns the linear layers that a deployed file holds in int8, with what is tied to them.

    One that the header does not list is new: it stays as it is. A file whose header is lost is
    taken to hold all of them.

    Args:
        model: The skeleton.
        known: What the file holds.
        linears: The layers that the configuration says are int8.

    Raises:
        CheckpointError: A tensor is missing, or is another one than the layer's.
        ConfigError: A layer has no int8 form.
    """
    result = [
        rows
        for rows in layer_rows(model, linears)
        if known.layers is None
        or known.layers.intersection(rows.names)
        or any(f"{name}.qweight" in known.tensors for name in rows.names)
    ]
    for rows in result:
        _check_headers(rows, known, INT8_LAYERS[0])
    return result


def _check_headers(rows: Rows, known: Checkpoint, what: str) -> None:
    owner, *borrowers = rows.members
    shape = tuple(rows.tensor.shape)
    wanted: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "qweight": (("I8",), shape),
        "qweight_scale": (("F32",), shape[:1]),
    }
    if getattr(owner.module, "bias", None) is not None:
        wanted["bias"] = (FLOATS, shape[:1])
    check_headers(owner.names, wanted, known, what)
    check_no_multiplier(rows.names, known, what)
    for name in (name for found in borrowers for name in found.names):
        for leaf in ("weight", *wanted):
            if f"{name}.{leaf}" in known.tensors:
                raise CheckpointError(
                    f"{name}.{leaf} must not be in the checkpoint, got one, though {name} is tied "
                    f"to {rows.owner}\nconfig.json and the tensors do not belong together."
                )
