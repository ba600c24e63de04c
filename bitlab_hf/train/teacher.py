"""The teacher of a distillation, and what is read out of it and of the model while they run."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import deepspeed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from bitcore.errors import ArgumentError, MissingExtraError
from bitlab_hf.model.tree import decoder_layers
from bitlab_hf.train.floats import teacher_dtype
from bitlab_hf.train.recipe import Recipe

logger = logging.getLogger("bitlab")
_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


def check_causal(op: str, argument: str, model: Any) -> None:
    """Checks that a model predicts each next token, which is what a distillation compares.

    Args:
        op: Who asks, for the message.
        argument: What the model is to it.
        model: The model, unwrapped.

    Raises:
        ArgumentError: It classifies, fills masks, or has an encoder of its own.
    """
    kind = type(model).__name__
    generates = getattr(model, "can_generate", None)
    causal = (generates is not None and generates()) or kind.endswith("ForCausalLM")
    if not causal or getattr(model.config, "is_encoder_decoder", False):
        raise ArgumentError(
            f"{op}: {argument} must be a causal language model to be distilled, got {kind}\n"
            "Train it without a teacher: recipe='plain'."
        )


def load_teacher(
    teacher: nn.Module | str | os.PathLike[str], model: Any, recipe: Recipe, device: str
) -> Any:
    """Returns the teacher in eval mode, frozen, and checked against the model.

    Args:
        teacher: A model, or the folder or hub name of one.
        model: The model that learns from it, unwrapped.
        recipe: Whose terms it has to serve.
        device: The type of the one that it will teach on.

    Raises:
        ArgumentError: The teacher is the model itself, no causal language model, or their
            vocabularies or sizes do not fit.
        MissingExtraError: 8 bits are asked for without bitsandbytes.
    """
    given: Any = teacher
    if not isinstance(teacher, nn.Module):
        with _whole():
            given = _read(teacher, model, recipe, device)
    elif recipe.teacher_8bit:
        raise ArgumentError(
            "BitLabTrainer: teacher must be a path with teacher_8bit, got a model\n"
            "Load it with BitsAndBytesConfig(load_in_8bit=True) and pass it without the option."
        )
    held = {id(parameter) for parameter in model.parameters()}
    if any(id(parameter) in held for parameter in given.parameters()):
        raise ArgumentError(
            "BitLabTrainer: teacher must be a model of its own, got one that shares parameters "
            "with the model\nLoad the original a second time, without quantization_config."
        )
    check_causal("BitLabTrainer", "teacher", given)
    _check_sizes(given, model, recipe)
    return given.eval().requires_grad_(False)


def check_vocabulary(
    op: str, argument: str, teacher: str | os.PathLike[str], tokenizer: Any
) -> None:
    """Checks that a teacher's tokens are the model's: two vocabularies of one size can be of
    different words. Tokens that are special to both may have other names, and one of them may have
    more.

    Args:
        op: Who asks, for the message.
        argument: What the teacher is to it.
        teacher: Its folder or hub name; one without a tokenizer that can be read as it is, is not
            checked.
        tokenizer: The model's.

    Raises:
        ArgumentError: A number stands for another token.
    """
    try:
        other = AutoTokenizer.from_pretrained(teacher, trust_remote_code=False)
    except Exception as error:  # whatever it lacks: a teacher need not have one
        logger.warning(
            "%s: %s's vocabulary is not compared with the model's: its tokenizer cannot be read "
            "(%s)",
            op,
            argument,
            str(error).partition("\n")[0],
        )
        return
    special = _special(tokenizer) & _special(other)
    theirs = {number: token for token, number in other.get_vocab().items()}
    ours = sorted(tokenizer.get_vocab().items(), key=itemgetter(1))
    both = [(token, number) for token, number in ours if number in theirs]
    # Of a folder without a vocabulary transformers makes one up, of a few tokens.
    for token, number in both if 2 * len(both) > len(ours) else []:
        if theirs[number] != token and number not in special:
            raise ArgumentError(
                f"{op}: {argument} must have the model's vocabulary, where token {number} is "
                f"{token!r}, got {theirs[number]!r}\n"
                "Learn from the original, or from a model that shares its tokenizer."
            )


def _special(tokenizer: Any) -> set[int]:
    """Returns the numbers of tokens that were added to a vocabulary."""
    return set(getattr(tokenizer, "added_tokens_decoder", ()))


@contextmanager
def _whole() -> Iterator[None]:
    """Loads models whole: under DeepSpeed's ZeRO-3 transformers loads every one into partitions,
    which only the engine that trains it puts together.
    """
    reference = deepspeed._hf_deepspeed_config_weak_ref
    config = None if reference is None else reference()
    deepspeed.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:
            deepspeed.set_hf_deepspeed_config(config)


def _read(path: str | os.PathLike[str], model: Any, recipe: Recipe, device: str) -> Any:
    causal = type(model).__name__ in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    source: Any = AutoModelForCausalLM if causal else type(model)
    if not recipe.teacher_8bit:
        return source.from_pretrained(path, dtype=teacher_dtype(device))
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingExtraError(
            "BitLabTrainer: teacher_8bit needs bitsandbytes, got none\n"
            "Run `pip install bitsandbytes`."
        ) from error
    from transformers import BitsAndBytesConfig

    return source.from_pretrained(path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))


def _check_sizes(teacher: Any, model: Any, recipe: Recipe) -> None:
    theirs, ours = teacher.config.get_text_config(), model.config.get_text_config()
    if theirs.vocab_size != ours.vocab_size:
        raise ArgumentError(
            f"BitLabTrainer: teacher must have the model's vocabulary of {ours.vocab_size} tokens, "
            f"got one of {theirs.vocab_size}\n"
            "Learn from the original, or from a model that shares its tokenizer."
        )
    if recipe.hidden_weight:
        for name in ("hidden_size", "num_hidden_layers"):
            if getattr(theirs, name) != getattr(ours, name):
                raise ArgumentError(
                    f"BitLabTrainer: teacher must have the model's {name}, {getattr(ours, name)}, "
                    f"with hidden_weight, got {getattr(theirs, name)}"
                )
    for side in (model, teacher) if recipe.hidden_weight or recipe.relation_weight else ():
        _watched(side, recipe)


@dataclass
class States:
    """What one forward pass computed.

    Attributes:
        logits: [B, L, V], or None where the forward did not make them.
        last: The base model's last hidden state [B, L, H].
        hidden: Outputs of the compared layers.
        relations: Outputs of the query, key and value projections of the compared layer.
    """

    logits: Tensor | None = None
    last: Tensor | None = None
    hidden: list[Tensor] = field(default_factory=list)
    relations: list[Tensor] = field(default_factory=list)


def _watched(model: nn.Module, recipe: Recipe) -> tuple[list[nn.Module], list[nn.Module]]:
    """Returns the layers and the projections whose outputs a recipe compares."""
    layers = decoder_layers(model)
    numbers = recipe.hidden_layers or tuple(range(len(layers)))
    wanted = (*(numbers if recipe.hidden_weight else ()),
              *((recipe.relation_layer,) if recipe.relation_weight else ()))  # fmt: skip
    for number in wanted:
        if not -len(layers) <= number < len(layers):
            raise ArgumentError(
                f"Recipe: layers must be among the model's {len(layers)}, got {number}"
            )
    hidden = [layers[number] for number in numbers] if recipe.hidden_weight else []
    if not recipe.relation_weight:
        return hidden, []
    named = dict(layers[recipe.relation_layer].named_modules())
    found = [[m for n, m in named.items() if n.endswith(kind)] for kind in _PROJECTIONS]
    if any(len(modules) != 1 for modules in found):
        raise ArgumentError(
            f"Recipe: relation_weight needs a layer with one each of {_PROJECTIONS}, got "
            f"{type(model).__name__}"
        )
    for (module,), kind in zip(found, _PROJECTIONS, strict=True):
        width: Any = getattr(module, "out_features", recipe.relation_heads)
        if width % recipe.relation_heads:
            raise ArgumentError(
                f"Recipe: relation_heads must divide the {width} outputs of {kind}, got "
                f"{recipe.relation_heads}"
            )
    return hidden, [module for (module,) in found]


@contextmanager
def watch(model: nn.Module, inner: Any, recipe: Recipe) -> Iterator[States]:
    """Notes the first forward pass of a model within the block.

    Args:
        model: As it is called, perhaps wrapped.
        inner: The model within.
        recipe: Which states are wanted.
    """
    states = States()
    # At the outermost module logits are there without a hook inside a compiled graph.
    hooks = [model.register_forward_hook(lambda _m, _a, out: _note_logits(states, out))]
    base = inner.base_model
    if base is not inner:
        hooks.append(base.register_forward_hook(lambda _m, _a, out: _note_last(states, out)))
    if recipe.hidden_weight or recipe.relation_weight:
        hidden, relations = _watched(inner, recipe)
        for modules, into in ((hidden, states.hidden), (relations, states.relations)):
            note = partial(_note_output, into, len(modules))
            hooks += [module.register_forward_hook(note) for module in modules]
    try:
        yield states
    finally:
        for hook in hooks:
            hook.remove()


def _note_output(
    into: list[Tensor], most: int, _module: nn.Module, _inputs: Any, output: Any
) -> None:
    # Gradient checkpointing runs a layer again; the first pass is the one that counts.
    if len(into) < most:
        into.append(output[0] if isinstance(output, tuple) else output)


def _note_logits(states: States, output: Any) -> None:
    if states.logits is None:
        states.logits = getattr(output, "logits", None)


def _note_last(states: States, output: Any) -> None:
    if states.last is None:
        states.last = getattr(output, "last_hidden_state", None)


def logits_of(states: States, inner: Any) -> Tensor:
    """Returns the logits of a noted pass; computes them where a fused head left them out."""
    if states.logits is not None:
        return states.logits
    if states.last is None:
        raise ArgumentError(
            f"BitLabTrainer: model must return logits to be distilled, got {type(inner).__name__}"
        )
    logits: Tensor = inner.get_output_embeddings()(states.last)
    return logits


@torch.no_grad()
def ask(teacher: Any, inputs: dict[str, Any], recipe: Recipe) -> States:
    """Runs the teacher on a batch, without its labels."""
    kept = ("input_ids", "attention_mask", "position_ids", "token_type_ids", "inputs_embeds")
    given = {name: value for name, value in inputs.items() if name in kept}
    with watch(teacher, teacher, recipe) as states:
        teacher(**given)
    return states
