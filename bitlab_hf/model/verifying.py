"""Assisted decoding whose text is that of decoding token by token: `verify_exactly`.

Prompt lookup and assistant models guess tokens, and one pass of the model verifies them. In it the
products of ternary and of int8 layers have the bits that each token has alone, and so have norms, a
row at a time. Attention has not, nor have float matrices: torch's kernels add up in another order
where there are several rows. With int8 activations a last bit becomes a code, and a code another
text. So guessed tokens attend one by one here, each to the keys that it would have found without
guesses, and go one by one through routers and through layers of float activations.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bitcore.errors import ArgumentError, LifecycleError
from bitlab_hf.model.decoding_attention import UNSUPPORTED
from bitlab_hf.model.tree import quantized_layers
from bitlayers.state import LayerState

VERIFYING = "bitlab_verifying"


# The first key that queries need, and their mask.
Seen = tuple[int, Tensor | None]


class _Pass(threading.local):
    """The pass that a thread is in.

    Attributes:
        logits: Of how many tokens it gives logits: the last that is certain, and guesses.
        seen: What queries see, by mask and place: layers share masks.
    """

    def __init__(self) -> None:
        self.begin(1)

    def begin(self, logits: int) -> None:
        """Begins another pass."""
        self.logits, self.seen = logits, dict[tuple[Any, ...], Seen]()


_current = _Pass()


def verify_exactly(model: PreTrainedModel) -> None:
    """Lets `generate` with ``prompt_lookup_num_tokens`` or an ``assistant_model`` give the greedy
    text that it gives without; on the CPU bit for bit.

    The model's attention becomes an implementation of BitLab's own: transformers' sdpa, but where a
    pass is asked for the logits of several tokens.

    Args:
        model: A deployed causal language model with sdpa attention.

    Numerics:
        The logits are those of passes of one token. Of a head in 16 or 32 bits they may differ by
        rounding, which decides where two tokens are equally likely: it is read once for all
        guesses. So may those of experts that were left float, or have float activations. Sampled
        text differs, since random numbers are drawn in another order.

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
    if attention == VERIFYING:
        return
    if attention != "sdpa":
        raise ArgumentError(
            f"verify_exactly: attn_implementation must be 'sdpa', got {attention!r}\n"
            "Call model.set_attn_implementation('sdpa'), if the model has it."
        )
    model.set_attn_implementation(VERIFYING)
    model.register_forward_pre_hook(_enter, with_kwargs=True)
    model.register_forward_hook(_leave, always_call=True)
    head = model.get_output_embeddings()
    for module in model.modules():
        if module is not head and _mixes_rows(module):
            module.forward = _Alone(module.forward)


def _mixes_rows(module: nn.Module) -> bool:
    """Tells whether a token's bits depend on how many there are: of a float matrix, a router's
    among them, and of ternary weights with float activations.
    """
    if isinstance(module, LayerState):
        return module.quant_config.activation == "float" and not isinstance(module, nn.Embedding)
    weight = module._parameters.get("weight")
    return weight is not None and weight.dim() == 2 and not isinstance(module, nn.Embedding)


def _enter(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    kept = kwargs.get("logits_to_keep")
    _current.begin(kept if isinstance(kept, int) else 1)


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
        own: Takes tensors [..., M, any]; what it returns is such a one, or some.
    """

    def __init__(self, own: Callable[..., Any]) -> None:
        self.own = own

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return _Alone(copy.deepcopy(self.own, memo))

    def __call__(self, *inputs: Tensor) -> Any:
        parts = _parts(inputs[0].shape[-2])
        found = [self.own(*(x[..., start:stop, :] for x in inputs)) for start, stop in parts]
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
        key: [B, key heads, T, D], T of at least M: the cache's, and these tokens'.
        value: [B, key heads, T, D'].
        attention_mask: bool [B, 1, M, T]; None is causal, with M = T.
        kwargs: Those of transformers' attention functions. Where they ask for more than masks and
            windows, all attend at once, as they do in attention that is not causal.

    Returns:
        [B, M, heads, D'] of query's dtype, and no weights.
    """
    length, total = query.shape[2], key.shape[2]
    asked = any(kwargs.get(name) is not None for name in UNSUPPORTED)
    if asked or not getattr(module, "is_causal", True):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
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
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1), None


def _seen(mask: Tensor, start: int, stop: int, end: int, window: int | None) -> Seen:
    """Returns the first of the keys up to `end` that queries need, and the mask that a pass of them
    alone has: none where it would say nothing, but for a window that is full.
    """
    part = mask[:, :, start:stop, :end]
    if mask.shape[0] == 1 and stop - start == 1 < mask.shape[2]:
        first = int(part[0, 0, 0].int().argmax())
        full = window is not None and end - first >= window
        if part[0, 0, 0, first:].all():
            return first, part[..., first:] if full else None
    elif window is not None and end == stop < window and part[0, 0, -1].all():
        # A whole prompt that is shorter than the window, which its guesses leave.
        return 0, None
    return 0, part


AttentionInterface.register(VERIFYING, attend_each_alone)
AttentionMaskInterface.register(VERIFYING, sdpa_mask)
