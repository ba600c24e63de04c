"""Assisted decoding whose text is that of decoding token by token: `verify_exactly`.

Prompt lookup and assistant models guess tokens, and one pass of the model verifies them. In it the
products of ternary and of int8 layers have the bits that each token has alone, and so have norms, a
row at a time. Attention has not, nor have float matrices: torch's kernels add up in another order
where there are several rows. With int8 activations a last bit becomes a code, and a code another
text. So guessed tokens attend one by one here, each to the keys that it would have found without
guesses, and go one by one through routers and through layers of float activations.

A pass without guesses is as it was, and so is what is not known to be attention of this kind.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from bitcore.errors import ArgumentError, LifecycleError
from bitlab_hf.model.left import ROUTER
from bitlab_hf.model.tree import quantized_layers
from bitlayers.state import LayerState

# The first key that queries need, and their mask.
Seen = tuple[int, Tensor | None]
# Of transformers' attention functions; they ask for more than masks and windows.
_OTHERWISE = ("softcap", "s_aux", "position_bias", "cache", "indices")


class _Pass(threading.local):
    """The pass that a thread is in.

    Attributes:
        logits: Of how many tokens it gives logits: the last that is certain, and guesses. 1 in a
            pass without guesses.
        seen: What queries see, by mask and place: layers share masks.
    """

    def __init__(self) -> None:
        self.begin(1)

    def begin(self, logits: int) -> None:
        """Begins another pass."""
        self.logits = logits
        self.seen: dict[tuple[Any, ...], Seen] = {}


_current = _Pass()


def verify_exactly(model: PreTrainedModel) -> None:
    """Lets `generate` with ``prompt_lookup_num_tokens`` or an ``assistant_model`` give the greedy
    text that it gives without; on the CPU bit for bit.

    In a pass that is asked for the logits of several tokens of one sequence (``logits_to_keep``)
    they attend one by one, each to none behind it, whatever else a mask allows. All other passes
    are as before.

    Args:
        model: A deployed causal language model with sdpa attention.

    Numerics:
        The logits are those of passes of one token. Of a head in 16 or 32 bits they may differ by
        rounding, which decides where two tokens are equally likely: it is read once for all
        guesses. So may those of experts that were left float, or have float activations, of
        prompts with padding, and of attention with more than masks and windows. Sampled text
        differs, since random numbers are drawn in another order.

    Raises:
        LifecycleError: The model is not deployed.
        ArgumentError: It has another attention than sdpa.
    """
    found = quantized_layers(model)
    if not found or not all(one.module.is_deployed for one in found):
        raise LifecycleError(
            "verify_exactly: the model must be deployed, got layers that are not\n"
            "Call deploy(model), or load a deployed checkpoint."
        )
    attention = model.config._attn_implementation
    if attention != "sdpa":
        raise ArgumentError(
            f"verify_exactly: attn_implementation must be 'sdpa', got {attention!r}\n"
            "Call model.set_attn_implementation('sdpa'), if the model has it."
        )
    if _enter in model._forward_pre_hooks.values():
        return
    # Under its own name: models ask whether it is that.
    AttentionInterface.register("sdpa", attend_each_alone)
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    model.register_forward_hook(_leave, always_call=True)
    head = model.get_output_embeddings()
    for module in model.modules():
        is_new = module is not head and not isinstance(module.forward, _Alone)
        if is_new and _mixes_rows(module):
            module.forward = _Alone(module.forward)


def _mixes_rows(module: nn.Module) -> bool:
    """Tells whether a token's bits depend on how many there are: of a float matrix, a router's
    among them, and of ternary weights with float activations.
    """
    if isinstance(module, LayerState):
        return module.quant_config.activation == "float" and not isinstance(module, nn.Embedding)
    if type(module) is nn.Linear:
        return True
    weight = module._parameters.get("weight")
    is_router = re.search(ROUTER, type(module).__name__) is not None
    return is_router and weight is not None and weight.dim() == 2


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    kept = kwargs.get("logits_to_keep")
    given = (kwargs.get("input_ids"), kwargs.get("inputs_embeds"), *args)
    inputs = next((one for one in given if isinstance(one, Tensor)), None)
    is_one = inputs is not None and inputs.shape[0] == 1
    _current.begin(kept if is_one and isinstance(kept, int) and kept > 1 else 1)


def _leave(model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
    _current.begin(1)


def _parts(length: int) -> Iterator[tuple[int, int]]:
    """Yields where parts of a pass of so many tokens begin and end: what is certain is one, as it
    is without guesses; then each guess.
    """
    certain = length - _current.logits + 1
    if not 0 < certain < length:
        certain = length
    yield 0, certain
    for index in range(certain, length):
        yield index, index + 1


class _Alone:
    """The forward of a module whose tokens go through it one by one.

    Args:
        own: Takes [..., M, any] and perhaps more; what it returns is such a tensor, or some.
    """

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _Alone(copy.deepcopy(self.own, memo))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if args else None
        if _current.logits == 1 or not isinstance(x, Tensor) or x.dim() < 2:
            return self.own(*args, **kwargs)

        def part(value: Any, start: int, stop: int) -> Any:
            is_of_tokens = isinstance(value, Tensor) and value.shape[:-1] == x.shape[:-1]
            return value[..., start:stop, :] if is_of_tokens else value

        found = [
            self.own(
                *(part(one, start, stop) for one in args),
                **{name: part(one, start, stop) for name, one in kwargs.items()},
            )
            for start, stop in _parts(x.shape[-2])
        ]
        if len(found) == 1:
            return found[0]
        if isinstance(found[0], Tensor):
            return torch.cat(found, -2)
        return tuple(torch.cat(one, -2) for one in zip(*found, strict=True))


def attend_each_alone(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attends as transformers' sdpa does; the guesses of a pass, each as if it came alone.

    Args:
        module: The attention module.
        query: [B, heads, M, D].
        key: [B, key heads, T, D].
        value: [B, key heads, T, D'].
        attention_mask: Those of transformers' attention functions.
        kwargs: As above.

    Returns:
        [B, M, heads, D'] of query's dtype, and no weights.
    """
    if not _is_cut(module, query, key, attention_mask, kwargs):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    length, total = query.shape[2], key.shape[2]
    window, outputs = kwargs.get("sliding_window"), []
    for start, stop in _parts(length):
        end = total - length + stop
        first, mask = 0, None
        if attention_mask is not None:
            place = attention_mask, start, stop, end, window
            if place not in _current.seen:
                _current.seen[place] = _seen(attention_mask, start, stop, end, window)
            first, mask = _current.seen[place]
        output, _ = sdpa_attention_forward(
            module, query[:, :, start:stop], key[:, :, first:end], value[:, :, first:end], mask,
            **kwargs,
        )  # fmt: skip
        outputs.append(output)
    return torch.cat(outputs, 1), None


def _is_cut(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, kwargs: dict[str, Any]
) -> bool:
    """Tells whether queries are the tokens of a pass with guesses, which see those before them."""
    length, total = query.shape[2], key.shape[2]
    if not 1 < _current.logits <= length or query.shape[0] != 1:
        return False
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", False) if causal is None else causal
    if not causal or any(kwargs.get(name) is not None for name in _OTHERWISE):
        return False
    if mask is None:
        return length == total
    return mask.dtype is torch.bool and mask.shape == (1, 1, length, total)


def _seen(mask: Tensor, start: int, stop: int, end: int, window: int | None) -> Seen:
    """Returns the first of the keys up to `end` that queries need, and the mask that a pass of them
    alone has: none where it would say nothing, but for a window that is full.
    """
    part = mask[:, :, start:stop, :end]
    if stop - start == 1:
        first = int(part[0, 0, 0].int().argmax())
        full = window is not None and end - first >= window
        if part[0, 0, 0, first:].all():
            return first, part[..., first:] if full else None
    elif window is not None and end == stop < window and _is_triangle(part[0, 0]):
        # A whole prompt that is shorter than the window, which its guesses leave.
        return 0, None
    return 0, part


def _is_triangle(mask: Tensor) -> bool:
    return torch.equal(mask, torch.ones_like(mask).tril())
